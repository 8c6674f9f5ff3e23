"""Which blocks to skip: from the flag, from a selection table, or by a written rule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .config import BlockSkipConfig
from .utils.errors import UserError


if TYPE_CHECKING:
    from .search.tables import SelectionTable


Pair = tuple[int, int]
"""Leading and trailing blocks, (n, m)."""

RULE = "rule: leading = ceil(0.6 k), trailing = the rest, because leading residuals are exact"
LEADING_SHARE = 0.6


@dataclass(frozen=True)
class Selection:
    """A chosen pair of spans and where it came from.

    Attributes:
        blocks: N, the number of blocks of the transformer (a count, not the blocks).
        leading: n.
        trailing: m.
        source: ``"flag"``, ``"table"`` or ``"rule"``.
        table: Name and origin of the table, or the rule's wording.
        harm: D[n] + D[m] of the table's curves (Eq. 2), if it has some.
    """

    blocks: int
    leading: int
    trailing: int
    source: Literal["flag", "table", "rule"]
    table: str | None = None
    harm: float | None = None

    @property
    def num_skipped(self) -> int:
        """k = n + m."""
        return self.leading + self.trailing

    def as_dict(self) -> dict[str, Any]:
        """The ``skip`` part of ``plan.json`` and ``run_report.json``."""
        return {**asdict(self), "ratio": round(self.num_skipped / self.blocks, 4)}


def parse_skip_blocks(text: str, num_blocks: int | None = None) -> tuple[int, int] | int | Literal["auto", "none"]:
    """Read which blocks to skip.

    Args:
        text: ``"none"``, ``"auto"``, ``"N"`` (blocks to skip in all, divided between the ends later) or ``"n,m"``
            (leading and trailing blocks).
        num_blocks: Number of blocks of the transformer, to check that one is left; None where it is not known yet.

    Returns:
        The word, the number, or the pair.

    Raises:
        UserError: if the text has another form or no block would be left to train.
    """
    word = text.strip().lower()
    if word == "auto":
        return "auto"
    if word == "none":
        return "none"
    match = re.fullmatch(r"([0-9]{1,9})(?:\s*,\s*([0-9]{1,9}))?", word, re.ASCII)
    if match is None:
        raise UserError(
            f"select_blocks.skip_blocks is '{text}'; give none, auto, a number of blocks (10) or leading,trailing "
            "(4,6)."
        )
    if match[2] is not None:
        leading, trailing = int(match[1]), int(match[2])
        if num_blocks is not None:
            BlockSkipConfig(leading=leading, trailing=trailing).validate_for(num_blocks)
        return leading, trailing
    skipped = int(match[1])
    if num_blocks is not None and skipped >= num_blocks:
        raise UserError(
            f"select_blocks.skip_blocks {skipped} leaves none of {num_blocks} blocks to train; give at most "
            f"{num_blocks - 1}."
        )
    return skipped


def best_pairs(leading: Sequence[float], trailing: Sequence[float]) -> dict[int, Pair]:
    """The least harmful pair for each k (Eq. 2): argmin over n + m = k of ``leading[n] + trailing[m]``.

    Of equals the one with more leading blocks is chosen, because their residuals are exact.

    Args:
        leading: D of skipping the first n blocks, for n from 0 to N-1; D grows with the harm.
        trailing: D of skipping the last m blocks, for m from 0 to N-1.

    Returns:
        The pair (n, m) for each k from 1 to N-1.
    """
    pairs = {}
    for skipped in range(1, len(leading)):
        pairs[skipped] = min(
            ((n, skipped - n) for n in range(skipped, -1, -1)), key=lambda pair: leading[pair[0]] + trailing[pair[1]]
        )
    return pairs


def select_blocks(
    skip_blocks: str, skip_ratio: float, num_blocks: int, table: SelectionTable | None = None
) -> Selection:
    """Choose which blocks to skip.

    Args:
        skip_blocks: ``none``, ``auto``, a number of blocks, or ``leading,trailing``.
        skip_ratio: Share of blocks that ``auto`` skips.
        num_blocks: N.
        table: What is known of the model.

    Raises:
        UserError: if no block would be kept.
    """
    choice = parse_skip_blocks(skip_blocks, num_blocks)
    if choice == "none":
        return Selection(num_blocks, 0, 0, "flag")
    if isinstance(choice, tuple):
        return Selection(num_blocks, *choice, "flag")
    skipped = number_of_skipped(skip_ratio, num_blocks) if choice == "auto" else choice
    return split_between_ends(skipped, num_blocks, table)


def number_of_skipped(ratio: float, num_blocks: int) -> int:
    """k of a share of the blocks: at least one is skipped and one is kept, however small the model."""
    return min(max(round(ratio * num_blocks), 1), num_blocks - 1)


def split_between_ends(skipped: int, num_blocks: int, table: SelectionTable | None = None) -> Selection:
    """Divide ``skipped`` blocks between the ends: by the table, or by the rule where it has no such pair."""
    pair = None if table is None else table.pairs.get(skipped)
    if table is not None and pair is not None:
        return from_table(table, pair)
    leading = math.ceil(LEADING_SHARE * skipped)
    return Selection(num_blocks, leading, skipped - leading, "rule", RULE)


def from_table(table: SelectionTable, pair: Pair) -> Selection:
    """The selection of a pair of a table."""
    harm = table.leading[pair[0]] + table.trailing[pair[1]] if table.leading else None
    return Selection(table.num_blocks, *pair, "table", table.describe(), harm)
