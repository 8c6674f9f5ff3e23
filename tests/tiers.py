"""The two tiers of tests: what ``pytest`` alone runs, and what needs ``-m slow``.

The fast tier shows every behaviour once, with a run of the script where it takes one. The slow tier repeats it for the
other families and cases. What decides is the time: the fast tier has five minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


FAST_FAMILIES = ("flux-dev", "sana", "sd3")
"""Families of the fast tier: blocks that diffusers registers, blocks that we register, and two streams throughout."""


def fast_first(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Values of one parameter: the first ``fast`` of them in the fast tier, the others in the slow one."""
    return [
        value if number < fast else pytest.param(value, marks=pytest.mark.slow) for number, value in enumerate(values)
    ]


def fast_rows(rows: Iterable[tuple[Any, ...]], fast: int = 1) -> list[Any]:
    """As :func:`fast_first`, for rows of several parameters."""
    return [pytest.param(*row, marks=[] if number < fast else pytest.mark.slow) for number, row in enumerate(rows)]
