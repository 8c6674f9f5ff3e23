"""What the steps of a run came to: losses, seconds and memory, for its display, trackers, checkpoints and report."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..data.sample_plan import Sample
from ..residuals.batches import SampleMaker
from ..utils.device_memory import device_memory
from ..utils.errors import UserError


QUARTERS = 4
"""Ranges of timesteps whose mean losses are told apart."""
SUSPECTS_NAMED = 4


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Attributes:
        number: From 1.
        loss: Mean over batches and processes.
        samples: This process's samples of it.
        quarters: Mean loss by range of timesteps, over all processes.
        received: Number of a signal that some process got, or 0.
    """

    number: int
    loss: float
    samples: list[Sample]
    quarters: dict[str, float]
    received: int


class History:
    """The optimiser steps of a run so far.

    Args:
        accelerator: Gathers losses of all processes.
        maker: Knows samples and timesteps.

    Attributes:
        step: Optimiser steps done.
        losses: Loss of each of them.
        loss_by_timestep: Steps and their mean loss by range of timesteps.
        step_seconds: Seconds of each step of this process; of a run that goes on, those that its checkpoint kept too.
        step_memory: What :func:`~blockskip_hooks.utils.device_memory.device_memory` says after each; empty without
            a device.
        legs: From which step on it trained with which settings: ``step`` (steps done before), ``samples_per_step``
            and ``settings``. More than one where a run went on with others.
    """

    def __init__(self, accelerator: Accelerator, maker: SampleMaker) -> None:
        self.step = self._clocked = 0
        self.losses: list[float] = []
        self.loss_by_timestep: dict[str, list[tuple[int, float]]] = {}
        self.step_seconds: list[float] = []
        self.step_memory: list[tuple[int, int]] = []
        self.legs: list[dict[str, Any]] = []
        self._accelerator, self._maker, self._timesteps = accelerator, maker, maker.plan.timesteps
        # Of the running step's batches: samples with their losses, and figures of all processes.
        self._batches: list[tuple[list[Sample], torch.Tensor]] = []
        self._gathered: list[torch.Tensor] = []
        self._since = time.perf_counter()

    def begin_leg(self, settings: Mapping[str, Any], samples_per_step: int) -> None:
        """Train the steps that follow with these settings."""
        leg = {"step": self.step, "samples_per_step": samples_per_step, "settings": dict(settings)}
        kept = [leg for leg in self.legs if leg["step"] < self.step]
        same = kept and all(kept[-1][name] == leg[name] for name in ("samples_per_step", "settings"))
        self.legs = kept if same else [*kept, leg]

    @property
    def samples(self) -> int:
        """Samples of a kind that were trained on, over all processes."""
        ends = [*(leg["step"] for leg in self.legs[1:]), self.step]
        return sum(leg["samples_per_step"] * (end - leg["step"]) for leg, end in zip(self.legs, ends))

    def state(self) -> dict[str, Any]:
        """All of it for a checkpoint, as JSON takes it."""
        seconds, memory = self.step_seconds, self.step_memory
        if self._clocked < self.step:
            # A checkpoint is written before the clock of its step stops.
            seconds = [*seconds, time.perf_counter() - self._since]
            memory = [*memory, *filter(None, [device_memory()])]
        return {
            "loss": self.losses,
            "loss_by_timestep": self.loss_by_timestep,
            "step_seconds": seconds,
            "step_memory": memory,
            "legs": self.legs,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on after ``state["step"]`` steps with what :meth:`state` kept of them; older checkpoints have less."""
        self.step, self.losses = state["step"], list(state["loss"])
        self._clocked = self.step
        by_timestep = state.get("loss_by_timestep", {})
        self.loss_by_timestep = {name: [(step, loss) for step, loss in points] for name, points in by_timestep.items()}
        self.step_seconds = list(state.get("step_seconds", ()))
        self.step_memory = [(allocated, reserved) for allocated, reserved in state.get("step_memory", ())]
        self.legs = list(state.get("legs", self.legs))

    def start_clock(self) -> None:
        """Let the seconds of the next step begin now."""
        self._since = time.perf_counter()

    def add_batch(self, samples: list[Sample], losses: torch.Tensor, loss: torch.Tensor, received: int) -> None:
        """Add a batch of the running step; every process must call this.

        Args:
            samples: The batch's samples.
            losses: Their losses, ``(B,)``.
            loss: What was trained on, a number.
            received: Number of the signal that this process got, or 0: processes that get one between different
                steps must end after the same step.
        """
        losses = losses.detach()
        self._batches.append((samples, losses))
        timesteps = self._timesteps[[sample.timestep_index for sample in samples]]
        quarters = (timesteps / self._timesteps.max() * QUARTERS).ceil().long().sub(1).clamp(0, QUARTERS - 1)
        members = torch.nn.functional.one_hot(quarters, QUARTERS).to(losses)
        # Sums of the losses in each quarter of the timesteps, and their numbers.
        figures = [loss.detach()[None], torch.full_like(loss, received)[None], losses @ members, members.sum(0)]
        self._gathered.append(self._accelerator.gather(torch.cat(figures)[None]))

    def end_step(self) -> Step:
        """End the running step.

        Raises:
            UserError: if its loss is not finite, naming the samples.
        """
        # (batches, processes, 2 + 2 * QUARTERS), in one read: every read lets a device's queue of work run dry.
        figures, self._gathered = torch.stack(self._gathered).cpu(), []
        # Rounded as if the loss alone were averaged: a run's losses do not depend on what else is looked at.
        loss = figures[:, :, 0].mean(1).mean().item()
        batches, self._batches = self._batches, []
        if not math.isfinite(loss):
            raise self._not_finite(loss, batches)
        self.step += 1
        self.losses.append(loss)
        quarters = quarter_means(figures[:, :, -2 * QUARTERS :].sum((0, 1)), self._timesteps)
        for timesteps, mean in quarters.items():
            self.loss_by_timestep.setdefault(timesteps, []).append((self.step, mean))
        samples = [sample for samples, _ in batches for sample in samples]
        return Step(self.step, loss, samples, quarters, received=int(figures[-1, :, 1].max().item()))

    def _not_finite(self, loss: float, batches: list[tuple[list[Sample], torch.Tensor]]) -> UserError:
        """What is said of the running step's loss, with the samples that made it so."""
        suspects = [
            self._maker.describe(sample)
            for samples, losses in batches
            for sample, value in zip(samples, losses.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        whose = ", ".join(suspects[:SUSPECTS_NAMED]) + (", ..." if len(suspects) > SUSPECTS_NAMED else "")
        return UserError(
            f"The loss of step {self.step + 1} is {loss}, by {whose or 'samples of another process'}; lower "
            "--learning_rate or check these photos. Checkpoints written so far are intact."
        )

    def stop_clock(self) -> None:
        """Take the seconds and the memory of the step that ended, with all that was done after it."""
        self.step_seconds.append(time.perf_counter() - self._since)
        self._clocked = self.step
        if memory := device_memory():
            self.step_memory.append(memory)
        self.start_clock()


def quarter_means(sums: torch.Tensor, timesteps: torch.Tensor) -> dict[str, float]:
    """Mean loss by range of timesteps, where there were samples.

    Args:
        sums: Sums of the losses in each quarter of the timesteps, then their numbers, ``(2 * QUARTERS,)``.
        timesteps: The scheduler's training timesteps.
    """
    edges = [float(timesteps.max()) * quarter / QUARTERS for quarter in range(QUARTERS + 1)]
    values: list[float] = sums.tolist()
    return {
        f"{edges[quarter]:.0f}-{edges[quarter + 1]:.0f}": values[quarter] / values[QUARTERS + quarter]
        for quarter in range(QUARTERS)
        if values[QUARTERS + quarter]
    }
