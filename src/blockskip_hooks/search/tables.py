"""Selection tables: what the image loses when the text is masked in the first or last blocks (section 3.4, Eq. 2).

A table is a JSON file of one base model. Measured ones hold two curves: the harm D[n] of masking the first n blocks,
and that of masking the last m; every pair of spans is a look-up in them. Inferred ones hold pairs alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

from huggingface_hub.constants import HF_HOME

from ..selection import Pair, best_pairs
from ..utils.errors import UserError


@dataclass(frozen=True)
class TradeOff:
    """What a pair of spans costs, and what it gains.

    Attributes:
        leading: n.
        trailing: m.
        freed_bytes: Bytes of the skipped blocks' parameters.
        harm: D[n] + D[m] of the two curves, from 0 to 4.
    """

    leading: int
    trailing: int
    freed_bytes: int
    harm: float


@dataclass(frozen=True)
class SelectionTable:
    """What is known of one base model.

    Attributes:
        model: What the model is called.
        num_blocks: N.
        source: ``"measured"`` by the masking search, or ``"inferred"`` from something else.
        about: How, in a line.
        names: Names by which users call the model.
        weights: Digest of the transformer's files that were measured; ``None`` if inferred.
        date: When it was measured.
        known_pairs: Pairs of an inferred table, by k.
        leading: D of the first n blocks masked, for n from 0 to N-1; empty if inferred.
        trailing: D of the last m blocks masked, for m from 0 to N-1; empty if inferred.
        shipped: Whether it comes with the package.
    """

    model: str
    num_blocks: int
    source: Literal["measured", "inferred"]
    about: str
    names: tuple[str, ...] = ()
    weights: str | None = None
    date: str | None = None
    known_pairs: Mapping[int, Pair] | None = None
    leading: tuple[float, ...] = ()
    trailing: tuple[float, ...] = ()
    shipped: bool = False

    def describe(self) -> str:
        """The table in a few words, for plans and reports."""
        dated = f", {self.date}" if self.date else ""
        return f"{self.model} ({'shipped, ' if self.shipped else ''}{self.source}: {self.about}{dated})"

    def knows(self, num_blocks: int, names: Sequence[str | None], weights: str | None) -> bool:
        """Whether it is about this model: measured ones about these very weights, inferred ones about the name."""
        if self.num_blocks != num_blocks:
            return False
        return any(name in self.names for name in names) if self.weights is None else self.weights == weights

    @cached_property
    def pairs(self) -> dict[int, Pair]:
        """The chosen pair for each number k of skipped blocks."""
        return best_pairs(self.leading, self.trailing) if self.leading else dict(self.known_pairs or {})

    def point(self, pair: Pair, block_bytes: Sequence[int]) -> TradeOff:
        """A pair by the curves, with ``N`` blocks' bytes."""
        n, m = pair
        freed = sum(block_bytes[:n]) + sum(block_bytes[len(block_bytes) - m :])
        return TradeOff(n, m, freed, self.leading[n] + self.trailing[m])

    def trade_off(self, block_bytes: Sequence[int]) -> list[TradeOff]:
        """The pairs that free more than every less harmful one, from nothing skipped on; empty if inferred.

        Args:
            block_bytes: Bytes of each block's parameters, ``N`` of them.
        """
        points = sorted(
            (
                self.point((n, m), block_bytes)
                for n in range(len(self.leading))
                for m in range(len(self.trailing))
                if n + m < self.num_blocks
            ),
            # Of equals the one with more leading blocks comes first: their residuals are exact.
            key=lambda point: (point.harm, -point.freed_bytes, -point.leading),
        )
        chosen: list[TradeOff] = []
        for point in points:
            if not chosen or point.freed_bytes > chosen[-1].freed_bytes:
                chosen.append(point)
        return chosen


def read_table(path: Path) -> SelectionTable:
    """Read a table's file.

    Raises:
        UserError: if it is not a table that this version can use.
        OSError: if it cannot be read.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["schema"] != 1:
            raise UserError(f"its schema is {table['schema']}")
        curves = table.get("curves", {"leading": {"mean": ()}, "trailing": {"mean": ()}})
        result = SelectionTable(
            model=table["model"],
            num_blocks=table["num_blocks"],
            source=table["source"],
            about=table["about"],
            names=tuple(table.get("names", ())),
            weights=table.get("weights"),
            date=table.get("date"),
            known_pairs={int(k): (pair[0], pair[1]) for k, pair in table["pairs"].items()},
            leading=tuple(map(float, curves["leading"]["mean"])),
            trailing=tuple(map(float, curves["trailing"]["mean"])),
        )
        measured = {len(result.leading), len(result.trailing)} == {result.num_blocks} and bool(result.weights)
        if result.source not in ("measured", "inferred") or measured != (result.source == "measured"):
            raise UserError(f"its source is '{result.source}', which its curves and weights do not bear out")
        if any(min(pair) < 0 or sum(pair) != k or k >= result.num_blocks for k, pair in result.pairs.items()):
            raise UserError("its pairs do not add up")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is not a selection table of schema 1 ({reason}); remove it, or run blockskip select again."
        ) from None
    return result


def cache_folder() -> Path:
    """Where tables measured on this machine are kept, beside the hub's own cache."""
    return Path(os.environ.get("HF_HOME", HF_HOME)) / "blockskip" / "selection"


def cache_file(weights: str) -> Path:
    """The cached table of a transformer, by the digest of its files."""
    return cache_folder() / f"{weights[:16]}.json"


def shipped_tables() -> list[SelectionTable]:
    """Tables that come with the package, measured ones first."""
    # A real folder: the package is never imported from a zip file.
    folder = Path(str(resources.files("blockskip_hooks"))) / "tables"
    tables = [replace(read_table(path), shipped=True) for path in sorted(folder.glob("*.json"))]
    return sorted(tables, key=lambda table: table.source != "measured")


def find_table(num_blocks: int, names: Sequence[str | None], weights: str | None) -> SelectionTable | None:
    """The table of a model: one measured on this machine, else a shipped one, else nothing.

    Args:
        num_blocks: N.
        names: Names under which an inferred table may know the model.
        weights: Digest of the transformer's files, by which measured tables know it.

    Raises:
        UserError: if the one in the cache cannot be read.
    """
    cached = None if weights is None else cache_file(weights)
    local = [read_table(cached)] if cached is not None and cached.is_file() else []
    return next((table for table in (*local, *shipped_tables()) if table.knows(num_blocks, names, weights)), None)
