"""Bytes and durations as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


COLUMNS, LABEL_WIDTH = 80, 9
"""Columns of a run's first screen, and of the label that a line of it begins with."""


def fit_lines(text: str) -> str:
    """Lines of a first screen broken to 80 columns, what goes on below the text and not below the label."""
    indent = " " * LABEL_WIDTH
    return "\n".join(
        textwrap.fill(line, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        if len(line) > COLUMNS
        else line
        for line in text.splitlines()
    )


def format_bytes(count: float | None) -> str:
    """Bytes for people, in binary units: ``1.91 GiB``, ``640 MiB``, and a dash for unknown."""
    if count is None:
        return "–"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    index = 0
    while count >= 1024 and index < len(units) - 1:
        count /= 1024
        index += 1
    digits = 0 if index == 0 or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {units[index]}"


def format_budget(count: int) -> str:
    """Bytes that somebody gave, as they were typed where that is known; else as :func:`format_bytes`."""
    return format_bytes(count) if type(count) is int else str(count)


def format_seconds(seconds: float | None) -> str:
    """A duration for people: ``0.42 s``, ``6 min 12 s``, ``1 h 04 min``, and a dash for unknown."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_setting(value: Any, changed: Sequence[Mapping[str, Any]] = ()) -> str:
    """A setting for people, with every value that it had in the course of a run: ``0.001, from step 5 on 1e-06``.

    Args:
        value: Its value, the last one.
        changed: ``from_step`` and ``value`` of each; empty if it never changed.
    """
    values = [f"from step {then['from_step']} on {then['value']}" for then in changed[1:]]
    return ", ".join([str(changed[0]["value"]), *values]) if values else str(value)
