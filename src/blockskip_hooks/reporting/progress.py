"""What a run shows while it works: one display per stage, a bar on a terminal and short plain lines elsewhere.

Time left is what is left to do times the seconds that one piece takes: measured as soon as one is done, before that
predicted by the plan, and the prediction corrected by how the pieces measured so far compare with theirs. Where
neither is known, no time is shown.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from ..utils.formatting import format_bytes
from ..utils.monitor import StageMonitor


T = TypeVar("T")

LINE_SECONDS = 30.0
"""A plain display is silent for no longer than this."""
PHOTOS_FROM = 51
"""Fewer photos are checked and loaded before a display is read."""
LEAST_SECONDS = 2.0
"""And says something no more often than this, but for the end."""
TRUST = 0.05
"""Part of a run that has to be measured before that counts more for the rest than its prediction."""
AVERAGED = 50
"""Losses that the moving average is over."""


class Display:
    """So many pieces of work and how far they are: a bar on a terminal, plain lines where stderr is none.

    Args:
        description: What is done.
        total: Pieces in all.
        unit: A piece, in the singular.
        initial: Pieces done before.
        figures: What stands beside the count; called only when something is drawn.
        shown: Whether to draw at all; other processes than a launcher's first never do.
        ends: Whether the end of a plain display has a line even if the one before is recent.
    """

    def __init__(
        self,
        description: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        figures: Callable[[], list[str]] = list,
        shown: bool = True,
        ends: bool = True,
    ) -> None:
        self.description, self.total, self.unit, self.figures = description, total, unit, figures
        self.count, self.ends = initial, ends
        self._bar: tqdm | None = None
        self._shown = shown and total > initial and is_first_process()
        self._said, self._tenth = time.monotonic(), 10 * initial // max(total, 1)
        if self._shown and sys.stderr.isatty():
            self._bar = _Bar(self)

    def update(self, count: int = 1) -> None:
        """Say that this many more pieces are done."""
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown:
            self._say_if_due()

    def close(self, *, leave: bool = True) -> None:
        """End the display; on a terminal its last state stays if asked for."""
        if self._bar is not None:
            self._bar.leave = leave
            self._bar.close()
            self._bar = None
        self._shown = False

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say_if_due(self) -> None:
        silent, tenth = time.monotonic() - self._said, 10 * self.count // self.total
        ended = self.ends and self.count >= self.total
        if ended or silent >= LINE_SECONDS or (tenth > self._tenth and silent >= LEAST_SECONDS):
            self._said, self._tenth = time.monotonic(), tenth
            count = f"{self.count}/{self.total} {self.unit}s ({self.count / self.total:.0%})"
            print(", ".join([f"{self.description}: {count}", *self.figures()]), file=sys.stderr, flush=True)


class _Bar(tqdm):
    """tqdm, with the figures of a display."""

    def __init__(self, display: Display) -> None:
        self._display = display
        super().__init__(
            total=display.total,
            initial=display.count,
            desc=display.description,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {figures}",
            file=sys.stderr,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        # Asked for whenever the bar is drawn, and only then.
        return {**super().format_dict, "figures": ", ".join(self._display.figures())}


def is_first_process() -> bool:
    """Whether a launcher started this process as the first, or nothing but the user did."""
    return os.environ.get("RANK", "0") == "0"


def set_log_level(name: str) -> None:
    """Let this package say what ``--log_level`` asks for; other processes than the first say errors only.

    Libraries are as quiet as before, but for their errors: what they warn of is no concern of a user's.
    """
    level = logging.getLevelName(name.upper())
    if not is_first_process():
        level = max(level, logging.ERROR)
    logging.getLogger("blockskip_hooks").setLevel(level)
    logging.getLogger().setLevel(max(level, logging.WARNING))


def listed(items: Iterable[T], description: str, unit: str, *, total: int, shown: bool = True) -> Iterator[T]:
    """The items, with a display of how many have been taken and worked on."""
    with Display(description, total, unit, shown=shown) as display:
        for item in items:
            yield item
            display.update()


def photo_progress(photos: Sequence[T], title: str) -> Iterator[T]:
    """The photos, with a display if there are many."""
    return listed(photos, title, "photo", total=len(photos), shown=len(photos) >= PHOTOS_FROM)


@dataclass
class Work:
    """One kind of pieces that a run works through.

    Attributes:
        left: Pieces that the rest of the run has.
        predicted: Seconds of one of them by the plan, or ``None``.
        done: Pieces that were measured.
        seconds: What they took.
    """

    left: int = 0
    predicted: float | None = None
    done: int = 0
    seconds: float = 0.0


class Progress:
    """Displays of a run's stages, with what is left of the stage and of the run, memory, and the loss.

    Args:
        monitor: Knows the memory.
        shown: Whether this process shows anything; one of a run's should.

    Example::

        progress = Progress(monitor)
        progress.expect("steps", 200, seconds=0.1)
        with progress.stage("train", steps=200) as stage:
            stage.update()
    """

    def __init__(self, monitor: StageMonitor | None = None, *, shown: bool = True) -> None:
        self.monitor, self.shown = monitor or StageMonitor(), shown
        self.losses: list[float] = []
        self._work: dict[str, Work] = {}

    @classmethod
    def silent(cls) -> Progress:
        """Of a process that says nothing."""
        return cls(shown=False)

    def expect(self, pieces: str, count: int, seconds: float | None = None) -> None:
        """Announce what the rest of the run has to do, or correct it.

        Args:
            pieces: Such as ``"steps"``.
            count: How many.
            seconds: What one takes by the plan; ``None`` leaves what was said before.
        """
        work = self._work.setdefault(pieces, Work())
        work.left = count
        work.predicted = work.predicted if seconds is None else seconds

    def seconds_of(self, pieces: str) -> float | None:
        """Seconds of one piece: measured, else predicted and corrected by what was measured of others."""
        work = self._work[pieces]
        if work.done:
            return work.seconds / work.done
        if work.predicted is None:
            return None
        known = [(other, other.predicted) for other in self._work.values() if other.predicted is not None]
        trust = TRUST * sum((other.done + other.left) * seconds for other, seconds in known)
        planned = sum(other.done * seconds for other, seconds in known)
        measured = sum(other.seconds for other, _ in known)
        return work.predicted * (measured + trust) / (planned + trust) if planned + trust else work.predicted

    def seconds_left(self, counts: Mapping[str, int] | None = None) -> float | None:
        """Seconds that the rest of the run takes, or the given numbers of pieces; ``None`` if that is not known."""
        counts = {name: work.left for name, work in self._work.items()} if counts is None else counts
        parts = [(count, self.seconds_of(name)) for name, count in counts.items() if count > 0]
        return None if any(each is None for _, each in parts) else sum(count * (each or 0.0) for count, each in parts)

    @contextlib.contextmanager
    def stage(self, name: str, initial: int = 0, **pieces: int) -> Iterator[StageProgress]:
        """Show a stage, or its next part.

        Args:
            name: The stage.
            initial: Pieces of the first kind that were done before.
            **pieces: What it works through, in this order, and how many of each.
        """
        for kind, count in pieces.items():
            if kind not in self._work:
                self.expect(kind, count - initial)
        stage = StageProgress(self, name, pieces, initial)
        try:
            yield stage
        finally:
            stage.close()


class StageProgress:
    """The display of a stage that is running; see :meth:`Progress.stage`."""

    def __init__(self, progress: Progress, name: str, pieces: Mapping[str, int], initial: int) -> None:
        self._progress, self._name, self._pieces = progress, name, dict(pieces)
        self._kind, self._count = next(iter(pieces)), initial
        self._started = self._since = time.monotonic()
        self._display = self._open()

    def begin(self, kind: str) -> None:
        """Go on to the next kind of pieces."""
        if kind != self._kind:
            self._display.close(leave=False)
            self._kind, self._count, self._since = kind, 0, time.monotonic()
            self._display = self._open()

    def update(self, count: int = 1) -> None:
        """Say that this many more pieces are done."""
        work, now = self._progress._work[self._kind], time.monotonic()
        work.done += count
        work.seconds, self._since = work.seconds + now - self._since, now
        self.skip(count)

    def skip(self, count: int) -> None:
        """Say that this many pieces need not be done."""
        work = self._progress._work[self._kind]
        work.left = max(work.left - count, 0)
        self._count += count
        # Parts of a stage come one after the other in runs of many stretches; the last has the last word.
        self._display.ends = work.left == 0
        self._display.update(count)

    def close(self) -> None:
        """End the display."""
        self._display.close()

    def _open(self) -> Display:
        kind = self._kind
        name = self._name if len(self._pieces) == 1 else f"{self._name} ({kind})"
        return Display(
            name,
            self._pieces[kind],
            _unit(kind),
            initial=self._count,
            figures=self._figures,
            shown=self._progress.shown,
        )

    def _figures(self) -> list[str]:
        progress, kinds = self._progress, list(self._pieces)
        figures = []
        if each := progress.seconds_of(self._kind) if progress._work[self._kind].done else None:
            unit = _unit(self._kind)
            figures.append(f"{1 / each:.3g} {unit}s/s" if each < 1 else f"{each:.3g} s/{unit}")
        left = {kind: self._pieces[kind] for kind in kinds[kinds.index(self._kind) + 1 :]}
        left[self._kind] = self._pieces[self._kind] - self._count
        if any(left.values()):
            figures.append(f"{_clock(progress.seconds_left(left))} left")
        else:
            figures.append(f"took {_clock(time.monotonic() - self._started)}")
        figures.append(f"run {_clock(progress.seconds_left())} left")
        if self._kind == "steps" and progress.losses:
            recent = progress.losses[-AVERAGED:]
            figures.append(f"loss {recent[-1]:.4f} (mean {sum(recent) / len(recent):.4f})")
        now, peak = progress.monitor.memory()
        return [*figures, f"{format_bytes(now)} (peak {format_bytes(peak)})"]


def _unit(kind: str) -> str:
    return kind.removesuffix("s").replace("_", " ")


def _clock(seconds: float | None) -> str:
    return "–" if seconds is None else tqdm.format_interval(seconds)


__all__ = ["Display", "Progress", "StageProgress", "Work", "listed", "photo_progress"]
