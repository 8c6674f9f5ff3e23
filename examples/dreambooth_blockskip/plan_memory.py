#!/usr/bin/env python
"""What personalising a model would need, without its files: memory per stage, FLOPs and disk, all simulated.

A preset is a model folder without weights, and the plan is the one that the training script makes of it with
``--plan_only``. ``--gpu`` ranks settings of all presets, or of the one that ``--preset`` names: for each the one that
is closest to plain LoRA, and the one with the least compute of those that skip at most 30 % of the blocks.

Example:
    python plan_memory.py --gpu 12GB
    python plan_memory.py --preset flux.1-dev --skip_blocks 19,9 --resolution 512 --training_resolution 256
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockskip_hooks.cli.startup import (
    SETTINGS_ERROR,
    errors_in_one_line,
    keep_memory_whole,
    make_parser,
    quiet_libraries,
    returns_exit_code,
)


quiet_libraries()
# Training does so, and plans count what the allocator leaves.
keep_memory_whole()

import torch

from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.gpu_sizes import Fits, format_fits
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.cli.run_plan import make_plan, plan_request
from blockskip_hooks.embedded import embedded_photos
from blockskip_hooks.loading.quantization import METHODS
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.planning.devices import PLANNED_DEVICES
from blockskip_hooks.planning.options import MEMORY_OPTIONS, QUANTIZING_OPTIONS
from blockskip_hooks.planning.presets import find_preset, preset_facts, preset_names, write_preset
from blockskip_hooks.planning.ranking import USABLE
from blockskip_hooks.planning.stages import plan_run
from blockskip_hooks.training.chosen_blocks import planned_dtype
from blockskip_hooks.training.flags.types import SIZE
from blockskip_hooks.training.run import Run
from blockskip_hooks.utils.errors import UserError
from blockskip_hooks.utils.formatting import fit_lines, format_bytes
from blockskip_hooks.utils.logs import errors_only
from blockskip_hooks.utils.progress import listed


# Flags that the training script has too, with the meaning that they have there.
TRAINING_FLAGS = (
    *("skip_blocks", "skip_ratio", "skip_budget", "selection_table", "resolution", "rank", "lora_layers"),
    *("lora_dropout", "train_batch_size", "precompute_batch_size", "max_sequence_length", "max_train_steps"),
    *("residual_dtype", "residual_budget", "memory_budget", "memory_options", "mixed_precision"),
    *("keep_modulation", "gradient_checkpointing", "quantization", "use_8bit_adam"),
)
# What --gpu chooses itself.
CHOSEN = ("skip_blocks", "skip_ratio", "skip_budget", "memory_budget", "memory_options", "gradient_checkpointing")
CHOSEN += ("quantization", "use_8bit_adam", "training_resolution", "shared_by", "json")
# Side of the largest patch: what the upstream scripts' examples train at, and of validation images.
DEFAULT_RESOLUTION = 1024
# Without --gpu, where no recipe is looked for.
DEFAULT_SIDE = 512
# What plain LoRA, for comparison, does not take from the plan.
NOT_PLAIN = ("skip_ratio", "skip_budget", "selection_table", "memory_budget", "memory_options", "quantization")


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of the training script mean the same here."""
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--preset", help=f"Model, also by its hub id: {', '.join(preset_names())}.")
    flag("--gpu", type=SIZE, help="Rank what fits a GPU of this size, like 12GB, of one preset or all.")
    flag("--skip_blocks", default="auto", help="Blocks to skip: none, auto, N in all, or n,m (leading,trailing).")
    flag("--skip_ratio", type=float, help="Part of all blocks that --skip_blocks auto skips; default: 0.3.")
    flag(
        "--skip_budget",
        help="Bytes of parameters that --skip_blocks auto frees instead, like 10GiB; default: --skip_ratio.",
    )
    flag(
        "--selection_table",
        help="Table that says which blocks to skip, from blockskip select; default: what is known.",
    )
    flag("--resolution", type=int, help="Largest patch in pixels; default: 512, with --gpu that of the recipes.")
    flag("--training_resolution", type=int, help="Side trained at; default: half of --resolution if blocks skip.")
    flag("--rank", type=int, default=4, help="Rank of the LoRA matrices.")
    flag(
        "--lora_layers",
        help="Comma-separated ends of the names of the layers to adapt, within kept blocks; default: the family's.",
    )
    flag("--lora_dropout", type=float, default=0.0, help="Dropout in the LoRA layers.")
    flag("--train_batch_size", type=int, default=1, help="Samples per step.")
    flag("--precompute_batch_size", type=int, help="Samples per precompute forward; default: what training leaves.")
    flag("--max_sequence_length", type=int, help="Tokens of a prompt; default: that of the model's family.")
    flag("--max_train_steps", type=int, default=500, help="Steps, for the disk that records take.")
    flag("--keep_modulation", action="store_true", help="Keep modulation layers in memory, as the training flag.")
    flag("--residual_dtype", choices=("auto", "float8"), help="Number format of the records; default: auto.")
    flag("--residual_budget", default="16GB", help="Disk the records may fill at a time, like 8GB; default: 16GB.")
    flag(
        "--memory_budget",
        help="Memory every stage must fit in, like 12GiB; auto then skips as few blocks as do it. Default: none.",
    )
    flag(
        "--memory_options",
        nargs="+",
        choices=tuple(MEMORY_OPTIONS),
        help="What --memory_budget may use beside skipping, in this order; default: nothing.",
    )
    flag("--validation_resolution", type=int, help="Side of validation images in pixels; default: there are none.")
    flag("--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16", help="Dtype of the frozen weights.")
    flag("--gradient_checkpointing", action="store_true", help="Less activation memory for one more forward.")
    flag("--quantization", choices=METHODS, default="none", help="Hold kept blocks in 4 (nf4) or 8 bits (int8).")
    flag("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state.")
    flag("--shared_by", type=int, default=1, help="Processes that divide kept blocks' weights, as configs/fsdp2.yaml.")
    flag("--device", choices=PLANNED_DEVICES, default="cuda", help="Whose rules decide the memory; default: cuda.")
    flag("--json", action="store_true", help="Print the plan as JSON.")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Check the flags that the training script does not have; a preset may be named as people know the model.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    if args.gpu is None and args.preset is None:
        raise UserError(f"--preset names the model; choose one of {', '.join(preset_names())}, or rank all by --gpu.")
    if args.preset is not None:
        args.preset = find_preset(args.preset)
    if args.gpu is not None:
        if args.gpu < 2**20:
            raise UserError(f"--gpu {args.gpu} is {format_bytes(args.gpu)}; write it like 12GB.")
        defaults = build_parser().parse_args([])
        given = [name for name in CHOSEN if getattr(args, name) != getattr(defaults, name)]
        if given:
            raise UserError(f"--gpu chooses {', '.join(f'--{name}' for name in given)} itself; leave it out.")
    for name in ("shared_by", "training_resolution", "validation_resolution"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 2**14:
            raise UserError(f"--{name} is {value}; give 1 to {2**14}.")
    quantizes = args.quantization != "none" or not QUANTIZING_OPTIONS.isdisjoint(args.memory_options or ())
    if args.shared_by > 1 and quantizes:
        raise UserError(f"--shared_by {args.shared_by}: quantised weights cannot be divided; keep them as they are.")
    resolution = DEFAULT_SIDE if args.resolution is None else args.resolution
    if args.training_resolution is not None and args.training_resolution > resolution:
        raise UserError(
            f"--training_resolution {args.training_resolution} is above --resolution {resolution}; lower it."
        )


def training_words(args: argparse.Namespace, model: Path, output: Path, *, plain: bool = False) -> list[str]:
    """The command line of the training script whose plan is wanted.

    Args:
        args: The flags.
        model: The preset's folder.
        output: A folder that is not used, because nothing is trained.
        plain: Whether plain LoRA at the full resolution is planned, on the same terms.
    """
    words = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(output), "--plan_only"]
    # How many photos there are changes nothing about a step.
    words += ["--instance_data_dir", str(embedded_photos()), "--instance_prompt", "a photo", "--cache_latents"]
    values = {name: getattr(args, name) for name in TRAINING_FLAGS}
    if plain:
        values |= dict.fromkeys(NOT_PLAIN) | {"skip_blocks": "none", "patch_sampling": "none"}
    elif args.training_resolution is not None:
        whole = args.training_resolution == args.resolution
        values |= {"patch_sampling": "none" if whole else "dynamic"}
        values |= {} if whole else {"min_patch_size": args.training_resolution}
    if args.validation_resolution is not None and not plain:
        values |= {"validation_prompt": "a photo", "num_validation_images": 1}
    for name, value in values.items():
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def prepare(args: argparse.Namespace, words: list[str]) -> Run:
    """The run of a training command, checked as the training script checks it.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    run = replace(prepare_run(parse_args(words)), shares_weights=args.shared_by > 1)
    multiple = run.family.latent_token_size
    for name in ("training_resolution", "validation_resolution"):
        value = getattr(args, name)
        if value is not None and value % multiple:
            raise UserError(
                f"--{name} is {value}, which is not a multiple of {multiple} px; use "
                f"{max(multiple, round(value / multiple) * multiple)}."
            )
    return run


@contextlib.contextmanager
def prepared(args: argparse.Namespace, preset: str) -> Iterator[tuple[str, Run, dict[str, Any], torch.dtype]]:
    """A preset's name, its run, what a step of plain LoRA needs on the same terms, and the dtype of frozen weights."""
    with tempfile.TemporaryDirectory(prefix="blockskip_plan_") as scratch:
        model, output, side = Path(scratch, "model"), Path(scratch, "output"), args.validation_resolution
        name = write_preset(preset, model, {"height": side, "width": side} if side else None)
        run = prepare(args, training_words(args, model, output))
        dtype = planned_dtype(run.settings)
        comparison = prepare_run(parse_args(training_words(args, model, output, plain=True)))
        plain = _train(plan_run(replace(plan_request(comparison, dtype, 1, args.device), text_encoders=())))
        yield name, run, plain, dtype


