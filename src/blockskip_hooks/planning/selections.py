"""Which blocks to skip to free a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..selection import Selection, from_table, split_between_ends
from ..utils.errors import UserError
from ..utils.formatting import format_budget, format_bytes


if TYPE_CHECKING:
    from ..search.tables import SelectionTable


def selections_by_bytes(
    block_bytes: Sequence[int], table: SelectionTable | None = None
) -> list[tuple[Selection, int]]:
    """Selections in the order in which they are worth making, each freeing more bytes than the ones before it.

    Those of a measured table are its trade-off, from the least predicted harm on; others skip block after block.

    Args:
        block_bytes: Bytes of each block's parameters.
        table: What is known of the model.

    Returns:
        Selections from none on, with the bytes that they free.
    """
    num_blocks = len(block_bytes)
    ordered: list[tuple[Selection, int]] = [(Selection(num_blocks, 0, 0, "flag"), 0)]
    points = table.trade_off(block_bytes) if table is not None else []
    if table is not None and points:
        return ordered + [
            (from_table(table, (point.leading, point.trailing)), point.freed_bytes)
            for point in points
            if point.freed_bytes
        ]
    for skipped in range(1, num_blocks):
        selection = split_between_ends(skipped, num_blocks, table)
        freed = sum(block_bytes[: selection.leading]) + sum(block_bytes[num_blocks - selection.trailing :])
        if freed > ordered[-1][1]:
            ordered.append((selection, freed))
    return ordered


def select_by_bytes(budget: int, block_bytes: Sequence[int], table: SelectionTable | None = None) -> Selection:
    """Resolve ``--skip_budget``: the least harmful pair whose blocks hold that many bytes of parameters.

    Args:
        budget: Bytes to free at least.
        block_bytes: Bytes of each block's parameters.
        table: What is known of the model.

    Raises:
        ValueError: if all but one block hold less than that.
    """
    selections = selections_by_bytes(block_bytes, table)
    for selection, freed in selections:
        if freed >= budget:
            return selection
    most, freed = selections[-1]
    raise UserError(
        f"--skip_budget {format_budget(budget)} is more than the blocks hold: skipping {most.leading} leading and "
        f"{most.trailing} trailing ones of {len(block_bytes)} frees {format_bytes(freed)}; lower it."
    )
