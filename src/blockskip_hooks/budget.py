"""``--memory_budget``: the settings with the fewest skipped blocks that fit, by simulation alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .monitor import format_bytes


PlanFor = Callable[[int, tuple[str, ...]], dict[str, Any]]
"""The plan of a run that skips so many blocks and uses these options."""

LARGEST_RATIO = 0.5
"""Beyond half of the blocks the method is not measured; more are skipped only when nothing else is left."""


@dataclass(frozen=True)
class Choice:
    """What was chosen to fit a budget.

    Attributes:
        num_skipped: Blocks to skip.
        options: Names of the options used.
        plan: The plan with them.
        reason: Why, in one line.
    """

    num_skipped: int
    options: tuple[str, ...]
    plan: dict[str, Any]
    reason: str


def largest_stage(plan: dict[str, Any]) -> dict[str, Any]:
    """The stage of a plan that needs the most memory."""
    return max(plan["stages"], key=lambda stage: stage["peak_device_bytes"])


def fit_budget(plan_for: PlanFor, num_blocks: int, budget: int, options: Sequence[str] = ()) -> Choice:
    """Find the smallest number of skipped blocks with which every stage fits in ``budget`` bytes.

    Up to half of the blocks may be skipped before the first option is used, then half again with it, and so on; when
    all options are in use, any number of blocks.

    Args:
        plan_for: Makes plans; memory must not grow with the number of skipped blocks.
        num_blocks: N.
        budget: Bytes.
        options: Names of allowed options, in the order in which they are to be tried; each is used along with those
            before it.

    Raises:
        ValueError: if nothing fits, with the least that would.
    """
    least: dict[str, Any] | None = None
    for used, most in _attempts(num_blocks, options):
        plans: dict[int, dict[str, Any]] = {}

        def fits(num_skipped: int, used: tuple[str, ...] = used, plans: dict[int, Any] = plans) -> bool:
            if num_skipped not in plans:
                plans[num_skipped] = plan_for(num_skipped, used)
            return largest_stage(plans[num_skipped])["peak_device_bytes"] <= budget

        if not fits(most):
            least = min((p for p in (least, plans[most]) if p), key=lambda p: largest_stage(p)["peak_device_bytes"])
            continue
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        fits(low)
        return Choice(low, used, plans[low], _reason(low, num_blocks, budget, used, plans[low]))
    assert least is not None
    stage = largest_stage(least)
    raise ValueError(
        f"--memory_budget {format_bytes(budget)} is less than any setting needs: the least is "
        f"{format_bytes(stage['peak_device_bytes'])}, in stage {stage['name']} with "
        f"{least['skip']['leading'] + least['skip']['trailing']} of {num_blocks} blocks skipped"
        + (f" and {', '.join(options)}" if options else "")
        + "; raise the budget, lower --resolution or --train_batch_size, or allow more --memory_options."
    )


def _attempts(num_blocks: int, options: Sequence[str]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Options to use and the most blocks to skip with them, from the mildest to the hardest."""
    half = min(int(LARGEST_RATIO * num_blocks), num_blocks - 1)
    for count in range(len(options) + 1):
        yield tuple(options[:count]), half
    yield tuple(options), num_blocks - 1


def _reason(num_skipped: int, num_blocks: int, budget: int, used: tuple[str, ...], plan: dict[str, Any]) -> str:
    stage = largest_stage(plan)
    with_options = f" with {', '.join(used)}" if used else ""
    blocks = f"the fewest skipped blocks that fit, {num_skipped} of {num_blocks}{with_options}"
    return (
        f"{blocks}: stage {stage['name']} needs {format_bytes(stage['peak_device_bytes'])} of {format_bytes(budget)}"
    )


__all__ = ["Choice", "fit_budget", "largest_stage"]