def recipe_resolution(preset: str) -> int:
    """Side in pixels that the preset's recipe trains at."""
    return preset_facts(preset).get("resolution", DEFAULT_RESOLUTION)


@contextlib.contextmanager
def fits_of(args: argparse.Namespace, preset: str) -> Iterator[Fits]:
    """Settings of a preset that fit GPUs, at the resolution that the flag names or its recipe has."""
    resolution = recipe_resolution(preset) if args.resolution is None else args.resolution
    changes = {"resolution": resolution, "validation_resolution": args.validation_resolution or DEFAULT_RESOLUTION}
    with prepared(argparse.Namespace(**{**vars(args), **changes}), preset) as (_, run, plain, dtype):
        yield Fits(preset, run, plain["tflops_per_step"], dtype, args.device)


def rank(args: argparse.Namespace) -> None:
    """Print what fits a GPU, preset by preset."""
    names, fits = [args.preset] if args.preset else preset_names(), []
    if args.preset is None:
        print(f"Planning {len(names)} models, a minute or so for each; --preset NAME plans one.", file=sys.stderr)
    for preset in listed(names, "Planning", "preset", total=len(names)):
        with fits_of(args, preset) as settings:
            fits.append((preset, settings.closest(args.gpu), settings.fastest(args.gpu)))
    print(
        f"What fits {args.gpu}, of which {USABLE:.0%} are planned with, simulated, a CUDA context included. Compute\n"
        "is the transformer's in a step and for its record, without attention, against plain LoRA at the same\n"
        "resolution; reported is what the paper says of subject fidelity, against plain LoRA.\n"
    )
    print(format_fits(fits))


