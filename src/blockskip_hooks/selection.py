"""Which blocks to skip: from the flag, from a shipped table, or by a written rule."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal

from .arguments import parse_skip_blocks


RULE = "leading = ceil(0.6 k), trailing = the rest: leading residuals are exact, trailing ones an approximation"
LEADING_SHARE = 0.6


@dataclass(frozen=True)
class Selection:
    """A chosen pair of spans and where it came from.

    Attributes:
        blocks: N, number of blocks of the transformer.
        leading: n.
        trailing: m.
        source: ``"flag"``, ``"table"`` or ``"rule"``.
        table: Name and origin of the table, or the rule's wording.
    """

    blocks: int
    leading: int
    trailing: int
    source: Literal["flag", "table", "rule"]
    table: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The ``skip`` part of ``plan.json`` and ``run_report.json``."""
        return {**asdict(self), "ratio": round((self.leading + self.trailing) / self.blocks, 4)}


def load_tables() -> list[dict[str, Any]]:
    """Selection tables shipped with the package."""
    folder = resources.files("blockskip_hooks") / "tables"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".json")), key=lambda e: e.name)
    return [json.loads(entry.read_text()) for entry in files]


def select_blocks(
    skip_blocks: str, skip_ratio: float, num_blocks: int, model_names: tuple[str | None, ...] = ()
) -> Selection:
    """Resolve ``--skip_blocks``.

    Args:
        skip_blocks: ``none``, ``auto``, a number of blocks, or ``leading,trailing``.
        skip_ratio: Share of blocks that ``auto`` skips.
        num_blocks: N.
        model_names: Names under which a table may know the model.

    Raises:
        ValueError: if no block would be kept or nothing would be skipped by ``auto``.
    """
    choice = parse_skip_blocks(skip_blocks, num_blocks)
    if choice == "none":
        return Selection(num_blocks, 0, 0, "flag")
    if isinstance(choice, tuple):
        return Selection(num_blocks, *choice, "flag")
    if choice == "auto":
        # At least one block is skipped and one is kept, however small the model.
        num_skipped = min(max(round(skip_ratio * num_blocks), 1), num_blocks - 1)
    else:
        num_skipped = choice
    for table in load_tables():
        pair = _lookup(table, num_blocks, num_skipped, model_names)
        if pair is not None:
            return Selection(num_blocks, *pair, "table", f"{table['model']} ({table['source']}: {table['about']})")
    leading = math.ceil(LEADING_SHARE * num_skipped)
    return Selection(num_blocks, leading, num_skipped - leading, "rule", RULE)


def _lookup(
    table: Mapping[str, Any], num_blocks: int, num_skipped: int, model_names: tuple[str | None, ...]
) -> tuple[int, int] | None:
    if table["num_blocks"] != num_blocks or not any(name in table["names"] for name in model_names):
        return None
    pair = table["pairs"].get(str(num_skipped))
    return None if pair is None else (pair[0], pair[1])
