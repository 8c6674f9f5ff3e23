"""Stretches: which optimiser steps share one precompute, and which step's records each of them trains on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """A run's steps in stretches on a grid that starts at step 0, so that a resumed run has the same ones.

    Records are made for the first steps of a stretch; the others train on the records of those again, in the same
    order. Every process so trains on records of its own.

    Attributes:
        num_steps: Optimiser steps of the whole run.
        length: Steps of a stretch; the last one may be shorter.
        repeats: How many times a stretch trains on each of its records, at most.
    """

    num_steps: int
    length: int
    repeats: int = 1

    def __post_init__(self) -> None:
        assert min(self.num_steps, self.length, self.repeats) > 0

    def of(self, step: int) -> range:
        """The steps of the stretch that ``step`` is in."""
        start = step // self.length * self.length
        return range(start, min(start + self.length, self.num_steps))

    def recorded(self, stretch: range) -> range:
        """The steps of a stretch whose samples get records."""
        return range(stretch.start, stretch.start + -(-len(stretch) // self.repeats))

    def recorded_before(self, stretch: range) -> int:
        """Number of steps before a stretch whose samples get records."""
        return stretch.start // self.length * len(self.recorded(self.of(0)))

    def source(self, step: int) -> int:
        """The step whose samples ``step`` trains on."""
        stretch = self.of(step)
        return stretch.start + (step - stretch.start) % len(self.recorded(stretch))

    def following(self, first_step: int) -> Iterator[tuple[range, int]]:
        """The stretches from ``first_step`` on.

        Yields:
            The steps of a whole stretch and the first of them that is still to be trained.
        """
        while first_step < self.num_steps:
            stretch = self.of(first_step)
            yield stretch, first_step
            first_step = stretch.stop

    @property
    def num_recorded_steps(self) -> int:
        """Steps of the whole run whose samples get records."""
        return sum(len(self.recorded(stretch)) for stretch, _ in self.following(0))

    def __len__(self) -> int:
        return -(-self.num_steps // self.length)


def segments(steps: range, every: int) -> Iterator[range]:
    """Split ``steps`` at the multiples of ``every``."""
    start = steps.start
    while start < steps.stop:
        stop = min((start // every + 1) * every, steps.stop)
        yield range(start, stop)
        start = stop
