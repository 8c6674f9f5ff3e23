"""What fits a GPU: of a model the setting that is closest to plain LoRA, and the one that computes least."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..selection import Selection
from ..utils.errors import UserError
from .budget import BudgetSteps, Choice, PlanFor, fit_budget
from .options import MEMORY_OPTIONS
from .plan import largest_stage


USABLE = 0.95
"""Part of a GPU's memory that a run may take, context and allocator's gaps included: a display needs the rest."""

MOST_SKIPPED = 0.3
"""Part of the blocks that the setting which computes least may skip: the least that the paper reports on."""


def known_fidelity(reported: Mapping[str, str], choice: Choice) -> str | None:
    """What a preset says that the paper reports of a setting, or ``None``."""
    if quantization_of(choice):
        return None
    skipped = f"{choice.selection.leading},{choice.selection.trailing}"
    patches = " with patches" if "patches" in choice.options else ""
    return reported.get(f"{skipped}{patches}")


def quantization_of(choice: Choice) -> str | None:
    """How kept blocks are held, or ``None`` for weights as they are; of two options the later holds."""
    return next((option for option in reversed(choice.options) if option in ("int8", "nf4")), None)


def tflops_per_sample(plan: dict[str, Any]) -> float:
    """TFLOP of the transformer in a training step and for the records that it reads, by sample; without attention."""
    stages = {stage["name"]: stage for stage in plan["stages"]}
    parts = [stages[name] for name in ("precompute", "train") if name in stages]
    return sum((part["tflops_per_step"] - part["vae_tflops"]) / part["batch_size"] for part in parts)


def closest_to_plain(plan_for: PlanFor, steps: BudgetSteps, budget: int) -> Choice | None:
    """The setting that a budget asks for, see :func:`~blockskip_hooks.planning.budget.fit_budget`; or ``None``."""
    try:
        return fit_budget(plan_for, steps, budget)
    except UserError:
        return None


def least_compute(plan_for: PlanFor, selections: Sequence[Selection], budget: int) -> Choice | None:
    """The setting with the least compute that fits; ``None`` where none does.

    Kept blocks are quantised only where nothing else fits: turning weights back takes time that no TFLOP tells.

    Args:
        plan_for: Makes plans.
        selections: What may be skipped.
        budget: Bytes.
    """
    for options in itertools.product(((), ("int8",)), ((), ("checkpointing",))):
        used = tuple(name for name in MEMORY_OPTIONS if name in (*itertools.chain(*options), "8bit_adam", "patches"))
        choices = [Choice(pair, used, plan_for(pair, used), "the least compute that fits") for pair in selections]
        fitting = [choice for choice in choices if largest_stage(choice.plan)["needed_bytes"] <= budget]
        if fitting:
            return min(fitting, key=lambda choice: tflops_per_sample(choice.plan))
    return None
