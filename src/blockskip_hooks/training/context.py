"""What every part of a run needs: processes, measurements, signals and the display."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from ..utils.accelerator import start_accelerator
from ..utils.monitor import StageMonitor
from ..utils.progress import SILENT, RunProgress
from .settings import TrainSettings
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


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Devices, processes, precision and trackers as the flags and the accelerate config ask for.

    Raises:
        UserError: see :func:`~blockskip_hooks.utils.accelerator.start_accelerator`.
    """
    if settings.allow_tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    return start_accelerator(
        settings.mixed_precision,
        plan_only=settings.plan_only,
        # Steps are counted, whatever the loader is at: it reads ahead.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # Without being told, accelerate would let each process of a machine without accelerators train on its own.
        cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available(),
        log_with=list(settings.report_to) or None,
        project_config=ProjectConfiguration(
            project_dir=settings.output_dir, logging_dir=str(settings.output_folder / settings.logging_dir)
        ),
    )
