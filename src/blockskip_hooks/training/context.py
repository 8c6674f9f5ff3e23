"""What every part of a run needs: processes, measurements, signals and the display."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from ..utils.monitor import StageMonitor
from ..utils.progress import SILENT, RunProgress
from .stop_signals import StopSignals


@dataclass(frozen=True)
class Context:
    """The surroundings of a run.

    Attributes:
        accelerator: Devices, processes and precision.
        monitor: Measures stages.
        stop: Signals that ask the run to end; by default none do.
        progress: Shows how far the run is; by default nothing is shown.
    """

    accelerator: Accelerator
    monitor: StageMonitor = field(default_factory=StageMonitor)
    stop: StopSignals = field(default_factory=StopSignals)
    progress: RunProgress = SILENT

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes call this with; every process must call it."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def check_stop_together(self) -> None:
        """End in every process once one was asked to: none may wait in a forward that another does not do.

        Raises:
            Interrupted: if some process got a signal.
        """
        self.stop.check(self.largest(self.stop.received))
