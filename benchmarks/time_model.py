#!/usr/bin/env python
"""How long would runs of FLUX.1-dev take on GPUs that people own? Estimated on paper; nothing is run on one.

From the plan's TFLOP and bytes (simulated) and published rates: tensor-core peaks, PCIe, an NVMe disk. A forward takes
its TFLOP at half of the peak. A pass over the skipped blocks takes the longer of computing and reading them, and the
time of sending them to the device on top. Not counted: loading, text encoders, the VAE, writing records. Beside plain
LoRA and two settings of ``auto`` it estimates the recipe in configs/ for the device, with the images that it draws.

Example:
    python benchmarks/time_model.py --json benchmarks/results/time_model.json
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import benchmark_parser, load_script, print_targets, target, write_figures
from diffusers import FluxTransformer2DModel
from full_size import empty_model, load_configs

from blockskip_hooks import BlockSkipConfig, list_blocks
from blockskip_hooks.blocks import block_bytes, modulation_layers, split_blocks
from blockskip_hooks.families.flux import Flux


@dataclass(frozen=True)
class Device:
    """A GPU in a machine.

    Attributes:
        tflops: Published peak of dense 16-bit products, added up in 32 bits.
        pcie_gbs: Published rate of its bus, one way.
        disk_gbs: Published rate of a disk that goes with it, reading in sequence.
        recipe: The file in configs/ for its memory.
        host_gbs: Rate of copying within host memory, a guess.
    """

    tflops: float
    pcie_gbs: float
    disk_gbs: float
    recipe: str | None = None
    host_gbs: float = 10.0


DEVICES = {
    "RTX 4090": Device(tflops=165.2, pcie_gbs=31.5, disk_gbs=7.0, recipe="flux-24gb.yaml"),
    "RTX 3060 12 GB": Device(tflops=25.5, pcie_gbs=31.5, disk_gbs=3.5, recipe="flux-12gb.yaml"),
    # It computes in float16 only, and recipes are in bfloat16.
    "T4": Device(tflops=65.0, pcie_gbs=15.8, disk_gbs=2.0),
}
USED = 0.5
"""Part of the published peak that large forwards reach, and 0.8 of a bus's."""
BUS_USED = 0.8
STEPS, STRETCHES, IMAGES, DENOISING_STEPS = 500, 10, 12, 28
OWN_IMAGES = 1024
"""Side of validation images where a recipe names none: the model's own."""
RECIPE_FLAGS = ("resolution", "rank", "lora_layers", "skip_blocks", "gradient_checkpointing", "use_8bit_adam")
"""What of a recipe a plan depends on."""


@dataclass(frozen=True)
class Work:
    """What a run has to do, by its plan.

    Attributes:
        ratio: Part of the blocks that is skipped.
        train_tflop: Of a training step.
        forward_tflop: Of a sample's precompute forward.
        image_tflop: Of an image's denoising step.
        skipped: Part of a forward's TFLOP that is done in skipped blocks.
        streamed_gb: Weights that a pass reads, in 1e9 bytes.
        stretches: In how many parts records are made.
        in_step: Samples that a pass is for.
        images_in_step: Images that a pass is for.
    """

    ratio: float
    train_tflop: float
    forward_tflop: float
    image_tflop: float
    skipped: float
    streamed_gb: float
    stretches: int
    in_step: int
    images_in_step: int


def main(argv: list[str] | None = None) -> int:
    """Estimate and print; 0 if the goals for an RTX 4090 are met."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--resolution", type=int, default=512, help="Side of photos and of validation images.")
    args = parser.parse_args(argv)
    sizes = ("--resolution", str(args.resolution), "--validation_resolution", str(args.resolution))
    plain = planned("--skip_blocks", "none", "--gradient_checkpointing", *sizes)
    plain_step, plain_image = tflop(stage(plain, "train")), tflop(stage(plain, "validate"))
    works = {f"{percent} %": work(planned("--skip_ratio", str(percent / 100), *sizes)) for percent in (30, 50)}
    recipes = {device.recipe: of_recipe(device.recipe) for device in DEVICES.values() if device.recipe}
    # What they would take with images of the model's own size.
    smaller = [name for name in recipes if drawn(name) < OWN_IMAGES]
    recipes |= {f"{name}, {OWN_IMAGES} px": of_recipe(name, OWN_IMAGES) for name in smaller}
    results: dict[str, Any] = {"plain": {"train_tflop": plain_step, "image_tflop": plain_image}, "devices": {}}
    results["works"] = {name: asdict(item) for name, item in (works | recipes).items()}
    print("estimated, minutes:  device | run | training steps + precompute = both | images")
    for device_name, device in DEVICES.items():
        rate = USED * device.tflops
        rows = results["devices"][device_name] = {
            "plain LoRA, checkpointing": row(
                STEPS * plain_step / rate, 0.0, IMAGES * DENOISING_STEPS * plain_image / rate
            )
        }
        for name, item in works.items():
            for cached in (True, False):
                rows[f"{name} skipped, {'host cache' if cached else 'from disk'}"] = estimate(item, device, cached)
        for name in recipes:
            if device.recipe and name.startswith(device.recipe):
                rows[name] = estimate(recipes[name], device, cached=False)
        for name, figures in rows.items():
            both = figures["steps"] + figures["precompute"]
            print(
                f"  {device_name:15} {name:28} {figures['steps']:6.1f} + {figures['precompute']:5.1f} = {both:6.1f}"
                f"   {figures['images']:6.1f}"
            )
    best, base = (results["devices"]["RTX 4090"][n] for n in ("50 % skipped, host cache", "plain LoRA, checkpointing"))
    run, whole = (figures["steps"] + figures["precompute"] for figures in (best, base))
    targets = [
        target("RTX 4090, 500 steps at 50 % / plain LoRA with checkpointing", run / whole, 0.5),
        target(f"RTX 4090, minutes of {IMAGES} images at 50 %", best["images"], 3.0),
    ]
    print_targets(targets)
    write_figures(args.json, "time_model", settings={"resolution": args.resolution}, results=results, targets=targets)
    return 0 if all(item["met"] for item in targets) else 1


def settings_of(name: str) -> dict[str, Any]:
    """A recipe's settings."""
    return yaml.safe_load((Path(__file__).parents[1] / "configs" / name).read_text())


