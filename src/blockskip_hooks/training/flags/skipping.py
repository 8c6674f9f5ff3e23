"""Flags of the paper's method: which blocks are skipped, their records, and the patches that are trained on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ...config import PatchMode, PatchPositions, ResidualMode
from ...planning.options import MEMORY_OPTIONS
from ...residuals.dtype import ResidualDtype
from ...utils.files import expand_home
from .types import SIZE, argument_type, flag, parse_cache, skip_blocks_text


@dataclass(frozen=True, kw_only=True)
class BlockSkippingFlags:
    """Which blocks are skipped, and the records that stand in for them."""

    title: ClassVar[str] = "block skipping"
    skip_blocks: str = flag(
        "none",
        "Blocks to skip: none, auto, N in all, or n,m (leading,trailing).",
        type=argument_type(skip_blocks_text),
    )
    skip_ratio: float = flag(0.3, "Part of all blocks, 0 to 1, that --skip_blocks auto skips.")
    skip_budget: int | None = flag(
        None,
        "Bytes of parameters that --skip_blocks auto frees instead, like 10GiB; default: --skip_ratio decides.",
        type=SIZE,
    )
    selection_table: str | None = flag(
        None, "Table that says which blocks to skip, from blockskip select; default: what is known.", type=expand_home
    )
    strict_table: bool = flag(False, "Refuse to choose blocks by anything that was not measured.")
    residuals: ResidualMode = flag(
        "precomputed",
        "What stands in for skipped blocks: records made before training, a forward in every step, or nothing.",
        choices=get_args(ResidualMode),
    )
    keep_modulation: bool = flag(
        False, "Keep the kept blocks' modulation layers in memory; by default their outputs are part of the records."
    )
    residual_dtype: ResidualDtype = flag(
        "auto",
        "Number format of the records: that of the hidden states, or float8, which halves the disk.",
        choices=get_args(ResidualDtype),
    )
    residual_dir: str | None = flag(
        None,
        "Folder of the residual records, kept afterwards; default: inside --output_dir, deleted at the end.",
        type=expand_home,
    )
    residual_budget: int | None = flag(
        None,
        "Bytes of disk the records may fill at a time, like 8GB; fewer are then made per stretch. Default: 16GB, "
        "or half of what is free.",
        type=SIZE,
    )
    stretch_steps: int | None = flag(
        None, "Steps whose records are made at a time; default: as many as fit.", type=int
    )
    record_repeats: int = flag(1, "Times each record is trained on; 2 halves the precompute.")
    refresh_residuals: bool | None = flag(
        None,
        "Make each stretch's records with the LoRA learnt so far; without --stretch_steps, in ten stretches. "
        "Default: where trailing blocks are skipped, unless --residual_dir keeps the records for other runs.",
        action=argparse.BooleanOptionalAction,
    )
    precompute_batch_size: int | None = flag(
        None, "Samples per forward when making records; default: what fits.", type=int
    )
    stream_cache: str | int = flag(
        "auto",
        "Host memory that skipped blocks stay in once read: a number of bytes, none, or auto: half of what is "
        "free, beside an accelerator.",
        type=argument_type(parse_cache),
    )
    overwrite_residuals: bool = flag(False, "Replace records that another run left.")
    memory_budget: int | None = flag(
        None,
        "Bytes of memory that every stage must fit in, like 12GiB; chooses how many blocks to skip. Default: no "
        "limit.",
        type=SIZE,
    )
    memory_options: Sequence[str] = flag(
        [],
        f"What --memory_budget may use beside skipping, in this order: {', '.join(MEMORY_OPTIONS)}. Default: none.",
        nargs="+",
    )
    plan_only: bool = flag(False, "Print the plan and its memory and disk needs, write it, and stop.")


@dataclass(frozen=True, kw_only=True)
class PatchSamplingFlags:
    """The patches that are trained on."""

    title: ClassVar[str] = "patch sampling"
    patch_sampling: PatchMode | Literal["auto"] = flag(
        "auto",
        "How large a patch each timestep trains on; auto is dynamic when blocks are skipped, else none.",
        choices=("auto", *get_args(PatchMode)),
    )
    min_patch_size: int | None = flag(
        None, "Smallest patch in pixels, and the size trained at; default: half of --resolution.", type=int
    )
    max_patch_size: int | None = flag(None, "Largest patch in pixels; default: --resolution.", type=int)
    patch_positions: PatchPositions = flag(
        "patch",
        "Where a patch's tokens lie: patch, as in a picture of its size (the paper); photo, half of the samples' as "
        "in the photo.",
        choices=get_args(PatchPositions),
    )
