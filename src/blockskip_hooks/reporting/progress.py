"""Progress of a run's stages on stderr: the rate, the time left, the loss and the peak memory."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..utils.formatting import format_bytes
from ..utils.machine import is_first_process
from ..utils.monitor import StageMonitor
from ..utils.progress import RunProgress, StageProgress, progress_bar


AVERAGED = 50
"""Steps whose mean loss is shown."""


def set_log_level(name: str) -> None:
    """Set the package's log level to ``--log_level``; processes other than the first log errors only.

    Libraries log warnings and errors, or errors only if ``--log_level`` is ``error``.
    """
    level = logging.getLevelName(name.upper())
    if not is_first_process():
        level = max(level, logging.ERROR)
    logging.getLogger("blockskip_hooks").setLevel(level)
    logging.getLogger().setLevel(max(level, logging.WARNING))


class Unfinished(NamedTuple):
    """Work that other stages take turns with.

    Attributes:
        first: Pieces that were done before it was first shown.
        done: Pieces that are done.
        total: All pieces.
        seconds: What those from ``first`` to ``done`` took.
    """

    first: int
    done: int
    total: int
    seconds: float

    @property
    def left(self) -> float:
        """Seconds that the other pieces will take; not a number if none was timed."""
        timed = self.done - self.first
        return (self.total - self.done) * self.seconds / timed if timed else math.nan


class Progress(RunProgress):
    """Shows the stages of a run.

    Args:
        monitor: Measures the memory of the running stage.
        shown: Whether this process shows anything; only one process of a run should.

    Example::

        progress = Progress(monitor)
        with progress.stage("train", steps=200) as stage:
            stage.update(loss=0.4)
    """

    def __init__(self, monitor: StageMonitor | None = None, *, shown: bool = True) -> None:
        self.monitor, self.shown = monitor or StageMonitor(), shown
        self.losses: deque[float] = deque(maxlen=AVERAGED)
        # Of work that goes on later, so that it keeps its rate, by stage and kind of pieces.
        self.unfinished: dict[tuple[str, str], Unfinished] = {}

    @contextlib.contextmanager
    def stage(self, name: str, done: int = 0, **pieces: int) -> Iterator[StageBar]:
        stage = StageBar(self, name, done, pieces)
        try:
            yield stage
        finally:
            stage.close()


class StageBar(StageProgress):
    """The bar of a running stage; see :meth:`Progress.stage`."""

    def __init__(self, progress: Progress, name: str, done: int, pieces: Mapping[str, int]) -> None:
        self._progress, self._name, self._done, self._pieces = progress, name, done, pieces
        self._open(next(iter(pieces)))

    def begin(self, kind: str) -> None:
        if kind != self._kind:
            self._bar.leave = False
            self._end()
            self._open(kind)

    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        losses = self._progress.losses
        figures = []
        if loss is not None:
            losses.append(loss)
            figures.append(f"mean loss {sum(losses) / len(losses):.4f}")
        figures.append(f"peak {format_bytes(self._progress.monitor.memory()[1])}")
        self._bar.set_postfix_str(", ".join(figures), refresh=False)
        self._bar.update(count)

    def skip(self, count: int) -> None:
        if not self._bar.disable:
            self._bar.initial += count
            self._bar.n += count

    def close(self) -> None:
        """End the bar; on a terminal it stays only if all pieces are done, as the stage goes on later otherwise."""
        self._bar.leave = self._bar.n >= self._pieces[self._kind]
        self._end()

    def _end(self) -> None:
        if not self._bar.disable:
            bar, key = self._bar, (self._name, self._kind)
            work = Unfinished(bar.initial, bar.n, bar.total, bar.format_dict["elapsed"])
            if work.done < work.total:
                self._progress.unfinished[key] = work
            else:
                self._progress.unfinished.pop(key, None)
        self._bar.close()

    def _open(self, kind: str) -> None:
        self._kind = kind
        before = self._progress.unfinished.get((self._name, kind))
        self._bar = progress_bar(
            self._name if len(self._pieces) == 1 else f"{self._name} ({kind})",
            self._pieces[kind],
            kind.removesuffix("s").replace("_", " "),
            initial=self._done,
            shown=self._progress.shown,
            earlier=(self._done - before.first, before.seconds) if before else (0, 0.0),
            rest=self._rest(kind) if before else None,
        )

    def _rest(self, kind: str) -> tuple[float, str] | None:
        """Seconds left of what takes turns with these pieces, and its name.

        All of it was seen once these go on, except images, which are made whenever it is time for them.
        """
        others = {key: work for key, work in self._progress.unfinished.items() if key != (self._name, kind)}
        left = sum(work.left for work in others.values())
        return None if not others or math.isnan(left) else (left, " and ".join(other for _, other in others))
