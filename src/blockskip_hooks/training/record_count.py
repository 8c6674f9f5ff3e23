"""How many records a run has made, over all its processes and legs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator


class Made(NamedTuple):
    """Records of samples, and their bytes."""

    records: int = 0
    size: int = 0

    def __add__(self, other: tuple[int, ...]) -> Made:  # type: ignore[override]
        return Made(self.records + other[0], self.size + other[1])


class RecordCount:
    """Counts the records that are made; a run that goes on counts those of its checkpoint too.

    Attributes:
        goes_on: Whether the run went on from a checkpoint and has made nothing since.
    """

    def __init__(self) -> None:
        # Of all processes when they last met, of this process since, and of both as the stretch began.
        self._together, self._since, self._before = Made(), Made(), Made()
        self._start, self.goes_on = 0, False

    def resume(self, made: tuple[int, int]) -> None:
        """Go on with what :meth:`until` said when the checkpoint was written."""
        self._together, self.goes_on = Made(*made), True

    def begin_stretch(self, start: int) -> None:
        """What is added from here on belongs to the stretch that begins with step ``start``."""
        self._start, self._before = start, self._together + self._since

    def add(self, records: int, size: int) -> None:
        """Add what this process has made."""
        self._since, self.goes_on = self._since + (records, size), False

    def together(self, accelerator: Accelerator) -> Made:
        """What all processes have made; every process must call this."""
        added = accelerator.reduce(torch.tensor(self._since, device=accelerator.device), "sum").tolist()
        self._together, self._since = self._together + tuple(added), Made()
        return self._together

    def until(self, step: int) -> Made:
        """The same for a checkpoint of ``step``, as far as this process alone can tell.

        Of what others repaired in this stretch it knows nothing. A stretch's records count from its first step on.
        """
        return self._before if step == self._start else self._together + self._since
