"""The loss of each sample of a step: which are not finite, and how large they are by timestep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..data.sample_plan import Sample
from ..residuals.batches import SampleMaker
from ..utils.errors import UserError


QUARTERS = 4
SUSPECTS_NAMED = 4


class SampleLosses:
    """Collects the losses of a step's samples, over all of its batches.

    Args:
        maker: Knows samples and timesteps.
    """

    def __init__(self, maker: SampleMaker) -> None:
        self.maker = maker
        self._batches: list[tuple[list[Sample], torch.Tensor]] = []

    def add(self, samples: list[Sample], losses: torch.Tensor) -> None:
        """Add a batch's losses ``(B,)``."""
        self._batches.append((samples, losses.detach()))

    def by_quarter(self) -> torch.Tensor:
        """Sum and number of the losses of the latest batch in each quarter of the timesteps, ``(2 * QUARTERS,)``."""
        samples, losses = self._batches[-1]
        timesteps = self.maker.plan.timesteps
        each = timesteps[[sample.timestep_index for sample in samples]] / timesteps.max()
        quarters = (each * QUARTERS).ceil().long().sub(1).clamp(0, QUARTERS - 1)
        members = torch.nn.functional.one_hot(quarters, QUARTERS).to(losses)
        return torch.cat([losses @ members, members.sum(0)])

    def end_step(self, step: int, loss: float) -> list[Sample]:
        """Check the loss of a step, forget its samples and return them.

        Raises:
            UserError: naming the samples that made it not finite.
        """
        batches, self._batches = self._batches, []
        if not math.isfinite(loss):
            suspects = [
                self.maker.describe(sample)
                for samples, losses in batches
                for sample, value in zip(samples, losses.tolist(), strict=True)
                if not math.isfinite(value)
            ]
            whose = ", ".join(suspects[:SUSPECTS_NAMED]) + (", ..." if len(suspects) > SUSPECTS_NAMED else "")
            raise UserError(
                f"The loss of step {step} is {loss}, by {whose or 'samples of another process'}; lower "
                "--learning_rate or check these photos. Checkpoints written so far are intact."
            )
        return [sample for samples, _ in batches for sample in samples]


def quarter_means(sums: torch.Tensor, timesteps: torch.Tensor) -> dict[str, float]:
    """Mean loss by range of timesteps, where there were samples.

    Args:
        sums: Of :meth:`SampleLosses.by_quarter`, added up over batches and processes.
        timesteps: The scheduler's training timesteps.
    """
    edges = [float(timesteps.max()) * quarter / QUARTERS for quarter in range(QUARTERS + 1)]
    values: Sequence[float] = sums.tolist()
    return {
        f"{edges[quarter]:.0f}-{edges[quarter + 1]:.0f}": values[quarter] / values[QUARTERS + quarter]
        for quarter in range(QUARTERS)
        if values[QUARTERS + quarter]
    }