def drawn(name: str) -> int:
    """Side of a recipe's validation images."""
    return settings_of(name).get("validation_resolution", OWN_IMAGES)


def of_recipe(name: str, images: int | None = None) -> Work:
    """What a run of a recipe has to do, with validation images of its own side or another."""
    settings, side = settings_of(name), images or drawn(name)
    given = {flag: settings[flag] for flag in RECIPE_FLAGS if flag in settings}
    words = [part for flag, value in given.items() for part in (f"--{flag}", value) if part is not True]
    return work(planned(*map(str, words), "--validation_resolution", str(side)))


def planned(*flags: str) -> dict[str, Any]:
    """The plan of FLUX.1-dev with these flags."""
    script, said = load_script("plan_memory"), io.StringIO()
    with contextlib.redirect_stdout(said):
        code = script.main(["--preset", "flux.1-dev", "--rank", "16", "--json", *flags])
    if code:
        raise RuntimeError(f"plan_memory.py {' '.join(flags)} ended with {code}")
    return json.loads(said.getvalue())


def stage(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """A stage of a plan."""
    return next(stage for stage in plan["stages"] if stage["name"] == name)


def tflop(of: dict[str, Any]) -> float:
    """TFLOP of a stage's step for one sample."""
    return (of["tflops_per_step"] + of["attention_tflops_per_step"] - of["vae_tflops"]) / of["batch_size"]


def work(plan: dict[str, Any]) -> Work:
    """What a plan's run has to do."""
    model = empty_model(FluxTransformer2DModel, load_configs("flux.1-dev")["transformer"])
    blocks, skip = list_blocks(model), plan["skip"]
    spans = split_blocks(blocks, BlockSkipConfig(leading=skip["leading"], trailing=skip["trailing"]))
    sizes = dict(zip((block.name for block in blocks), block_bytes(blocks, torch.bfloat16), strict=True))
    skipped = sum(sizes[block.name] for block in spans.skipped)
    recorded = [model.get_submodule(name) for name in modulation_layers(spans, Flux.modulation_layers)]
    precompute, validate = stage(plan, "precompute"), stage(plan, "validate")
    return Work(
        ratio=skip["ratio"],
        train_tflop=tflop(stage(plan, "train")),
        forward_tflop=tflop(precompute),
        image_tflop=tflop(validate),
        # Each block's products are as many as its weights.
        skipped=skipped / sum(sizes.values()),
        streamed_gb=(skipped + 2 * sum(p.numel() for layer in recorded for p in layer.parameters())) / 1e9,
        # Records of leading blocks stay true while the LoRA learns.
        stretches=STRETCHES if skip["trailing"] else 1,
        in_step=precompute["batch_size"] * precompute["together"],
        # The preset's plan is for one image; a run's is for all of them, which need less beside a forward.
        images_in_step=IMAGES,
    )


def row(steps: float, precompute: float, images: float) -> dict[str, float]:
    """Minutes from seconds."""
    return {"steps": steps / 60, "precompute": precompute / 60, "images": images / 60}


def estimate(item: Work, device: Device, cached: bool) -> dict[str, float]:
    """Minutes of a run's parts."""
    rate, bus = USED * device.tflops, BUS_USED * device.pcie_gbs

    def passes(count: int, tflop_each: float, samples: int) -> float:
        compute = samples * tflop_each / rate
        seconds = 0.0
        for number in range(count):
            read = item.streamed_gb / (device.host_gbs if cached and number else device.disk_gbs)
            seconds += (1 - item.skipped) * compute + max(item.skipped * compute, read) + item.streamed_gb / bus
        return seconds

    per_stretch = STEPS // item.stretches
    samples = min(item.in_step, per_stretch)
    precompute = passes(item.stretches * -(-per_stretch // samples), item.forward_tflop, samples)
    images = passes(DENOISING_STEPS * IMAGES // item.images_in_step, item.image_tflop, item.images_in_step)
    return row(STEPS * item.train_tflop / rate, precompute, images)


if __name__ == "__main__":
    sys.exit(main())
