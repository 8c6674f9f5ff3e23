"""Saves and resumes a run."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.files import save_tensors
from .adapters import Adapters
from .checkpoints import (
    STRETCH_NAME,
    load_stretch,
    load_training_state,
    new_checkpoint,
    save_training_state,
    use_settings,
)
from .context import Context
from .history import History
from .lora_checks import check_finite
from .records import RecordSource
from .resume_checks import ADVICE, made_with
from .resume_flags import changing_flags
from .run import Run
from .stop_signals import Interrupted


logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes ``checkpoint-N`` folders, complete or absent, and goes on from one.

    Args:
        run: The run, its seed resolved.
        context: Its surroundings.
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
        context: Context,
        adapters: Adapters,
        optimizer: Any,
        lr_scheduler: Any,
        history: History,
        records: RecordSource,
    ) -> None:
        self._run, self._context, self._adapters = run, context, adapters
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._history, self._records = history, records
        self.after_save: Callable[[], None] = lambda: None
        self._saved_step = 0
        self._samples_per_step = run.samples_per_step(context.accelerator.num_processes)
        # Checkpoints of before have none.
        self._run_id: str | None = uuid.uuid4().hex
        history.begin_leg(changing_flags(run), self._samples_per_step)

    def save(self) -> None:
        """Write ``checkpoint-N`` of the steps so far."""
        run, history, records = self._run, self._history, self._records
        self._saved_step = history.step
        accelerator = self._context.accelerator
        if not accelerator.is_main_process:
            return
        check_finite(*self._adapters.modules)
        with new_checkpoint(run.output_dir, history.step, run.settings.checkpoints_total_limit) as folder:
            self._adapters.save(folder)
            numbers = {
                "step": history.step,
                "seed": run.settings.seed,
                "stretch_steps": records.stretches.length,
                "num_processes": accelerator.num_processes,
                "samples_per_step": self._samples_per_step,
                **history.state(),
                "records_made": records.count.until(history.step),
                "stages": self._context.monitor.as_list(),
                "grad_scaler": accelerator.scaler and accelerator.scaler.state_dict(),
                "saved_at": time.time(),
                "run": self._run_id,
                "made_with": self._made_with,
            }
            save_training_state(folder, self._optimizer, self._lr_scheduler, **numbers)
            if records.stretch_adapters:
                save_tensors(records.stretch_adapters, folder / STRETCH_NAME)
        self.after_save()

    @functools.cached_property
    def _made_with(self) -> dict[str, Any]:
        """With the class photos, which a run makes itself before it trains."""
        made = made_with(self._run)
        if "class" in self._records.maker.sources:
            photos = self._records.maker.sources["class"].photos
            made["class_photos"] = [photos.digest(number) for number in range(len(photos))]
        return made

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, with the same number of processes or another, as the flags say from now on.

        Raises:
            UserError: if it belongs to other settings.
        """
        accelerator, scheduler = self._context.accelerator, self._lr_scheduler.scheduler
        self._adapters.load(checkpoint)
        wanted = self._optimizer.state_dict()["param_groups"]
        state = load_training_state(checkpoint, self._optimizer, self._lr_scheduler)
        made = self._made_with
        if state.get("made_with", {}).get("class_photos", made.get("class_photos")) != made.get("class_photos"):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} was made on other photos in --class_data_dir; {ADVICE}"
            )
        # accelerate counts the schedule in steps of all processes.
        scheduler.last_epoch = (
            scheduler.last_epoch * accelerator.num_processes // state.get("num_processes", accelerator.num_processes)
        )
        use_settings(self._optimizer, wanted, scheduler)
        if accelerator.scaler and state.get("grad_scaler"):
            accelerator.scaler.load_state_dict(state["grad_scaler"])
        then, now = state.get("samples_per_step", self._samples_per_step), self._samples_per_step
        self._history.resume(state)
        self._history.begin_leg(changing_flags(self._run), now)
        self._context.monitor.add(state.get("stages", ()))
        # Checkpoints of before know of none.
        self._records.count.resume(tuple(state.get("records_made", (0, 0))))
        if self._run.refreshes:
            self._records.stretch_adapters = load_stretch(checkpoint, self._adapters.parameters)
        self._saved_step, self._run_id = state["step"], state.get("run")
        if then != now and accelerator.is_main_process:
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
