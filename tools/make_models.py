#!/usr/bin/env python
"""Write ``docs/models.md``: each model family as its code knows it, and the least memory that the planner finds.

``--plan`` plans every preset again (minutes) and writes ``benchmarks/results/lowest_memory.json``; without it the page
is made of the figures that are there. ``--check`` says whether the page is fresh.

Example:
    python tools/make_models.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import yaml

from blockskip_hooks.families import FAMILIES
from blockskip_hooks.planning.presets import preset_facts, preset_names
from blockskip_hooks.utils.formatting import format_bytes


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
FIGURES = ROOT / "benchmarks" / "results" / "lowest_memory.json"
PLANNER = Path("examples") / "dreambooth_blockskip" / "plan_memory.py"
LOWEST = "--skip_ratio 0.5 --quantization nf4 --gradient_checkpointing --use_8bit_adam"
PIXELS = 512
HEAD = f"""# Models

Made by `python tools/make_models.py` from the families' code, the recipes in `configs/` and the planner. No model of
these sizes has been run where this was built: families are proven on tiny pipelines of the real classes with random
weights ([the table](../benchmarks/README.md#results) of `benchmarks/family_table.py`), and memory is **simulated**.

A family is chosen by the pipeline's class that the model's `model_index.json` or `modular_model_index.json` names.
Flags of some families only are refused by the others in one line. `blockskip train --config configs/FILE` runs a
recipe; what you type behind it wins.

The tables of memory are of {PIXELS} px with half of the blocks skipped, the kept ones in NF4, 8-bit Adam, gradient
checkpointing, rank 4 and one validation image of {PIXELS} px. *Plain* is LoRA in bfloat16 on all blocks, in training.
A device context and the allocator come on top. By
`blockskip plan --preset NAME --resolution {PIXELS} --validation_resolution {PIXELS} {LOWEST}`.
"""
NOTES = {
    "sana": "SANA-Sprint trains with the flow-matching objective of its transformer, not with its distillation loss.",
    "flux2": "klein keeps the upstream script's `--text_encoder_out_layers 10 20 30`; the stock pipeline's default is "
    "`9 18 27`. Name the layers that you will make images with. FLUX.2-dev's text processor needs `torchvision`.",
    "flux3": "diffusers has FLUX.3 from 0.42 on, as a modular pipeline and without a DreamBooth script: LoRA is on "
    "the attention, and images are made by the pipeline's own blocks, without its prompt upsampler "
    "(`blockskip_hooks.families.flux3_pipeline.Flux3ImagePipeline`). The text's blocks come first, then the "
    "image's, then those of both. The text's do not depend on the timestep, so samples of a prompt share one "
    "record of it while no block of both is skipped at the start. For 500 samples of one prompt of 80 tokens at "
    "512 px in bfloat16 `--skip_blocks 5,0` stores 126 MiB instead of 360 MiB and runs the text's blocks once "
    "instead of 500 times (0.23 TFLOP each); `10,0` stores 3.05 GiB instead of 3.28 GiB. Blocks for reference "
    "images hold no weights: 0.67 of 5.54 billion parameters, 1.25 GiB. All of this is simulated for the default "
    "config of diffusers' class; that of the published model was not at hand. Prompts are padded to a multiple of "
    "80 tokens, which the model sees, so those of two lengths do not share a batch; step-distilled models are "
    "refused.",
    "hidream": "Its Llama comes from `--pretrained_text_encoder_4_name_or_path`, as upstream.",
    "krea2": "512 text tokens are stored per record; a smaller `--max_sequence_length` that fits your prompts saves "
    "disk.",
    "qwen_image_21": "`--resolution` and buckets divide by 32. Its text processor needs `torchvision`. The VAE has an "
    "alpha channel: photos are put on white and trained as opaque, and pictures are put on white. No prompt is cut: a "
    "run stops at one that is longer than `--max_sequence_length`. The image's positions follow the text's length, so "
    "prompts that share batches are padded to the longest of the run, as the pipeline pads a list; with "
    "`--train_batch_size 1` nothing is padded. Pairs train with `--patch_sampling none`.",
    "pixart_sigma": "diffusers has no LoRA loader for it: load the result with "
    "`blockskip_hooks.families.pixart_sigma.PixArtSigmaLoraPipeline`.",
}
"""What a person has to know of a family beside its facts, by the name of its file."""


def plan_presets() -> dict[str, Any]:
    """The least memory of every preset: bytes by stage, and of plain LoRA."""
    spec = util.spec_from_file_location("plan_memory", ROOT / PLANNER)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures = {}
    for name in preset_names():
        words = ["--preset", name, "--resolution", str(PIXELS), "--validation_resolution", str(PIXELS), "--json"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            if module.main([*words, *LOWEST.split()]):
                sys.exit(f"no plan of {name}")
        plan = json.loads(printed.getvalue())
        figures[name] = {
            "model": plan["model"],
            "blocks": plan["skip"]["blocks"],
            "skipped": [plan["skip"]["leading"], plan["skip"]["trailing"]],
            "stages": {stage["name"]: stage["peak_device_bytes"] for stage in plan["stages"]},
            "plain": plan["plain_lora"]["peak_device_bytes"],
        }
        print(f"{name}: {format_bytes(max(figures[name]['stages'].values()))}", flush=True)
    return figures


def memory_table(names: list[str], figures: dict[str, Any]) -> Iterator[str]:
    """Rows of the presets of one family."""
    if not names:
        return
    yield "| preset | skipped | encode | precompute | train | validate | plain |"
    yield "|---|---|---|---|---|---|---|"
    for name in names:
        found = figures[name]
        stages = [format_bytes(found["stages"][stage]) for stage in ("encode", "precompute", "train", "validate")]
        skipped = f"{found['skipped'][0]} + {found['skipped'][1]} of {found['blocks']}"
        yield f"| `{name}` | {skipped} | {' | '.join(stages)} | {format_bytes(found['plain'])} |"
    yield ""


def quoted(names: Any) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def module_of(recipe: str) -> str:
    """The module of the family that a recipe's file is named after."""
    modules = {cls.__module__.rpartition(".")[2] for cls in FAMILIES.values()}
    named = (module for module in modules if re.fullmatch(rf"{module}(_.*)?\.yaml", recipe.replace("-", "_")))
    return max(named, key=len, default="")


def describe(module: str, classes: list[type], presets: list[str], figures: dict[str, Any]) -> Iterator[str]:
    """One family's section."""
    yield f"## {' and '.join(dict.fromkeys(cls.name for cls in classes))}"  # type: ignore[attr-defined]
    yield ""
    recipes = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs").glob("*.yaml"))}
    yield f"- Pipeline: {quoted(pipeline for pipeline, cls in FAMILIES.items() if cls in classes)}"
    first: Any = classes[0]
    of_model: dict[str, list[str]] = {}
    for file, settings in recipes.items():
        if module == module_of(file):
            model, side = settings["pretrained_model_name_or_path"], settings["resolution"]
            of_model.setdefault(f"`{model}`", []).append(f"[`{file}`](../configs/{file}) at {side} px")
    yield from (f"- Recipes of {model}: {', '.join(files)}" for model, files in of_model.items())
    yield f"- LoRA in: {quoted(first.lora_layers)}"
    encoders = quoted(first.trained_text_components)
    yield f"- `--train_text_encoder`: {encoders or 'refused'}"
    yield f"- `--save_format comfyui`: {'yes' if first.comfyui else 'refused'}"
    flags = {flag.name: flag for cls in classes for flag in cls.own_flags if not flag.refusal}  # type: ignore[attr-defined]
    # What upstream takes without an effect is no flag to tell people of.
    if own := sorted(name for name, flag in flags.items() if not flag.settings["help"].startswith("No effect")):
        yield f"- Own flags: {quoted(f'--{name}' for name in own)}"
    if first.flag_defaults:
        yield f"- Own defaults: {quoted(f'--{name} {value}' for name, value in sorted(first.flag_defaults.items()))}"
    if module in NOTES:
        yield f"- {NOTES[module]}"
    yield ""
    yield from memory_table(presets, figures)


def make_page() -> str:
    """The whole page, from the figures that are there."""
    figures = json.loads(FIGURES.read_text())
    modules: dict[str, list[type]] = {}
    for cls in FAMILIES.values():
        modules.setdefault(cls.__module__.rpartition(".")[2], []).append(cls)
    presets: dict[str, list[str]] = {}
    for name in preset_names():
        family = FAMILIES[preset_facts(name)["pipeline"]]
        presets.setdefault(family.__module__.rpartition(".")[2], []).append(name)
    lines = [HEAD]
    for module in sorted(modules):
        lines += describe(module, modules[module], presets.get(module, []), figures)
    return "\n".join(lines).rstrip("\n") + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or check it; the exit code is 1 if it is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="Plan every preset again.")
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if the page is stale.")
    args = parser.parse_args(argv)
    if args.plan:
        FIGURES.write_text(json.dumps(plan_presets(), indent=2) + "\n")
    page = make_page()
    if args.check:
        fresh = PAGE.is_file() and PAGE.read_text() == page
        print(f"{PAGE.name} is {'fresh' if fresh else 'stale: run python tools/make_models.py'}")
        return 0 if fresh else 1
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
