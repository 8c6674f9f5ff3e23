#!/usr/bin/env python
"""Draw the figures of ``docs/how_it_works.md`` from the embedded model and the public architectures; no network.

Example:
    python tools/draw_figures.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, PatchSamplingConfig, list_blocks  # noqa: E402
from blockskip_hooks.blocks import block_bytes  # noqa: E402
from blockskip_hooks.data.photo_set import PhotoSet  # noqa: E402
from blockskip_hooks.data.photos import scan_photos  # noqa: E402
from blockskip_hooks.data.sample_plan import SamplePlan  # noqa: E402
from blockskip_hooks.embedded import embedded_model, embedded_photos  # noqa: E402
from blockskip_hooks.loading.model_defaults import model_defaults  # noqa: E402
from blockskip_hooks.loading.models import empty_model  # noqa: E402
from blockskip_hooks.planning.presets import preset_facts  # noqa: E402


IMAGES = Path(__file__).parents[1] / "docs" / "images"
KEPT, SKIPPED, INK = "#2f6f9f", "#d9d9d9", "#222222"


def draw_crops(file: Path) -> None:
    """Samples of a real sample plan, from the noisiest to the cleanest: the photo, its patch, what is trained on."""
    side = model_defaults(embedded_model())[0]["resolution"]
    patch = PatchSamplingConfig(mode="dynamic", min_size=side // 2, max_size=side, multiple=8)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(embedded_model(), subfolder="scheduler")
    photos = PhotoSet(scan_photos(embedded_photos("dog")), side)
    plan = SamplePlan(
        seed=0, num_images={"instance": len(photos)}, timesteps=scheduler.timesteps, patch=patch, batch_size=1
    )
    samples = sorted((plan.sample(i) for i in range(40)), key=lambda sample: sample.timestep_index)[::6]
    figure, rows = plt.subplots(2, len(samples), figsize=(1.5 * len(samples), 3.4))
    for sample, (above, below) in zip(samples, rows.T, strict=True):
        whole = photos.crop(sample.image, patch_size=side, output_size=side)
        place = {"top": sample.top, "left": sample.left}
        cut = photos.crop(sample.image, patch_size=sample.patch_size, output_size=side // 2, **place)
        t = float(scheduler.timesteps[sample.timestep_index]) / len(scheduler.timesteps)
        free = side - sample.patch_size + 1
        corner = (int(sample.left * free) - 0.5, int(sample.top * free) - 0.5)
        above.imshow(whole.permute(1, 2, 0) / 2 + 0.5)
        above.add_patch(Rectangle(corner, sample.patch_size, sample.patch_size, fill=False, edgecolor="red", lw=2))
        above.set_title(f"t = {t:.2f} T\n{sample.patch_size} px", fontsize=9)
        below.imshow(cut.permute(1, 2, 0) / 2 + 0.5)
    for axes in rows.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    rows[0, 0].set_ylabel("photo and patch", fontsize=9)
    rows[1, 0].set_ylabel(f"trained at {side // 2} px", fontsize=9)
    _save(figure, file)


def draw_blocks(file: Path) -> None:
    """Blocks of three models as bars: height is a block's size in bf16, colour whether it is kept."""
    shown = (("flux.1-dev", 7, 10), ("flux.1-dev", 19, 9), ("sana-1.6b", 5, 5))
    figure, rows = plt.subplots(len(shown), 1, figsize=(9, 4.6))
    for axes, (name, leading, trailing) in zip(rows, shown, strict=True):
        blocks = list_blocks(empty_model(preset_facts(name)["transformer"]))
        sizes = [size / 2**20 for size in block_bytes(blocks, torch.bfloat16)]
        kept = [leading <= n < len(sizes) - trailing for n in range(len(sizes))]
        axes.bar(range(len(sizes)), sizes, width=0.8, color=[KEPT if k else SKIPPED for k in kept])
        part = sum(size for size, k in zip(sizes, kept, strict=True) if k) / sum(sizes)
        axes.set_title(
            f"{name}: first {leading}, last {trailing} of {len(sizes)} skipped; {part:.0%} of their weights kept",
            fontsize=10,
            loc="left",
        )
        axes.set_ylabel("MiB a block", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("block, in execution order (blue: kept, with LoRA; grey: skipped)", fontsize=9)
    _save(figure, file)


@torch.no_grad()
def draw_flow(file: Path) -> None:
    """What flows through a training step, and the stream's size after each block of the embedded model, measured."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.2), height_ratios=(1, 1.3))
    above.set_xlim(0, 100)
    above.set_ylim(0, 30)
    above.axis("off")
    boxes = (
        (2, 14, "noisy\npatch", "white"),
        (22, 22, "leading span\nstored output\n(no weights)", SKIPPED),
        (50, 20, "kept blocks\n+ LoRA", KEPT),
        (76, 22, "trailing span\n+ stored residual\n(no weights)", SKIPPED),
    )
    for left, width, text, colour in boxes:
        box = FancyBboxPatch((left, 8), width, 15, boxstyle="round,pad=0.4", facecolor=colour, edgecolor=INK)
        above.add_patch(box)
        ink = "white" if colour == KEPT else INK
        above.text(left + width / 2, 15.5, text, ha="center", va="center", fontsize=9, color=ink)
    for (left, width, _, _), (right, _, _, _) in zip(boxes, boxes[1:], strict=False):
        above.add_patch(
            FancyArrowPatch((left + width + 1, 15.5), (right - 1, 15.5), arrowstyle="->", mutation_scale=14)
        )
    above.text(
        50, 2, "gradients reach the kept blocks only; records come from one no-grad forward", ha="center", fontsize=9
    )

    config = BlockSkipConfig(leading=5, trailing=4)
    transformer = FluxTransformer2DModel.from_pretrained(
        embedded_model(), subfolder="transformer", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    tokens = transformer.config.in_channels
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ids = torch.stack([torch.zeros(256), rows.flatten(), columns.flatten()], dim=1)
    inputs = {
        "hidden_states": torch.randn(1, 256, tokens, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, transformer.config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, transformer.config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(16, 3),
    }
    model = DiTBlockSkipTransformer(transformer, config)
    sizes: dict[str, list[float]] = {}
    current: list[float] = []
    for block in (*model.spans.leading, *model.spans.kept, *model.spans.trailing):
        index = block.metadata.return_hidden_states_index

        def record(module: torch.nn.Module, args: tuple, output: object, index: int | None = index) -> None:
            hidden = output[index or 0] if isinstance(output, tuple) else output
            current.append(float(hidden[:, -256:].norm()))  # type: ignore[index]

        block.module.register_forward_hook(record)
    residuals = model.capture_residuals(**inputs)
    for label, given in (("whole model", None), ("placeholders and records", residuals)):
        current.clear()
        model(**inputs, residuals=given)
        sizes[label] = list(current)
    count = len(sizes["whole model"])
    for first, last in ((0, config.leading), (count - config.trailing, count)):
        below.axvspan(first - 0.5, last - 0.5, color=SKIPPED, alpha=0.6)
    below.plot(sizes["whole model"], color=INK, label="whole model")
    below.plot(sizes["placeholders and records"], "o", color=KEPT, label="placeholders and records")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_xlabel("block of the embedded model (grey: skipped)", fontsize=9)
    below.set_ylabel("norm of the image tokens after it", fontsize=9)
    below.legend(frameon=False, fontsize=9)
    below.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def _save(figure: plt.Figure, file: Path) -> None:
    figure.tight_layout()
    # Without the version of matplotlib in it a file is the same wherever the figure is.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"{file.name} drawn")


def main(argv: list[str] | None = None) -> int:
    """Draw every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=IMAGES, help="Where the pictures go.")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw_crops(args.output_dir / "how_crops.png")
    draw_blocks(args.output_dir / "how_blocks.png")
    draw_flow(args.output_dir / "how_residuals.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
