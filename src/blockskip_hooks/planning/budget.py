"""``--memory_budget``: the settings that fit with the least harm to the result, by simulation alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..selection import Selection
from ..utils.errors import UserError
from ..utils.formatting import format_budget, format_bytes
from .plan import largest_stage
from .selections import selections_by_bytes


if TYPE_CHECKING:
    from ..search.tables import SelectionTable


PlanFor = Callable[[Selection, tuple[str, ...]], dict[str, Any]]
"""The plan of a run that skips these blocks and uses these options."""

LARGEST_RATIO = 0.5
"""Beyond half of the blocks the method is not measured; more are skipped only when nothing else is left."""
LEADING_FIRST = "budget: leading blocks first, because their residuals are exact"


@dataclass(frozen=True)
class BudgetSteps:
    """What may be done to fit a budget, from what costs the result least on. Each step keeps those before it.

    Attributes:
        selections: Which blocks may be skipped, the least harmful ones first, each freeing more memory than those
            before it.
        options: Names of options that cost the result less than skipping blocks does.
        last_options: Names of options that cost it more; they are used once half of the blocks are skipped.
    """

    selections: Sequence[Selection]
    options: Sequence[str] = ()
    last_options: Sequence[str] = ()

    def __iter__(self) -> Iterator[tuple[Sequence[Selection], tuple[str, ...]]]:
        """Options of a step, and the selections to choose from with them."""
        half = [s for s in self.selections if s.num_skipped <= LARGEST_RATIO * s.blocks] or list(self.selections)[:1]
        for count in range(len(self.options) + 1):
            yield half[:1], tuple(self.options[:count])
        yield half[1:], tuple(self.options)
        for count in range(1, len(self.last_options) + 1):
            yield half[-1:], (*self.options, *self.last_options[:count])
        yield self.selections[len(half) :], (*self.options, *self.last_options)


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


def selections_for_budget(block_bytes: Sequence[int], table: SelectionTable | None = None) -> list[Selection]:
    """Which blocks may be skipped to save memory, from none on, the least harmful ones first.

    By a table that was measured; otherwise leading blocks first, up to half of all, and then trailing ones too.

    Args:
        block_bytes: Bytes of each block's parameters.
        table: What is known of the model.
    """
    if table is not None and table.trade_off(block_bytes):
        return [selection for selection, _ in selections_by_bytes(block_bytes, table)]
    num_blocks = len(block_bytes)
    most = int(LARGEST_RATIO * num_blocks)
    pairs = [(min(skipped, most), max(skipped - most, 0)) for skipped in range(1, num_blocks)]
    none = Selection(num_blocks, 0, 0, "flag")
    return [none, *(Selection(num_blocks, *pair, "rule", LEADING_FIRST) for pair in pairs)]


def fit_budget(plan_for: PlanFor, steps: BudgetSteps, budget: int) -> Choice:
    """Find the first step with which every stage fits in ``budget`` bytes.

    Steps are always tried in the same order, so a larger budget never skips more blocks or uses more options.

    Args:
        plan_for: Makes plans.
        steps: What may be done.
        budget: Bytes.

    Raises:
        ValueError: if nothing fits, with the least that would.
    """
    least: dict[str, Any] | None = None
    for selections, options in steps:
        found = _first_that_fits(plan_for, selections, options, budget)
        if found is None:
            continue
        selection, plan = found
        if _peak(plan) <= budget:
            return Choice(selection, options, plan, _reason(selection, budget, options, plan))
        least = plan if least is None or _peak(plan) < _peak(least) else least
    assert least is not None
    raise _nothing_fits(steps, least, budget)


def _nothing_fits(steps: BudgetSteps, least: dict[str, Any], budget: int) -> UserError:
    stage, skip = largest_stage(least), least["skip"]
    used, needed = ", ".join((*steps.options, *steps.last_options)), format_bytes(stage["needed_bytes"])
    if len(steps.selections) == 1:
        return UserError(
            f"--skip_blocks {skip['leading']},{skip['trailing']} needs {needed} in stage {stage['name']}"
            f"{used and f' with {used}'}, more than --memory_budget {format_budget(budget)}; use --skip_blocks auto."
        )
    return UserError(
        f"--memory_budget {format_budget(budget)} is less than any setting needs: the least is {needed}, in stage "
        f"{stage['name']} with {skip['leading'] + skip['trailing']} of {steps.selections[0].blocks} blocks skipped"
        f"{used and f' and {used}'}; raise the budget, lower --resolution or --train_batch_size, or allow more "
        "--memory_options."
    )


def _first_that_fits(
    plan_for: PlanFor, selections: Sequence[Selection], options: tuple[str, ...], budget: int
) -> tuple[Selection, dict[str, Any]] | None:
    """The first selection that fits, and its plan; the last one where none fits, and ``None`` where there is none."""
    if not selections:
        return None
    plans: dict[int, dict[str, Any]] = {}

    def fits(position: int) -> bool:
        if position not in plans:
            plans[position] = plan_for(selections[position], options)
        return _peak(plans[position]) <= budget

    low, high = 0, len(selections) - 1
    if fits(high):
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        fits(low)
    else:
        low = high
    return selections[low], plans[low]


def _peak(plan: dict[str, Any]) -> int:
    return largest_stage(plan)["needed_bytes"]


def _reason(selection: Selection, budget: int, used: tuple[str, ...], plan: dict[str, Any]) -> str:
    stage = largest_stage(plan)
    with_options = f" with {', '.join(used)}" if used else ""
    # Curves know what harms least; without them fewer blocks are less harm.
    least = "the least harmful selection" if selection.harm is not None else "the fewest skipped blocks"
    return (
        f"{least} that fits, {selection.num_skipped} of {selection.blocks} blocks{with_options}: stage "
        f"{stage['name']} needs {format_bytes(stage['needed_bytes'])} of {format_bytes(budget)}"
    )
