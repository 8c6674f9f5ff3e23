"""How far a piece of work is: a tqdm bar on a terminal, about ten lines in a log, and what a stage reports to."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Protocol, TypeVar

from tqdm import tqdm

from .machine import is_first_process


T = TypeVar("T")

LINES = 10
"""Lines that a log gets for one piece of work, about."""
LEAST_SECONDS = 2.0
"""Seconds between two lines of a log, at least; the last line always comes."""
FIRST_SECONDS = 30.0
"""Seconds after which slow work gets its first line, even if less than a tenth is done."""


class StageProgress(Protocol):
    """Takes how far a running stage is."""

    def begin(self, kind: str) -> None:
        """Go on to the stage's next kind of pieces."""

    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        """Report that ``count`` more pieces are done; a training step also reports its loss."""

    def skip(self, count: int) -> None:
        """Report that ``count`` pieces were done before, so that they do not count as fast work."""


class RunProgress(Protocol):
    """Shows the stages of a run."""

    def stage(self, name: str, done: int = 0, **pieces: int) -> AbstractContextManager[StageProgress]:
        """Show a stage while the context lasts.

        Args:
            name: Name of the stage.
            done: Pieces of each kind that were done before.
            **pieces: Kinds of pieces in the order in which the stage works through them, such as ``steps=500``, each
                with its total number, ``done`` ones included.
        """


class _Silent:
    """A run and a stage that show nothing."""

    def stage(self, name: str, done: int = 0, **pieces: int) -> AbstractContextManager[StageProgress]:
        return nullcontext(self)

    def begin(self, kind: str) -> None:
        pass

    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        pass

    def skip(self, count: int) -> None:
        pass


SILENT = _Silent()
"""Progress of a run that shows nothing."""


class LogLines:
    """Stands in for a tqdm bar where stderr is no terminal: prints about ten lines with a rate and the time left.

    Args:
        description: What is done.
        total: Number of pieces, ``initial`` ones included.
        unit: Name of a piece, in the singular.
        initial: Pieces that were done before; the rate leaves them out.
        shown: Whether to print at all.
    """

    def __init__(self, description: str, total: int, unit: str, *, initial: int = 0, shown: bool = True) -> None:
        self.description, self.total, self.unit, self.shown = description, total, unit, shown
        self.n = self.initial = initial
        self.postfix = ""
        self.leave = True
        self._tenth = self._tenths()
        self._started = self._printed = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count ``count`` more pieces, and print a line if one is due."""
        before, self.n = self.n, self.n + count
        silent = time.monotonic() - self._printed
        ended = before < self.total <= self.n
        is_first = self._printed == self._started
        if self.shown and (
            ended
            or (self._tenths() > self._tenth and silent >= LEAST_SECONDS)
            or (is_first and silent >= FIRST_SECONDS)
        ):
            self._tenth, self._printed = self._tenths(), time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set the figures that end a line."""
        self.postfix = text

    def close(self) -> None:
        """Print no more."""
        self.shown = False

    def __str__(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        each = elapsed / (self.n - self.initial)
        parts = [
            f"{self.description}: {self.n}/{self.total} {self.unit}s ({self.n / self.total:.0%})",
            f"{1 / each:.3g} {self.unit}s/s" if each < 1 else f"{each:.3g} s/{self.unit}",
        ]
        if self.n < self.total:
            parts.append(f"{tqdm.format_interval(each * (self.total - self.n))} left")
        elif not self.initial:
            parts.append(f"took {tqdm.format_interval(elapsed)}")
        return ", ".join([*parts, self.postfix] if self.postfix else parts)

    def _tenths(self) -> int:
        return LINES * self.n // max(self.total, 1)


def progress_bar(description: str, total: int, unit: str, *, initial: int = 0, shown: bool = True) -> tqdm | LogLines:
    """A bar on a terminal, lines elsewhere, and nothing in other processes than the first or if nothing is left to do.

    Args:
        description: What is done.
        total: Number of pieces, ``initial`` ones included.
        unit: Name of a piece, in the singular.
        initial: Pieces that were done before.
        shown: Whether to show anything.
    """
    shown = shown and total > initial and is_first_process()
    if shown and sys.stderr.isatty():
        # The mean rate of the whole bar: a smoothed one makes the time left jump.
        return tqdm(
            desc=description, total=total, initial=initial, unit=unit, smoothing=0, dynamic_ncols=True, file=sys.stderr
        )
    return LogLines(description, total, unit, initial=initial, shown=shown)


def listed(items: Iterable[T], description: str, unit: str, *, total: int, shown: bool = True) -> Iterator[T]:
    """The items, with a display of how many of them the caller has worked on."""
    with closing(progress_bar(description, total, unit, shown=shown)) as bar:
        for item in items:
            yield item
            bar.update()
