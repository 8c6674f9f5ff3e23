#!/usr/bin/env python
"""Plan what fits GPUs of common sizes, and write the recipes: the tables of the pages and the configs of FLUX.1.

For each model and size the setting with the least compute that skips at most 30 % of the blocks, else the one that is
closest to plain LoRA, as ``plan_memory.py --gpu`` prints them. Plans are kept in benchmarks/results/gpu_sizes.json:
only the presets that are named are planned anew, and what is written is made from all of them.

Example:
    python tools/make_recipes.py --presets flux.1-dev    # minutes for each
    python tools/make_recipes.py                         # writes the tables and the configs again
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blockskip_hooks.utils.files import write_json, write_text


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_sizes.json"
BEGIN, END = "<!-- made by tools/make_recipes.py -->\n", "<!-- end -->\n"
SIZES = (6, 8, 12, 16, 24)
MODELS = {
    "flux.1-dev": "FLUX.1-dev",
    "flux.2-klein-4b": "FLUX.2 klein 4B",
    "flux.2-klein-9b": "FLUX.2 klein 9B",
    "z-image": "Z-Image",
    "qwen-image": "Qwen-Image",
    "krea-2": "Krea 2",
    "sd3.5-medium": "SD3.5 medium",
    "sd3.5-large": "SD3.5 large",
    "sana-1.6b": "SANA 1.6B",
}
FLUX = "flux.1-dev"
PAGES = {
    ROOT / "README.md": (FLUX, "flux.2-klein-9b", "z-image"),
    ROOT / "docs" / "choosing_settings.md": tuple(MODELS),
}
"""Which models the table of a page has."""
# Attention alone, as the paper and upstream's example adapt it; other models get the layers of their families.
LORA_LAYERS = {FLUX: "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0"}
RANK = 16
FULL_RESOLUTION = 1024
USUAL_SIDE = 512
OPTION_LINES = {
    "checkpointing": "gradient_checkpointing: true",
    "8bit_adam": "use_8bit_adam: true",
    "int8": "quantization: int8",
    "nf4": "quantization: nf4",
    "patches": "patch_sampling: dynamic",
}
OWN_SIZE = f"{FULL_RESOLUTION}, the model's own, fits too, in three times the time (estimated)"
COMMAND = "accelerate launch --quiet examples/dreambooth_blockskip/train_dreambooth_blockskip.py"


def load_planner() -> Any:
    """plan_memory.py as a module."""
    path = ROOT / "examples" / "dreambooth_blockskip" / "plan_memory.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(planner: Any, preset: str) -> dict[str, Any]:
    """What is recommended for each size of GPU; ``None`` where nothing fits."""
    words = ["--preset", preset, "--gpu", "1GB", "--rank", str(RANK)]
    if preset in LORA_LAYERS:
        words += ["--lora_layers", LORA_LAYERS[preset]]
    parse = planner.build_parser().parse_args
    found: dict[str, Any] = {}
    with planner.fits_of(parse(words), preset) as fits:
        for size in SIZES:
            fit = fits.fastest(size * 10**9) or fits.closest(size * 10**9)
            found[str(size)] = fit and described(fit)
    larger = planner.recipe_resolution(preset) < FULL_RESOLUTION
    if larger:
        # Memory that is left over goes into resolution.
        with planner.fits_of(parse([*words, "--resolution", str(FULL_RESOLUTION)]), preset) as fits:
            for size in SIZES:
                now = found[str(size)]
                if now and not {"checkpointing", "int8", "nf4"} & set(now["options"]):
                    fit = fits.fastest(size * 10**9)
                    if fit and fit.choice.options == tuple(now["options"]):
                        found[str(size)] = described(fit)
    return found


def described(fit: Any) -> dict[str, Any]:
    """A setting as JSON takes it."""
    selection, patch = fit.choice.selection, fit.choice.plan["patch"]
    return {
        "resolution": fit.resolution,
        "leading": selection.leading,
        "trailing": selection.trailing,
        "blocks": selection.blocks,
        "options": list(fit.choice.options),
        "held": fit.held,
        "trained_at": patch["training_resolution"],
        "stages": {stage["name"]: stage["needed_bytes"] for stage in fit.choice.plan["stages"]},
        "compute": round(fit.compute, 4),
    }


def cell(setting: dict[str, Any] | None) -> str:
    """A setting in a few words; the side trained at only where it is not the usual one."""
    if setting is None:
        return "–"
    share = (setting["leading"] + setting["trailing"]) / setting["blocks"]
    skipped = f"{setting['leading']},{setting['trailing']} ({share:.0%})" if share else "none"
    held = setting["held"] + (" ckpt" if "checkpointing" in setting["options"] else "")
    peak = max(setting["stages"].values()) / 2**30
    side = "" if setting["trained_at"] == USUAL_SIDE else f"{setting['trained_at']} px, "
    return f"{held}, {skipped}<br>{side}{peak:.1f} GiB, {setting['compute']:.0%}"


def table(results: dict[str, Any], models: Iterable[str]) -> str:
    """The table of a page; what is as for the next smaller GPU is not written again."""
    rows = [["model", *(f"{size} GB" for size in SIZES)]]
    for name in (name for name in models if name in results):
        cells = [cell(results[name][str(size)]) for size in SIZES]
        before = ["", *cells]
        rows.append([MODELS[name], *("as left" if now == left else now for now, left in zip(cells, before))])
    head, *lines = (f"| {' | '.join(row)} |\n" for row in rows)
    return "".join([head, "|---" * len(rows[0]) + "|\n", *lines])


def config(size: int, setting: dict[str, Any]) -> str:
    """A config of FLUX.1 for a GPU, and what it says of itself."""
    pair, blocks = f"{setting['leading']},{setting['trailing']}", setting["blocks"]
    skipped = setting["leading"] + setting["trailing"]
    stages = [f"{name} {peak / 2**30:.1f} GiB" for name, peak in setting["stages"].items()]
    weights = {"bf16": "bf16", "int8": "8 bits", "nf4": "4 bits"}[setting["held"]]
    how = (
        "Of what skips at most 30 % of the blocks the least compute, in bf16 where that fits"
        if skipped <= 0.3 * blocks
        else "What is closest to plain LoRA of all that fits"
    )
    about = (
        f"{how}: a step and its record take {setting['compute']:.0%} of the TFLOP of plain LoRA at "
        f"{setting['resolution']} px. What else fits: plan_memory.py --preset {FLUX} --gpu {size}GB.",
        f"Simulated memory: {', '.join(stages)} (images of 1024 px), a CUDA context and the allocator's gaps "
        "included; no GPU was at hand. Made by tools/make_recipes.py.",
    )
    # Where that is larger than what is trained on, images of the model's own size can take longer than training.
    side = setting["resolution"]
    images = [] if side == FULL_RESOLUTION else [f"validation_resolution: {side}  # {OWN_SIZE}"]
    lines = [
        f"# FLUX.1-dev on a GPU of {size} GB: kept blocks in {weights}, {skipped} of {blocks} blocks skipped.",
        f"#   {COMMAND} --config configs/flux-{size}gb.yaml \\",
        '#     --instance_data_dir my-photos --instance_prompt "a photo of sks cat" --output_dir cat \\',
        '#     --validation_prompt "a photo of sks cat in a bucket"',
        *(f"# {line}" for text in about for line in textwrap.wrap(text, 117, break_on_hyphens=False)),
        "pretrained_model_name_or_path: black-forest-labs/FLUX.1-dev",
        "instance_data_dir: dog",
        "instance_prompt: a photo of sks dog",
        "validation_prompt: a photo of sks dog in a bucket",
        "output_dir: flux-dog",
        "mixed_precision: bf16",
        f"resolution: {setting['resolution']}",
        *images,
        "train_batch_size: 1",
        "max_train_steps: 500",
        "lr_warmup_steps: 0",
        "seed: 0",
        "checkpointing_steps: 100",
        f"rank: {RANK}",
        f"lora_alpha: {RANK}",
        "guidance_scale: 1",
        f"lora_layers: {LORA_LAYERS[FLUX]}",
        f"skip_blocks: {pair if skipped else 'none'}",
    ]
    options = [name for name in setting["options"] if not (name == "int8" and "nf4" in setting["options"])]
    return "\n".join([*lines, *(OPTION_LINES[name] for name in options)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Plan the presets that are named, then write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=tuple(MODELS), default=[], help="Which to plan anew.")
    args = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if args.presets:
        planner = load_planner()
        logging.getLogger("blockskip_hooks").setLevel(logging.ERROR)
        for preset in args.presets:
            results[preset] = plan(planner, preset)
            write_json(RESULTS, results)
            print(
                preset, *(f"{size} GB: {cell(results[preset][str(size)])}" for size in SIZES), sep="\n  ", flush=True
            )
    for page, models in PAGES.items():
        before, rest = page.read_text().split(BEGIN)
        _, after = rest.split(END)
        write_text(page, before + BEGIN + table(results, models) + END + after)
    for size in SIZES:
        if setting := results.get(FLUX, {}).get(str(size)):
            write_text(ROOT / "configs" / f"flux-{size}gb.yaml", config(size, setting))
    print(table(results, MODELS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
