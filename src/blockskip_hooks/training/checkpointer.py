"""Saves and resumes a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..utils.files import save_tensors
from .adapters import Adapters
from .checkpoints import STRETCH_NAME, load_stretch, load_training_state, new_checkpoint, save_training_state
from .history import History
from .records import RecordSource
from .resume_checks import made_with
from .run import Run
from .stop_signals import Interrupted


logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes ``checkpoint-N`` folders, complete or absent, and goes on from one.

    Args:
        run: The run, its seed resolved.
        accelerator: Its processes.
        adapters: The LoRA.
        optimizer: What trains it.
        lr_scheduler: Its learning rate, as accelerate prepared it.
        history: The steps so far.
        records: Where the batches come from.

    Attributes:
        after_save: Called by the main process whenever a checkpoint is complete.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        adapters: Adapters,
        optimizer: Any,
        lr_scheduler: Any,
        history: History,
        records: RecordSource,
    ) -> None:
        self._run, self._accelerator, self._adapters = run, accelerator, adapters
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._history, self._records = history, records
        self.after_save: Callable[[], None] = lambda: None
        self._saved_step = 0

    def save(self) -> None:
        """Write ``checkpoint-N`` of the steps so far."""
        run, history, records = self._run, self._history, self._records
        self._saved_step = history.step
        if not self._accelerator.is_main_process:
            return
        self._adapters.check_finite()
        with new_checkpoint(run.output_dir, history.step, run.settings.checkpoints_total_limit) as folder:
            self._adapters.save(folder)
            save_training_state(
                folder,
                self._optimizer,
                self._lr_scheduler,
                step=history.step,
                seed=run.settings.seed,
                stretch_steps=records.stretches.length,
                num_processes=self._accelerator.num_processes,
                samples_per_step=run.samples_per_step(self._accelerator.num_processes),
                loss=history.losses,
                made_with=made_with(run),
            )
            if records.stretch_adapters:
                save_tensors(records.stretch_adapters, folder / STRETCH_NAME)
        self.after_save()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, with the same number of processes or another.

        Raises:
            UserError: if it belongs to other settings.
        """
        self._adapters.load(checkpoint)
        state = load_training_state(checkpoint, self._optimizer, self._lr_scheduler)
        self._history.resume(state["step"], state["loss"])
        if self._run.refreshes:
            self._records.stretch_adapters = load_stretch(checkpoint, self._adapters.parameters)
        self._saved_step = state["step"]
        # accelerate counts the schedule in steps of all processes.
        self._lr_scheduler.scheduler.last_epoch = state["step"] * self._accelerator.num_processes
        now = self._run.samples_per_step(self._accelerator.num_processes)
        then = state.get("samples_per_step", now)
        if then != now and self._accelerator.is_main_process:
            logger.warning(
                "--resume_from_checkpoint %s: its steps had %d samples, this run's have %d; choose --train_batch_size "
                "or --gradient_accumulation_steps so that they are equal to go on as the run began.",
                checkpoint,
                then,
                now,
            )

    @contextlib.contextmanager
    def saving_when_stopped(self) -> Iterator[None]:
        """Within this context a signal that ends the run loses no step.

        Raises:
            Interrupted: again, with how to go on.
        """
        try:
            yield
        except Interrupted as error:
            step = self._history.step
            if step > self._saved_step:
                self.save()
            start = "the records made so far" if self._run.uses_store else "its start"
            raise Interrupted(error.number, f"checkpoint-{step}" if step else start) from None
