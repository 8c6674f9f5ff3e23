"""How a run ends early: SIGINT and SIGTERM where nothing is lost, a second one at once, or with a process it needs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


REPEAT_SECONDS = 2.0
"""Under a launcher: a terminal signals all processes, and the launcher passes the same signal on."""


class Interrupted(Exception):
    """A signal asked the run to end.

    Args:
        number: The signal's.
        kept: What the run can go on from.
    """

    def __init__(self, number: int, kept: str = "what was saved") -> None:
        super().__init__(
            f"Stopped by {signal.Signals(number).name}. The same command with --resume_from_checkpoint latest goes on "
            f"from {kept}."
        )
        self.number = number


class StopSignals:
    """Within this context SIGINT and SIGTERM raise :class:`Interrupted`.

    Where work would be lost they are :meth:`held`: the work goes on to a place where all of it is saved, and calls
    :meth:`check` there.

    Attributes:
        received: The signal that asked the run to end, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._is_held = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this context a signal waits for :meth:`check`."""
        self.check()
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def check(self, received: int | None = None) -> None:
        """Raise if a signal asked the run to end.

        Args:
            received: What to go by instead of this process's own signal.

        Raises:
            Interrupted: if so.
        """
        if number := self.received if received is None else received:
            raise Interrupted(number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # A process that loads data ends with the one it works for.
        if not self.received:
            self.received, self._since = number, time.monotonic()
            if not self._is_held:
                raise Interrupted(number)
            print(f"{signal.Signals(number).name}: saving, then ending; once more to end at once.", file=sys.stderr)
        elif "LOCAL_RANK" not in os.environ or time.monotonic() - self._since > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether processes that train together lost one of them; gloo has no error class of its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