@returns_exit_code
def main(argv: list[str] | None = None) -> None:
    """Run the script; the exit code is 0, or 2 with one line on stderr for settings that cannot work."""
    args = build_parser().parse_args(argv)
    # What a run would warn of is about photos and flags that only stand in here.
    with errors_only("blockskip_hooks"), errors_in_one_line(SETTINGS_ERROR):
        check_args(args)
        if args.gpu is not None:
            rank(args)
            return
        if args.resolution is None:
            args.resolution = DEFAULT_SIDE
        with prepared(args, args.preset) as (name, run, plain, dtype):
            _, plan = make_plan(run, dtype, args.shared_by, args.device)
    if args.json:
        print(json.dumps({**plan, "model": name, "plain_lora": plain}, indent=2))
        return
    train, checkpointed = _train(plan), ", checkpointed too" if args.gradient_checkpointing else ""
    text = format_plan(plan, model=f"{name} (architecture only, no model files)") + (
        f"\nCompare  plain LoRA at {args.resolution} px{checkpointed}: {format_bytes(plain['peak_device_bytes'])} and "
        f"{plain['tflops_per_step']:.3g} TFLOP per step; this plan, records left out, trains in "
        f"{train['peak_device_bytes'] / plain['peak_device_bytes']:.0%} of the memory with "
        f"{train['tflops_per_step'] / plain['tflops_per_step']:.0%} of the TFLOP"
    )
    print(fit_lines(text))


def _train(plan: dict[str, Any]) -> dict[str, Any]:
    return next(stage for stage in plan["stages"] if stage["name"] == "train")


if __name__ == "__main__":
    sys.exit(main())
