"""How far a piece of work is: a tqdm bar on a terminal, about ten lines in a log, and what a stage reports to."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, TypeVar

from tqdm import tqdm

from .machine import is_first_process


T = TypeVar("T")

LINES = 10
"""Lines that a log gets for one piece of work, about."""
LEAST_SECONDS = 2.0
"""Seconds between two lines of a log, at least; the last line always comes."""
FIRST_SECONDS = 10.0
"""Seconds after which slow work gets its first line, even if less than a tenth is done."""
# Always in seconds a piece: tqdm's rate_fmt turns over where that is one, and lines of one log could not be compared.
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s ({percentage:.0f}%), {rate_inv_fmt}, "
LINE += "{elapsed} gone, {left} left{rest_of}{postfix}"
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"


class StageProgress:
    """Takes how far a running stage is; this one shows nothing."""

    def begin(self, kind: str) -> None:
        """Go on to the stage's next kind of pieces."""

    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        """Report that ``count`` more pieces are done; a training step also reports its loss."""

    def skip(self, count: int) -> None:
        """Report that ``count`` pieces were done before, so that they do not count as fast work."""


class RunProgress:
    """Shows the stages of a run; this one shows nothing."""

    def stage(self, name: str, done: int = 0, **pieces: int) -> AbstractContextManager[StageProgress]:
        """Show a stage while the context lasts.

        Args:
            name: Name of the stage.
            done: Pieces of each kind that were done before.
            **pieces: Kinds of pieces in the order in which the stage works through them, such as ``steps=500``, each
                with its total number, ``done`` ones included.
        """
        return nullcontext(SILENT_STAGE)


SILENT, SILENT_STAGE = RunProgress(), StageProgress()


class Bar(tqdm):
    """A bar whose time left may be that of other work, too.

    Attributes:
        rest: Seconds that the other work will take, and its name.
    """

    rest: tuple[float, str] | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """What is shown: also ``left``, the time left of all, and ``rest_of``, what else that is the time of."""
        shown = super().format_dict
        done, (seconds, name) = self.n - self.initial, self.rest or (0.0, "")
        left = self.format_interval((self.total - self.n) * shown["elapsed"] / done + seconds) if done > 0 else "?"
        return {**shown, "left": left, "rest_of": name and f" with {name}"}


class LogLines(Bar):
    """A bar for where stderr is no terminal: what tqdm would draw in place is printed as about ten lines."""

    monitor_interval = 0
    n: int
    last_print_n: int
    last_print_t: float

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, bar_format=LINE, file=io.StringIO())

    def update(self, n: int = 1) -> None:
        """Count ``n`` more pieces, and print a line if one is due."""
        if self.disable:  # by TQDM_DISABLE
            return
        before, self.n = self.n, self.n + n
        silent, is_first = self._time() - self.last_print_t, self.last_print_t == self.start_t
        if (
            before < self.total <= self.n
            or (LINES * self.n // self.total > LINES * self.last_print_n // self.total and silent >= LEAST_SECONDS)
            or (is_first and silent >= FIRST_SECONDS)
        ):
            self.last_print_n, self.last_print_t = self.n, self._time()
            print(" ".join(str(self).split()), file=sys.stderr, flush=True)


def progress_bar(
    description: str,
    total: int,
    unit: str,
    *,
    initial: int = 0,
    shown: bool = True,
    earlier: tuple[int, float] = (0, 0.0),
    rest: tuple[float, str] | None = None,
) -> tqdm:
    """A bar on a terminal, lines elsewhere, and nothing in other processes than the first or if nothing is left to do.

    Args:
        description: What is done.
        total: Number of pieces, ``initial`` ones included.
        unit: Name of a piece, in the singular.
        initial: Pieces that were done before; the rate leaves them out.
        shown: Whether to show anything.
        earlier: How many of ``initial`` an earlier display of the same work has shown, and the seconds that it took:
            they count for the rate.
        rest: Seconds that other work will take which takes turns with this, and its name: the time left is of both.
    """
    settings: dict[str, Any] = {"desc": description, "total": total, "unit": unit, "initial": initial}
    if not (shown and total > initial and is_first_process()):
        return tqdm(**settings, disable=True)
    bar: Bar
    if sys.stderr.isatty():
        # The mean rate of the whole bar: a smoothed one makes the time left jump.
        # The delay keeps it from being drawn before it knows what was done earlier.
        bar = Bar(**settings, bar_format=BAR, smoothing=0, dynamic_ncols=True, file=sys.stderr, delay=1e-9)
    else:
        bar = LogLines(**settings)
    if not bar.disable:
        bar.initial, bar.start_t, bar.delay = initial - earlier[0], bar.start_t - earlier[1], 0
        bar.rest = rest
        bar.refresh()
    return bar


def listed(items: Iterable[T], description: str, unit: str, *, total: int, shown: bool = True) -> Iterator[T]:
    """The items, with a display of how many of them the caller has worked on."""
    with closing(progress_bar(description, total, unit, shown=shown)) as bar:
        for item in items:
            yield item
            bar.update()
