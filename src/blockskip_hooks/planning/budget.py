"""``--memory_budget``: the settings that fit with the least harm, by simulation alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..selection import Selection
from ..utils.errors import UserError
from ..utils.formatting import format_bytes


PlanFor = Callable[[Selection, tuple[str, ...]], dict[str, Any]]
"""The plan of a run that skips these blocks and uses these options."""

MEMORY_OPTIONS: dict[str, tuple[str, Any]] = {
    "checkpointing": ("gradient_checkpointing", True),
    "8bit_adam": ("use_8bit_adam", True),
    "int8": ("quantization", "int8"),
    "nf4": ("quantization", "nf4"),
}
"""What ``--memory_budget`` may switch on beside skipping: a flag and its value by the name of the option."""

QUANTIZING_OPTIONS = frozenset(name for name, (flag, _) in MEMORY_OPTIONS.items() if flag == "quantization")

LARGEST_RATIO = 0.5
"""Beyond half of the blocks the method is not measured; more are skipped only when nothing else is left."""


@dataclass(frozen=True)
class Choice:
    """What was chosen to fit a budget.

    Attributes:
        selection: Blocks to skip.
        options: Names of the options used.
        plan: The plan with them.
        reason: Why, in one line.
    """

    selection: Selection
    options: tuple[str, ...]
    plan: dict[str, Any]
    reason: str


def largest_stage(plan: dict[str, Any]) -> dict[str, Any]:
    """The stage of a plan that needs the most memory."""
    return max(plan["stages"], key=lambda stage: stage["peak_device_bytes"])


def fit_budget(plan_for: PlanFor, selections: Sequence[Selection], budget: int, options: Sequence[str] = ()) -> Choice:
    """Find the first selection with which every stage fits in ``budget`` bytes.

    Up to half of the blocks may be skipped before the first option is used, then half again with it, and so on; when
    all options are in use, any number of blocks.

    Args:
        plan_for: Makes plans.
        selections: Which blocks may be skipped, from none on: the least harmful ones first, each freeing more memory
            than those before it.
        budget: Bytes.
        options: Names of allowed options, in the order in which they are to be tried; each is used along with those
            before it.

    Raises:
        ValueError: if nothing fits, with the least that would.
    """
    least: dict[str, Any] | None = None
    for used, allowed in _attempts(selections, options):
        plans: dict[int, dict[str, Any]] = {}

        def fits(
            position: int,
            used: tuple[str, ...] = used,
            allowed: Sequence[Selection] = allowed,
            plans: dict[int, Any] = plans,
        ) -> bool:
            if position not in plans:
                plans[position] = plan_for(allowed[position], used)
            return largest_stage(plans[position])["peak_device_bytes"] <= budget

        most = len(allowed) - 1
        if not fits(most):
            least = min((p for p in (least, plans[most]) if p), key=lambda p: largest_stage(p)["peak_device_bytes"])
            continue
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        fits(low)
        return Choice(allowed[low], used, plans[low], _reason(allowed[low], budget, used, plans[low]))
    assert least is not None
    stage = largest_stage(least)
    raise UserError(
        f"--memory_budget {format_bytes(budget)} is less than any setting needs: the least is "
        f"{format_bytes(stage['peak_device_bytes'])}, in stage {stage['name']} with "
        f"{least['skip']['leading'] + least['skip']['trailing']} of {selections[0].blocks} blocks skipped"
        + (f" and {', '.join(options)}" if options else "")
        + "; raise the budget, lower --resolution or --train_batch_size, or allow more --memory_options."
    )


def _attempts(
    selections: Sequence[Selection], options: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], Sequence[Selection]]]:
    """Options to use and the selections to choose from with them, from the mildest to the hardest."""
    half = [selection for selection in selections if selection.num_skipped <= LARGEST_RATIO * selection.blocks]
    for count in range(len(options) + 1):
        yield tuple(options[:count]), half
    yield tuple(options), selections


def _reason(selection: Selection, budget: int, used: tuple[str, ...], plan: dict[str, Any]) -> str:
    stage = largest_stage(plan)
    with_options = f" with {', '.join(used)}" if used else ""
    # Curves know what harms least; without them fewer blocks are less harm.
    least = "the least harmful selection" if selection.harm is not None else "the fewest skipped blocks"
    return (
        f"{least} that fits, {selection.num_skipped} of {selection.blocks} blocks{with_options}: stage "
        f"{stage['name']} needs {format_bytes(stage['peak_device_bytes'])} of {format_bytes(budget)}"
    )


__all__ = ["MEMORY_OPTIONS", "QUANTIZING_OPTIONS", "Choice", "fit_budget", "largest_stage"]
