"""Progress of a run's stages on stderr: the rate, the time left, the loss and the peak memory."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Mapping

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
        # Where each stage first began, and the seconds that it has taken: a stage that goes on later keeps its rate.
        self.before: dict[tuple[str, str], tuple[int, float]] = {}

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
            taken = self._bar.format_dict["elapsed"]
            self._progress.before[self._name, self._kind] = self._bar.initial, taken
        self._bar.close()

    def _open(self, kind: str) -> None:
        self._kind = kind
        first, taken = self._progress.before.get((self._name, kind), (self._done, 0.0))
        self._bar = progress_bar(
            self._name if len(self._pieces) == 1 else f"{self._name} ({kind})",
            self._pieces[kind],
            kind.removesuffix("s").replace("_", " "),
            initial=self._done,
            shown=self._progress.shown,
            earlier=(self._done - first, taken),
        )
