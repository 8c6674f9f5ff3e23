"""Flags of the paper's method: which blocks are skipped, their records, and the patches that are trained on."""

from __future__ import annotations

import argparse
from typing import get_args

from ...config import PatchMode, ResidualMode
from ...planning.options import MEMORY_OPTIONS
from ...residuals.dtype import ResidualDtype
from ...utils.files import expand_home
from .types import SIZE, argument_type, parse_cache, skip_blocks_text


def add_block_skipping_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("block skipping").add_argument
    flag(
        "--skip_blocks",
        type=argument_type(skip_blocks_text),
        default="none",
        help="Blocks to skip: none, auto, N in all, or n,m (leading,trailing).",
    )
    flag("--skip_ratio", type=float, default=0.3, help="Part of all blocks, 0 to 1, that --skip_blocks auto skips.")
    flag(
        "--skip_budget",
        type=SIZE,
        help="Bytes of parameters that --skip_blocks auto frees instead, like 10GiB; default: --skip_ratio decides.",
    )
    flag(
        "--selection_table",
        type=expand_home,
        help="Table that says which blocks to skip, from select_blocks.py; default: what is known.",
    )
    flag("--strict_table", action="store_true", help="Refuse to choose blocks by anything that was not measured.")
    flag(
        "--residuals",
        choices=get_args(ResidualMode),
        default="precomputed",
        help="What stands in for skipped blocks: records made before training, a forward in every step, or nothing.",
    )
    flag(
        "--keep_modulation",
        action="store_true",
        help="Keep the kept blocks' modulation layers in memory; by default their outputs are part of the records.",
    )
    flag(
        "--residual_dtype",
        choices=get_args(ResidualDtype),
        default="auto",
        help="Number format of the records: that of the hidden states, or float8, which halves the disk.",
    )
    flag(
        "--residual_dir",
        type=expand_home,
        help="Folder of the residual records, kept afterwards; default: inside --output_dir, deleted at the end.",
    )
    flag(
        "--residual_budget",
        type=SIZE,
        help="Bytes of disk the records may fill at a time, like 8GB; fewer are then made per stretch. "
        "Default: 16GB, or half of what is free.",
    )
    flag("--stretch_steps", type=int, help="Steps whose records are made at a time; default: as many as fit.")
    flag("--record_repeats", type=int, default=1, help="Times each record is trained on; 2 halves the precompute.")
    flag(
        "--refresh_residuals",
        action=argparse.BooleanOptionalAction,
        help="Make each stretch's records with the LoRA learnt so far; without --stretch_steps, in ten stretches. "
        "Default: where trailing blocks are skipped, unless --residual_dir keeps the records for other runs.",
    )
    flag("--precompute_batch_size", type=int, help="Samples per forward when making records; default: what fits.")
    flag(
        "--stream_cache",
        type=argument_type(parse_cache),
        default="auto",
        help="Host memory that skipped blocks stay in once read: a number of bytes, none, or auto: half of what is "
        "free, beside an accelerator.",
    )
    flag("--overwrite_residuals", action="store_true", help="Replace records that another run left.")
    flag(
        "--memory_budget",
        type=SIZE,
        help="Bytes of memory that every stage must fit in, like 12GiB; chooses how many blocks to skip. "
        "Default: no limit.",
    )
    flag(
        "--memory_options",
        nargs="+",
        default=[],
        help=f"What --memory_budget may use beside skipping, in this order: {', '.join(MEMORY_OPTIONS)}. "
        "Default: none.",
    )
    flag("--plan_only", action="store_true", help="Print the plan and its memory and disk needs, write it, and stop.")


def add_patch_sampling_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("patch sampling").add_argument
    flag(
        "--patch_sampling",
        choices=("auto", *get_args(PatchMode)),
        default="auto",
        help="How large a patch each timestep trains on; auto is dynamic when blocks are skipped, else none.",
    )
    flag(
        "--min_patch_size",
        type=int,
        help="Smallest patch in pixels, and the size trained at; default: half of --resolution.",
    )
    flag("--max_patch_size", type=int, help="Largest patch in pixels; default: --resolution.")
