#!/usr/bin/env python
"""What personalising a model would need, without its files: memory per stage, FLOPs and disk, all simulated.

Example:
    python plan_memory.py --preset flux.1-dev --skip_blocks 19,9 --resolution 512 --training_resolution 256
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from blockskip_hooks.blocks import block_bytes, list_blocks, split_blocks
from blockskip_hooks.cli.argument_checks import check_at_most, check_texts
from blockskip_hooks.cli.arguments import MEMORY_OPTIONS, QUANTIZING_OPTIONS, OneLineParser, parse_bytes
from blockskip_hooks.cli.errors import explain
from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.loading.quantization import METHODS, QuantizationConfig
from blockskip_hooks.planning.budget import fit_budget
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.planning.presets import Preset, load_preset, preset_names
from blockskip_hooks.planning.selections import select_by_bytes, selections_by_bytes
from blockskip_hooks.planning.simulation import empty_model
from blockskip_hooks.planning.stages import PlanRequest, plan_run
from blockskip_hooks.search.tables import find_table, read_table
from blockskip_hooks.selection import Selection, select_blocks
from blockskip_hooks.training.sharding import bytes_elsewhere
from blockskip_hooks.utils.errors import UserError
from blockskip_hooks.utils.formatting import format_bytes


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of the training script mean the same here."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag = parser.add_argument
    flag("--preset", required=True, help=f"Model: {', '.join(preset_names())}.")
    flag("--skip_blocks", default="auto", help="Blocks to skip: none, auto, N in all, or n,m (leading,trailing).")
    flag("--skip_ratio", type=float, default=0.3, help="Part of all blocks that --skip_blocks auto skips.")
    flag("--skip_budget", help="Bytes of parameters that --skip_blocks auto frees instead, like 10GiB.")
    flag("--selection_table", help="Table that says which blocks to skip, from select_blocks.py.")
    flag("--resolution", type=int, default=512, help="Largest patch in pixels.")
    flag("--training_resolution", type=int, help="Side trained at; default: half of --resolution if blocks skip.")
    flag("--rank", type=int, default=4, help="Rank of the LoRA matrices.")
    flag("--lora_layers", help="Comma-separated ends of the names of the layers to adapt, within kept blocks.")
    flag("--train_batch_size", type=int, default=1, help="Samples per step.")
    flag("--precompute_batch_size", type=int, help="Samples per precompute forward; default: what training leaves.")
    flag("--max_sequence_length", type=int, help="Tokens of a prompt; default: that of the model's family.")
    flag("--max_train_steps", type=int, default=500, help="Steps, for the disk that records take.")
    flag("--keep_modulation", action="store_true", help="Keep modulation layers in memory, as the training flag.")
    flag("--residual_dtype", choices=("auto", "float8"), default="auto", help="Number format of the records.")
    flag("--residual_budget", help="Disk the records may fill at a time, like 8GB.")
    flag("--memory_budget", help="Memory every stage must fit in, like 12GiB; auto then skips as few blocks as do it.")
    flag(
        "--memory_options",
        nargs="+",
        default=[],
        choices=tuple(MEMORY_OPTIONS),
        help="What --memory_budget may use beside skipping.",
    )
    flag("--validation_resolution", type=int, help="Side of validation images; without it there are none.")
    flag("--mixed_precision", choices=tuple(DTYPES), default="bf16", help="Dtype of the frozen weights.")
    flag("--gradient_checkpointing", action="store_true", help="Less activation memory for one more forward.")
    flag("--quantization", choices=METHODS, default="none", help="Hold kept blocks in 4 (nf4) or 8 bits (int8).")
    flag("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state.")
    flag("--shared_by", type=int, default=1, help="Processes that divide kept blocks' weights, as configs/fsdp2.yaml.")
    flag("--json", action="store_true", help="Print the plan as JSON.")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Check what needs no model.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    for name in (
        *("rank", "train_batch_size", "max_sequence_length", "max_train_steps"),
        *("precompute_batch_size", "validation_resolution", "shared_by"),
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; give 1 or more.")
    quantizes = args.quantization != "none" or not QUANTIZING_OPTIONS.isdisjoint(args.memory_options)
    if args.shared_by > 1 and quantizes:
        raise UserError(f"--shared_by {args.shared_by}: quantised weights cannot be divided; keep them as they are.")
    check_at_most(vars(args))
    check_texts(vars(args))
    if not 0 < args.skip_ratio < 1:
        raise UserError(f"--skip_ratio is {args.skip_ratio}; give a number between 0 and 1, or --skip_blocks none.")


def list_selections(args: argparse.Namespace, preset: Preset) -> tuple[Selection, list[Selection]]:
    """The blocks to skip by the flags, and all choices that ``--memory_budget`` has, mildest first.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    blocks = list_blocks(empty_model(preset.transformer_config), preset.family.block_stacks)
    sizes = block_bytes(blocks, DTYPES[args.mixed_precision])
    if args.selection_table is not None and not Path(args.selection_table).is_file():
        raise UserError(f"--selection_table {args.selection_table} is not a file; give one of select_blocks.py's.")
    file = args.selection_table
    table = read_table(Path(file)) if file is not None else find_table(len(sizes), (preset.name,), None)
    if table is not None and table.num_blocks != len(sizes):
        raise UserError(
            f"--selection_table {file} is about {table.num_blocks} blocks; {preset.name} has {len(sizes)}."
        )
    every = [selection for selection, _ in selections_by_bytes(sizes, table)]
    budget = _bytes_of(args, "skip_budget")
    if budget is None:
        return select_blocks(args.skip_blocks, args.skip_ratio, len(sizes), table), every
    if args.skip_blocks != "auto":
        raise UserError(f"--skip_budget and --skip_blocks {args.skip_blocks} both say what to skip; give auto.")
    return select_by_bytes(budget, sizes, table), every


