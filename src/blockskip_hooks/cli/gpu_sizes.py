"""What fits GPUs: settings of models that are known by their architecture alone, made and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..planning.budget import BudgetSteps, Choice, selections_for_budget
from ..planning.devices import DeviceType
from ..planning.options import LAST_MEMORY_OPTIONS, MEMORY_OPTIONS
from ..planning.plan import largest_stage
from ..planning.presets import preset_facts
from ..planning.ranking import (
    MOST_SKIPPED,
    USABLE,
    closest_to_plain,
    known_fidelity,
    least_compute,
    quantization_of,
    tflops_per_sample,
)
from ..selection import Selection
from ..training.run import Run
from ..utils.formatting import format_bytes
from .run_plan import plan_for


@dataclass(frozen=True)
class Fit:
    """A setting of a preset that fits a GPU.

    Attributes:
        resolution: Side in pixels of the largest patch.
        choice: Blocks, options and plan.
        compute: Of a step and its record, against plain LoRA at this resolution.
        reported: What the preset says of fidelity.
    """

    resolution: int
    choice: Choice
    compute: float
    reported: Mapping[str, str] = field(default_factory=dict)

    @property
    def held(self) -> str:
        """How kept blocks are held."""
        return quantization_of(self.choice) or "bf16"

    def cells(self) -> tuple[str, ...]:
        """What it is, for a table."""
        pair, patch, stage = self.choice.selection, self.choice.plan["patch"], largest_stage(self.choice.plan)
        share = f"{pair.leading},{pair.trailing} ({pair.num_skipped / pair.blocks:.0%})"
        further = [name for name in self.choice.options if name in ("checkpointing", "8bit_adam")]
        return (
            share if pair.num_skipped else "none",
            self.held,
            " ".join(further) or "–",
            f"{patch['min']}-{patch['max']} px" if patch["mode"] != "none" else f"{patch['max']} px",
            f"{format_bytes(stage['needed_bytes'])} ({stage['name']})",
            f"{self.compute:.0%}",
            known_fidelity(self.reported, self.choice) or "–",
        )


CELLS = ("skipped", "kept blocks", "options", "patches", "peak", "compute", "reported")
"""Names of what :meth:`Fit.cells` returns."""


class Fits:
    """The settings of one preset that fit GPUs; each plan is made once, for GPUs of all sizes.

    Args:
        preset: The preset's name.
        run: A run of it that skips blocks by ``auto``.
        plain: TFLOP per step of plain LoRA at its resolution.
        dtype: Dtype of frozen weights.
        device: Whose rules decide the memory.
    """

    def __init__(self, preset: str, run: Run, plain: float, dtype: torch.dtype, device: DeviceType = "cuda") -> None:
        self._run, self._plain, self._dtype, self._device = run, plain, dtype, device
        self._reported = preset_facts(preset).get("reported", {})
        self._plans: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._sizes = run.block_bytes(dtype)

    def closest(self, gpu_bytes: int) -> Fit | None:
        """The one that the planner chooses for a budget; ``None`` if nothing fits."""
        steps = BudgetSteps(
            selections=selections_for_budget(self._sizes, self._run.table),
            options=[name for name in MEMORY_OPTIONS if name not in LAST_MEMORY_OPTIONS],
            last_options=LAST_MEMORY_OPTIONS,
        )
        return self._fit(closest_to_plain(self._plan_for, steps, int(USABLE * gpu_bytes)))

    def fastest(self, gpu_bytes: int) -> Fit | None:
        """The one with the least compute among those that skip few blocks; ``None`` if none of these fits."""
        blocks = len(self._sizes)
        # A leading span's records are exact, and are never made again; a trailing one computes no less.
        pairs = [Selection(blocks, leading, 0, "flag") for leading in (0, int(MOST_SKIPPED * blocks))]
        return self._fit(least_compute(self._plan_for, pairs, int(USABLE * gpu_bytes)))

    def _plan_for(self, selection: Selection, options: tuple[str, ...]) -> dict[str, Any]:
        key = (selection.leading, selection.trailing, *options)
        if key not in self._plans:
            # The base run samples patches where blocks are skipped; here they are an option of their own.
            flags = {"patch_sampling": "none", **dict(MEMORY_OPTIONS[name] for name in options)}
            self._plans[key] = plan_for(self._run.skipping(selection, flags), self._dtype, 1, self._device)
        return self._plans[key]

    def _fit(self, choice: Choice | None) -> Fit | None:
        if choice is None:
            return None
        compute = tflops_per_sample(choice.plan) / self._plain
        return Fit(self._run.settings.resolution, choice, compute, self._reported)


def format_fits(fits: Sequence[tuple[str, Fit | None, Fit | None]]) -> str:
    """A table of presets' closest and fastest settings, the least changed ones first.

    Args:
        fits: Names of presets, with both settings.
    """

    def changed(entry: tuple[str, Fit | None, Fit | None]) -> tuple[float, int]:
        if entry[1] is None:
            return 1.0, 0
        choice = entry[1].choice
        return choice.selection.num_skipped / choice.selection.blocks, len(choice.options)

    rows: list[Sequence[str]] = [("model", "setting", *CELLS)]
    for name, closest, fastest in sorted(fits, key=changed):
        if closest is None:
            rows.append((name, "nothing fits", *[""] * len(CELLS)))
        for kind, fit in (("closest", closest), ("fastest", fastest)):
            if fit is not None:
                rows.append((name, kind, *fit.cells()))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
