"""What of a run depends on the blocks it skips: chosen by flags, tables or the rule, and checked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from ..blocks import block_bytes, list_blocks
from ..config import BlockSkipConfig, PatchMode, PatchPositions, PatchSamplingConfig
from ..data.buckets import standard_buckets
from ..families import Family
from ..loading.component_config import load_config
from ..loading.models import empty_model
from ..lora import lora_targets
from ..planning.selections import select_by_bytes
from ..search.tables import SelectionTable, find_table, read_table
from ..selection import Selection, select_blocks
from ..transformer import DiTBlockSkipTransformer
from ..utils.accelerator import PRECISIONS
from ..utils.digests import folder_digest
from ..utils.errors import UserError
from .settings import TrainSettings


def choose_blocks(
    settings: TrainSettings, family: Family, model_name: str, table: SelectionTable | None = None
) -> dict[str, Any]:
    """Everything about a run that depends on which blocks are skipped, by field of ``Run``.

    Args:
        settings: The flags.
        family: The model's family.
        model_name: What the user called the model.
        table: A selection table to go by; by default the flag's, the cache's or the package's.

    Raises:
        UserError: one line that names the flag and the fix.
        OSError: if the transformer's config cannot be read.
    """
    transformer_config = load_config(family.model_path / "transformer")
    transformer = empty_model(transformer_config, family.transformer_class(transformer_config))
    if table is None and settings.looks_up_blocks:
        names = (model_name, transformer_config.get("_name_or_path"))
        table = _look_up(settings, family, names, len(list_blocks(transformer, family.block_stacks)))
    selection = _select(settings, transformer, family, table)
    config = BlockSkipConfig(leading=selection.leading, trailing=selection.trailing, residuals=settings.residuals)
    skeleton = DiTBlockSkipTransformer(transformer, config, family.block_stacks)
    layers = settings.lora_layers or family.lora_layers
    return {
        "skeleton": skeleton,
        "selection": selection,
        "table": table,
        "config": config,
        "patch": _patch_sampling(settings, family, skips=config.num_skipped > 0),
        "targets": lora_targets(skeleton, layers, family.text_stream_layers, _lora_blocks(settings, skeleton)),
    }


def _lora_blocks(settings: TrainSettings, model: DiTBlockSkipTransformer) -> list[str] | None:
    """Names of the blocks that ``--lora_blocks`` lists by their number in execution order."""
    if settings.lora_blocks is None:
        return None
    blocks = model.spans.leading + model.spans.kept + model.spans.trailing
    kept = {block.index for block in model.spans.kept}
    names = []
    for number in settings.lora_blocks:
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(blocks):
            raise UserError(
                f"--lora_blocks '{','.join(settings.lora_blocks)}': '{number}' is no block; the {len(blocks)} blocks "
                f"are numbered 0 to {len(blocks) - 1}."
            )
        if int(number) not in kept:
            raise UserError(
                f"--lora_blocks {number} is a skipped block; name kept ones ({min(kept)} to {max(kept)}) or change "
                "--skip_blocks."
            )
        names.append(blocks[int(number)].name)
    return names


def _look_up(
    settings: TrainSettings, family: Family, names: tuple[str | None, ...], num_blocks: int
) -> SelectionTable | None:
    """The table that the flags ask for.

    Raises:
        UserError: if it is about another model, or not the measured one that ``--strict_table`` insists on.
    """
    if settings.selection_table is not None:
        table: SelectionTable | None = read_table(Path(settings.selection_table))
        assert table is not None
        if table.num_blocks != num_blocks:
            raise UserError(
                f"--selection_table {settings.selection_table} is about {table.model} with {table.num_blocks} blocks, "
                f"but {names[0]} has {num_blocks}; name another, or leave it out."
            )
    else:
        table = find_table(num_blocks, names, folder_digest(family.model_path / "transformer"))
    if settings.strict_table and (table is None or table.source != "measured"):
        found = "no table knows" if table is None else f"the table of {table.model} was {table.source} for"
        raise UserError(
            f"--strict_table: {found} {names[0]}, nothing was measured; run blockskip select on it, or leave "
            "--strict_table out."
        )
    return table


def _select(
    settings: TrainSettings, transformer: torch.nn.Module, family: Family, table: SelectionTable | None
) -> Selection:
    sizes = block_bytes(list_blocks(transformer, family.block_stacks), planned_dtype(settings))
    if settings.skip_budget is not None:
        return select_by_bytes(settings.skip_budget, sizes, table)
    return select_blocks(settings.skip_blocks, settings.skip_ratio, len(sizes), table)


def planned_dtype(settings: TrainSettings) -> torch.dtype:
    """Dtype that frozen weights will have, before there is an accelerator to ask."""
    precision = settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return PRECISIONS.get(precision, torch.float32)


def _patch_sampling(settings: TrainSettings, family: Family, skips: bool) -> PatchSamplingConfig:
    mode = settings.patch_sampling
    patch_mode: PatchMode = ("dynamic" if skips else "none") if mode == "auto" else mode
    multiple = family.latent_token_size
    if settings.resolution % multiple:
        raise UserError(
            f"--resolution is {settings.resolution}, which is not a multiple of this model's latent token size "
            f"({multiple} px); use {max(multiple, round(settings.resolution / multiple) * multiple)}."
        )
    largest = settings.max_patch_size or settings.resolution
    # Half of the resolution may miss the grid; the nearest size on it is meant.
    half = max(multiple, round(settings.resolution / 2 / multiple) * multiple)
    smallest = settings.min_patch_size or min(half, largest)
    buckets: tuple[tuple[int, int], ...] = ()
    if settings.aspect_ratio_buckets:
        buckets = settings.aspect_ratio_buckets
    elif settings.use_aspect_ratio_buckets:
        buckets = standard_buckets(largest, multiple)
    # A whole crop has one place, whatever the flag says.
    positions: PatchPositions = "patch" if patch_mode == "none" else settings.patch_positions
    if positions == "photo" and not family.places_patches:
        raise UserError(f"--patch_positions photo is not available for {family.name}; give --patch_positions patch.")
    return PatchSamplingConfig(
        mode=patch_mode,
        min_size=smallest,
        max_size=largest,
        multiple=multiple,
        buckets=buckets,
        positions=positions,
    )