def make_requests(args: argparse.Namespace, preset: Preset, selection: Selection) -> tuple[PlanRequest, PlanRequest]:
    """The plan asked for, and plain LoRA at the full resolution on the same terms.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    if args.max_sequence_length is None:
        args.max_sequence_length = preset.family.flags["max_sequence_length"]
    config = BlockSkipConfig(leading=selection.leading, trailing=selection.trailing)
    training_resolution = args.training_resolution
    if training_resolution is None:
        training_resolution = args.resolution // 2 if config.num_skipped else args.resolution
    _check_resolutions(
        args.resolution, training_resolution, args.validation_resolution, preset.family.latent_token_size
    )
    shared: dict[str, Any] = {"max_size": args.resolution, "multiple": preset.family.latent_token_size}
    patch = PatchSamplingConfig(
        mode="none" if training_resolution == args.resolution else "dynamic", min_size=training_resolution, **shared
    )
    layers = args.lora_layers.split(",") if args.lora_layers else None
    targets = preset.lora_targets(config, layers)
    recorded = () if args.keep_modulation else preset.recorded_layers(config, targets)
    elsewhere = None
    if args.shared_by > 1:
        transformer = empty_model(preset.transformer_config)
        kept = split_blocks(list_blocks(transformer, preset.family.block_stacks), config).kept
        elsewhere = bytes_elsewhere(transformer, kept, recorded, DTYPES[args.mixed_precision], args.shared_by)
    request = PlanRequest(
        family=preset.family,
        transformer_config=preset.transformer_config,
        config=config,
        patch=patch,
        batch_size=args.train_batch_size,
        rank=args.rank,
        lora_targets=targets,
        recorded_layers=recorded,
        quantization=QuantizationConfig.named(args.quantization),
        text_tokens=args.max_sequence_length,
        weight_dtype=DTYPES[args.mixed_precision],
        gradient_checkpointing=args.gradient_checkpointing,
        use_8bit_adam=args.use_8bit_adam,
        cache_latents=True,
        precompute_batch_size=args.precompute_batch_size,
        num_samples=args.max_train_steps * args.train_batch_size,
        residual_budget_bytes=_bytes_of(args, "residual_budget"),
        residual_dtype=args.residual_dtype,
        text_encoders=preset.text_encoders,
        bytes_elsewhere=elsewhere,
        validation_resolution=args.validation_resolution,
        memory_budget_bytes=_bytes_of(args, "memory_budget"),
        selection=selection,
    )
    plain = BlockSkipConfig()
    comparison = replace(
        request,
        config=plain,
        selection=None,
        patch=PatchSamplingConfig(mode="none", min_size=args.resolution, **shared),
        lora_targets=preset.lora_targets(plain, layers),
        recorded_layers=(),
        bytes_elsewhere=None,
        quantization=None,
        text_encoders=(),
        validation_resolution=None,
    )
    return request, comparison


def make_plan(
    args: argparse.Namespace, preset: Preset, request: PlanRequest, selections: list[Selection]
) -> dict[str, Any]:
    """The plan asked for or, with ``--memory_budget`` and ``--skip_blocks auto``, the one that fits.

    Raises:
        ValueError: if nothing that the flags allow fits.
    """
    if request.memory_budget_bytes is None or args.skip_blocks != "auto":
        return plan_run(request)
    with tqdm(desc="Fitting the memory budget", unit="plan", disable=None) as bar:

        def planned(selection: Selection, options: tuple[str, ...]) -> dict[str, Any]:
            bar.update()
            flags = dict(MEMORY_OPTIONS[option] for option in options)
            changed, _ = make_requests(argparse.Namespace(**{**vars(args), **flags}), preset, selection)
            return plan_run(changed)

        options = [name for name in MEMORY_OPTIONS if name in args.memory_options]
        choice = fit_budget(planned, selections, request.memory_budget_bytes, options)
    choice.plan["fits"]["reason"] = choice.reason
    return choice.plan


def _check_resolutions(resolution: int, training_resolution: int, validation: int | None, multiple: int) -> None:
    sizes = {"--resolution": resolution, "--training_resolution": training_resolution}
    for flag, size in {**sizes, **({} if validation is None else {"--validation_resolution": validation})}.items():
        if size <= 0 or size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise UserError(f"{flag} is {size}, which is not a positive multiple of {multiple} px; use {nearest}.")
    if training_resolution > resolution:
        raise UserError(f"--training_resolution {training_resolution} is above --resolution {resolution}; lower it.")


def _bytes_of(args: argparse.Namespace, name: str) -> int | None:
    text = getattr(args, name)
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UserError(f"--{name} is {error}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the script; the exit code is 0, or 2 with one line on stderr for settings that cannot work."""
    args = build_parser().parse_args(argv)
    try:
        check_args(args)
        preset = load_preset(args.preset)
        selection, selections = list_selections(args, preset)
        request, comparison = make_requests(args, preset, selection)
        plan, plain = make_plan(args, preset, request, selections), _train(plan_run(comparison))
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    train = _train(plan)
    if args.json:
        print(json.dumps({**plan, "model": preset.name, "plain_lora": plain}, indent=2))
        return 0
    print(format_plan(plan, model=f"{preset.name} (architecture only, no model files)"))
    print(
        f"Compare  plain LoRA at {args.resolution} px, simulated: {format_bytes(plain['peak_device_bytes'])} and "
        f"{plain['tflops_per_step']:.3g} TFLOP per step; this plan trains in "
        f"{train['peak_device_bytes'] / plain['peak_device_bytes']:.0%} of the memory with "
        f"{train['tflops_per_step'] / plain['tflops_per_step']:.0%} of the TFLOP"
    )
    return 0


def _train(plan: dict[str, Any]) -> dict[str, Any]:
    return next(stage for stage in plan["stages"] if stage["name"] == "train")


if __name__ == "__main__":
    sys.exit(main())
