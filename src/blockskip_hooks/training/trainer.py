"""The training loop: precompute a stretch, train on it, save; everything random comes from the sample plan."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import free_memory
from torch.utils.data import DataLoader

from ..data.sample_plan import Sample, derived_seed
from ..families.prompts import TrainedText
from ..hooks import SpanResiduals
from ..inference.generate import VaePlacement
from ..lora import WEIGHTS_NAME, add_lora, load_lora, save_lora
from ..losses import combine_losses, flow_matching_loss
from ..reporting.trackers import Tracking
from ..residuals.batches import Batch, RecordDataset, SampleMaker, collate_by_kind, read_ahead
from ..residuals.precompute import capture, encode_latents, only_new_garbage, precompute_records
from ..residuals.store import DamagedRecord, Record, ResidualStore, tensors_digest
from ..residuals.stretches import Stretches
from ..transformer import DiTBlockSkipTransformer
from ..utils.files import save_tensors
from ..utils.monitor import StageMonitor, device_memory
from ..utils.progress import SILENT, RunProgress, StageProgress
from .checkpoints import (
    STRETCH_NAME,
    clear_unfinished,
    load_stretch,
    load_training_state,
    new_checkpoint,
    save_training_state,
)
from .comfyui import write_comfyui
from .lora_checks import check_finite, check_gradients, check_learned
from .merged import export_merged
from .optimizers import make_optimizer
from .resume_checks import made_with
from .run import Run
from .sample_losses import QUARTERS, SampleLosses, quarter_means
from .sharding import average_gradients
from .stop_signals import Interrupted, StopSignals


if TYPE_CHECKING:
    from .validation import Images

logger = logging.getLogger(__name__)


class Trainer:
    """One run's model, optimiser and progress.

    Args:
        run: Settings.
        accelerator: Devices, processes and precision.
        monitor: Measures stages.
        maker: Builds batches.
        model: The transformer with only its kept blocks loaded.
        text: The text encoders that train along, if any.
        store: Records, or ``None`` when crops are encoded in every step.
        stretches: Which steps share a precompute, and what each trains on.
        images_at_once: Validation images per call of the pipeline; by default all of a prompt.
        vae_placement: How the VAE works in the stages "precompute" and "validate".
        stop: Signals that ask the run to end; by default none do.
        progress: Shows how far the run is; by default nothing is shown.

    Attributes:
        step: Optimiser steps done.
        losses: Loss of each of them.
        loss_by_timestep: Steps and their mean loss by range of timesteps, of those since the run began or went on.
        step_seconds: Seconds of each step of this process.
        step_memory: What `device_memory` said after each of them; empty without a device.
        records_made: Records of samples that this process has computed.
        shown_images: The validation images that were made last: their step, prompts, the base model's and the LoRA's.
        after_checkpoint: Called by the main process whenever a checkpoint is complete.
        recorded_samples: Samples of this process in the latest stretch.
        largest_capture: How many of them may run through the whole model at a time.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        monitor: StageMonitor,
        maker: SampleMaker,
        model: DiTBlockSkipTransformer,
        text: TrainedText | None,
        store: ResidualStore | None,
        stretches: Stretches,
        images_at_once: int | None = None,
        vae_placement: Mapping[str, VaePlacement] | None = None,
        stop: StopSignals | None = None,
        progress: RunProgress = SILENT,
    ) -> None:
        args, seed = run.settings, maker.plan.seed
        self.run, self.accelerator, self.monitor, self.maker = run, accelerator, monitor, maker
        self.model, self.store = model, store
        self.stretches, self.max_train_steps = stretches, stretches.num_steps
        self.images_at_once, self.vae_placement = images_at_once, vae_placement or {}
        self.stop, self.progress = stop or StopSignals(), progress
        self.tracking = Tracking(accelerator, monitor, model)
        self.step = self._saved_step = 0
        self.records_made = 0
        self.recorded_samples: list[Sample] = []
        self.largest_capture = 1
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.loss_by_timestep: dict[str, list[tuple[int, float]]] = {}
        self.shown_images: tuple[int, list[str], Images, Images] | None = None
        self.after_checkpoint: Callable[[], None] = lambda: None
        self.step_memory: list[tuple[int, int]] = []
        # The LoRA that the stretch's records were made with, by the number of the parameter.
        self._stretch_adapters: dict[str, torch.Tensor] = {}
        self._sample_losses = SampleLosses(maker)
        self._records_of_stretch: Callable[[], None] = lambda: None
        self.samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes

        adapter: dict[str, Any] = {
            "rank": args.rank,
            "alpha": args.lora_alpha,
            "dropout": args.lora_dropout,
            "seed": seed,
        }
        self.parameters = add_lora(model.transformer, run.targets, **adapter)
        self.text = text
        # As they were made: what accelerate wraps is not what is saved.
        self.text_encoders: dict[str, Any] = dict(text.encoders) if text else {}
        text_parameters: list[torch.nn.Parameter] = []
        for encoder in self.text_encoders.values():
            text_parameters += add_lora(encoder, run.family.text_lora_layers, **adapter)
        if args.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
            for encoder in self.text_encoders.values():
                encoder.gradient_checkpointing_enable()

        rate = args.learning_rate * (self.samples_per_step if args.scale_lr else 1)
        optimizer = make_optimizer(args, self.parameters, text_parameters, rate)
        scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=self.max_train_steps * accelerator.num_processes,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        self.parameters = self.parameters + text_parameters
        # Every process has the same weights already, and they cannot all be sent: those of skipped blocks are not
        # there, quantised ones are no plain tensors.
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, model.frozen_parameter_names
        )
        # accelerate must not move the model either: kept blocks are in place.
        self.wrapped = (
            average_gradients(accelerator, model)
            if model.is_sharded
            else accelerator.prepare(model, device_placement=[False])
        )
        self.optimizer, self.scheduler = accelerator.prepare(optimizer, scheduler)
        self.trained = [self.wrapped]
        if text:
            text.encoders = {name: accelerator.prepare(encoder) for name, encoder in text.encoders.items()}
            self.trained += text.encoders.values()
        # Without records every step encodes its crops, so the VAE stays.
        self._resident_vae = run.family.load_vae(maker.dtype, accelerator.device) if store is None else None

    @contextlib.contextmanager
    def vae(self) -> Iterator[ModelMixin]:
        """The VAE, loaded for this context only unless every step needs it."""
        vae = self._resident_vae or self.run.family.load_vae(self.maker.dtype, self.accelerator.device)
        try:
            yield vae
        finally:
            del vae
            free_memory()

    def precompute(self, steps: range, batch_size: int | None = None) -> None:
        """Make this process's records of a stretch, where they are missing.

        Args:
            steps: The whole stretch, also when part of it has been trained: records then come out of the same
                batches, and with the same last bits, as in a run that was never stopped.
            batch_size: Samples per forward; halved when memory runs out.
        """
        if self.store is None:
            return
        recorded = self.stretches.recorded(steps)
        if len(self.stretches) > 1:
            # A run that was killed behind its last checkpoint left records of a later stretch.
            self.store.drop_others(sample.id for sample in self.maker.samples(self._indices(recorded)))
        samples = self.recorded_samples = self.maker.samples(self._my_indices(recorded))
        self.largest_capture = batch_size or 1
        if self.run.refreshes:
            self._begin_refreshed(steps)
        self._records_of_stretch = functools.partial(self._make_records, samples, steps, batch_size)
        with self.stop.held(), self.monitor.stage("precompute"):
            ids = [key for s in samples for key in (s.id, self.maker.modulation_id(s))]
            for problem in self.store.verify(dict.fromkeys(ids)):
                logger.warning("%s; its records are computed again.", problem)
            self._records_of_stretch()

    def _make_records(self, samples: list[Sample], stretch: range, batch_size: int | None) -> None:
        """Make those of the stretch's records that are missing, in the stretch's batches."""
        assert self.store is not None
        with self.accelerator.autocast(), only_new_garbage(), self._adapters_of_stretch():
            present = sum(self.maker.is_recorded(sample, self.store) for sample in samples)
            alone = self.vae_placement.get("precompute", VaePlacement()).alone
            place = self.model.on_host() if alone else contextlib.nullcontext()
            sharded = self.model.is_sharded
            # Of all stretches, so that the whole run has one display of this stage.
            each_step = len(samples) // len(self.stretches.recorded(stretch))
            done, total = (
                each_step * steps
                for steps in (self.stretches.recorded_before(stretch), self.stretches.num_recorded_steps)
            )
            with self.progress.stage("precompute", done, photos=total, records=total) as progress:
                progress.skip(present)
                with place, self.vae() as vae:
                    latents = encode_latents(
                        samples,
                        maker=self.maker,
                        vae=vae,
                        store=self.store,
                        batch_size=batch_size,
                        progress=progress,
                        between_batches=(lambda: None) if sharded else self.stop.check,
                    )
                progress.begin("records")
                self.records_made += precompute_records(
                    samples,
                    latents,
                    model=self.model,
                    maker=self.maker,
                    store=self.store,
                    batch_size=batch_size,
                    with_residuals=self.run.stores_residuals,
                    with_adapters=self.run.refreshes,
                    progress=progress,
                    between_batches=self.check_stop_together if sharded else self.stop.check,
                    forwards=self.largest if sharded else None,
                )

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes call this with, which all of them must."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def check_stop_together(self) -> None:
        """End in every process once one was asked to: none may wait in a forward that another does not do."""
        self.stop.check(self.largest(self.stop.received))

    def train(self, steps: range) -> None:
        """Train the given optimiser steps; the records that they use must be in the store."""
        args, accelerator = self.run.settings, self.accelerator
        loader = accelerator.prepare(
            DataLoader(
                RecordDataset(self.maker, self.store, self._indices(map(self.stretches.source, steps))),
                batch_size=args.train_batch_size,
                collate_fn=collate_by_kind,
                num_workers=args.dataloader_num_workers,
            )
        )
        for module in self.trained:
            module.train()
        # Records alone: crops are computed, and two threads that compute take the cores from each other.
        reads_ahead = self.store is not None and not args.dataloader_num_workers
        with (
            self.stop.held(),
            self.monitor.stage("train"),
            self.progress.stage("train", self.step, steps=self.max_train_steps) as progress,
        ):
            started, micro_figures, norm = time.perf_counter(), [], None
            for samples, payloads in read_ahead(loader) if reads_ahead else loader:
                if args.lora_dropout:
                    torch.manual_seed(derived_seed(self.maker.plan.seed, "dropout", samples[0].id))
                with accelerator.accumulate(*self.trained):
                    loss = self._loss(self._batch(samples, payloads))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        if self.step == 0:
                            for module in (self.model.transformer, *self.text_encoders.values()):
                                check_gradients(module)
                        norm = accelerator.clip_grad_norm_(self.parameters, args.max_grad_norm)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                # Processes that get a signal between different steps must end after the same one.
                asked = torch.full_like(loss, self.stop.received)
                figures = [torch.stack([loss.detach(), asked]), self._sample_losses.by_quarter()]
                gathered = accelerator.gather(torch.cat(figures)[None])
                micro_figures.append(gathered)
                if accelerator.sync_gradients:
                    self._finish_step(torch.stack(micro_figures), norm, progress)
                    self.stop.check(int(gathered[:, 1].max().item()))
                    self.step_seconds.append(time.perf_counter() - started)
                    if memory := device_memory():
                        self.step_memory.append(memory)
                    started, micro_figures, norm = time.perf_counter(), [], None

    def _batch(self, samples: list[Sample], payloads: list[Record | None]) -> Batch:
        if self.store is not None:
            records = [payload or self._recompute(sample) for sample, payload in zip(samples, payloads)]
            batch = self.maker.batch_from_records(samples, records)
        else:
            assert self._resident_vae is not None
            crops = torch.stack([payload["pixels"] for payload in payloads if payload])
            batch = self.maker.batch(samples, self.maker.encode(self._resident_vae, samples, crops))
        if self.text:
            tokens = self.text.batch_tokens(batch.prompts, self.accelerator.device)
            batch.embeds = self.run.family.refresh_embeds(self.text.encoders, tokens, batch.embeds)
        if self.run.skips and self.run.config.residuals == "none":
            batch.residuals = SpanResiduals()
        elif self.run.skips and self.run.config.residuals == "online":
            with self.accelerator.autocast():
                batch.residuals = capture(self.model, self.maker, batch)
        return batch

    def _recompute(self, sample: Sample) -> Record:
        """The record of a sample that could not be read: made again by the forward that made it, to the same bits."""
        assert self.store is not None
        ids = [sample.id, *([self.maker.modulation_id(sample)] if self.maker.records_modulation else [])]
        for sample_id in ids:
            try:
                self.store.read(sample_id)
            except KeyError:
                pass
            except DamagedRecord as error:
                logger.warning("%s; its records are computed again.", error)
                self.store.forget(sample_id)
        if self.model.is_sharded:
            raise OSError(
                f"{self.store.directory}: the record of {self.maker.describe(sample)} cannot be read, and processes "
                "that share weights make records together only; the same command with --resume_from_checkpoint latest "
                "makes it again."
            )
        if not self.maker.is_recorded(sample, self.store):
            self._records_of_stretch()
        return self.maker.read_record(sample, self.store)

    def _loss(self, batch: Batch) -> torch.Tensor:
        args, family = self.run.settings, self.run.family
        inputs = family.transformer_inputs(self.model.config, batch.noisy_latents, batch.timesteps, batch.embeds)
        prediction = self.wrapped(**inputs, residuals=batch.residuals, return_dict=False)[0]
        losses = self.each_loss(prediction, batch)
        self._sample_losses.add(batch.samples, losses)
        return combine_losses(losses, args.with_prior_preservation, args.prior_loss_weight)

    def each_loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss of each sample, ``(B,)``, from what the transformer returns."""
        family = self.run.family
        prediction, target = family.loss_terms(
            family.prediction_to_latents(prediction, batch.latents),
            latents=batch.latents,
            noise=batch.noise,
            noisy_latents=batch.noisy_latents,
            sigmas=batch.sigmas,
        )
        return flow_matching_loss(prediction, target, batch.sigmas, self.run.settings.weighting_scheme)

    def _finish_step(self, figures: torch.Tensor, norm: torch.Tensor | None, progress: StageProgress) -> None:
        """Take the figures of a step's batches in every process, ``(batches, processes, 2 + 2 * QUARTERS)``."""
        # Rounded as if the loss alone were averaged: a run's losses do not depend on what else is looked at.
        loss = figures[:, :, 0].mean(1).mean().item()
        samples = self._sample_losses.end_step(self.step + 1, loss)
        self.step += 1
        self.losses.append(loss)
        seen = {"loss": loss, "lr": self.scheduler.get_last_lr()[0]}
        if norm is not None:
            seen["grad_norm"] = float(norm)
        quarters = quarter_means(figures[:, :, -2 * QUARTERS :].sum((0, 1)), self.maker.plan.timesteps)
        for timesteps, mean in quarters.items():
            self.loss_by_timestep.setdefault(timesteps, []).append((self.step, mean))
        self.tracking.log_step(self.step, samples, seen, quarters)
        progress.update(loss=loss)
        if self.step % self.run.settings.checkpointing_steps == 0:
            self.save_checkpoint()

    @contextlib.contextmanager
    def saving_when_stopped(self) -> Iterator[None]:
        """Within this context a signal that ends the run loses no step.

        Raises:
            Interrupted: again, with how to go on.
        """
        try:
            yield
        except Interrupted as error:
            if self.step > self._saved_step:
                self.save_checkpoint()
            start = "the records made so far" if self.store is not None else "its start"
            raise Interrupted(error.number, f"checkpoint-{self.step}" if self.step else start) from None

    def save_checkpoint(self) -> None:
        """Write ``checkpoint-N``; complete or absent."""
        self._saved_step = self.step
        if not self.accelerator.is_main_process:
            return
        for module in (self.model.transformer, *self.text_encoders.values()):
            check_finite(module)
        with new_checkpoint(self.run.output_dir, self.step, self.run.settings.checkpoints_total_limit) as folder:
            save_lora(folder, type(self.run.family), self.model.transformer, self.text_encoders)
            save_training_state(
                folder,
                self.optimizer,
                self.scheduler,
                step=self.step,
                seed=self.maker.plan.seed,
                stretch_steps=self.stretches.length,
                num_processes=self.accelerator.num_processes,
                samples_per_step=self.samples_per_step,
                loss=self.losses,
                made_with=made_with(self.run),
            )
            if self._stretch_adapters:
                save_tensors(self._stretch_adapters, folder / STRETCH_NAME)
        self.after_checkpoint()

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, with the same number of processes or another.

        Raises:
            ValueError: if it belongs to other settings.
        """
        load_lora(checkpoint, type(self.run.family), self.model.transformer, self.text_encoders)
        state = load_training_state(checkpoint, self.optimizer, self.scheduler)
        self.step, self.losses = state["step"], list(state["loss"])
        if self.run.refreshes:
            self._stretch_adapters = load_stretch(checkpoint, self.parameters)
        self._saved_step = self.step
        # accelerate counts the schedule in steps of all processes.
        self.scheduler.scheduler.last_epoch = self.step * self.accelerator.num_processes
        samples = state.get("samples_per_step", self.samples_per_step)
        if samples != self.samples_per_step and self.accelerator.is_main_process:
            logger.warning(
                "--resume_from_checkpoint %s: its steps had %d samples, this run's have %d; choose --train_batch_size "
                "or --gradient_accumulation_steps so that they are equal to go on as the run began.",
                checkpoint,
                samples,
                self.samples_per_step,
            )

    def add_up_records(self) -> None:
        """Count what all processes have made, for the report."""
        made = [self.records_made, self.store.bytes_written if self.store else 0]
        total = self.accelerator.reduce(torch.tensor(made, device=self.accelerator.device), "sum").tolist()
        self.records_made = total[0]
        if self.store:
            self.store.bytes_written = total[1]

    def export(self) -> None:
        """Write the final LoRA in the dtype of the base weights, or float32 with ``--upcast_before_saving``.

        Raises:
            ValueError: if some LoRA has not learnt anything.
        """
        # A warmup's first step has rate zero.
        if self.step > 1:
            for module in (self.model.transformer, *self.text_encoders.values()):
                check_learned(module)
        if self.accelerator.is_main_process:
            clear_unfinished(self.run.output_dir)
            dtype = torch.float32 if self.run.settings.upcast_before_saving else self.maker.dtype
            save_lora(
                self.run.output_dir, type(self.run.family), self.model.transformer, self.text_encoders, dtype=dtype
            )
            if self.run.settings.save_format == "comfyui":
                write_comfyui(self.run.output_dir, type(self.run.family))
            if self.run.settings.export_merged:
                with self.monitor.stage("merge"):
                    folder, output = self.run.family.model_path / "transformer", self.run.output_dir
                    export_merged(folder, output / WEIGHTS_NAME, output, self.run.settings.variant)

    @torch.no_grad()
    def refresh_embeds(self, embeds: dict, prompts: list[str]) -> None:
        """Put the embeddings that the text encoders make now in place of those of some prompts."""
        assert self.text is not None
        for prompt in prompts:
            tokens = self.text.batch_tokens([prompt], self.accelerator.device)
            batched = {name: tensor[None] for name, tensor in embeds[prompt].items()}
            fresh = self.run.family.refresh_embeds(self.text.encoders, tokens, batched)
            embeds[prompt] = {name: tensor[0].cpu() for name, tensor in fresh.items()}

    def _begin_refreshed(self, stretch: range) -> None:
        """Let the stretch's records be made with the LoRA as it was when the stretch began.

        A run that is resumed in the middle of a stretch has it from the checkpoint, and may have lost some records.
        """
        assert self.store is not None
        if self.step == stretch.start:
            self._stretch_adapters = self._current_adapters()
        with self.accelerator.main_process_first():
            self.store.begin_stretch(tensors_digest(self._stretch_adapters))

    @contextlib.contextmanager
    def _adapters_of_stretch(self) -> Iterator[None]:
        """Within this context the LoRA is the one that the stretch's records are made with."""
        if not self.run.refreshes:
            yield
            return
        now = self._current_adapters()
        self._set_adapters(self._stretch_adapters)
        try:
            if self.text:
                self.refresh_embeds(self.maker.embeds, list(self.maker.embeds))
            yield
        finally:
            self._set_adapters(now)

    def _current_adapters(self) -> dict[str, torch.Tensor]:
        return {str(number): p.detach().cpu().clone() for number, p in enumerate(self.parameters)}

    @torch.no_grad()
    def _set_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(values[str(number)])

    def _indices(self, steps: Iterable[int]) -> list[int]:
        """Numbers in the sample plan of the samples of these steps, over all processes."""
        size = self.samples_per_step
        return [index for step in steps for index in range(step * size, (step + 1) * size)]

    def _my_indices(self, steps: range) -> list[int]:
        """This process's share of the samples, dealt out as the training loader deals them."""
        indices: Any = self._indices(steps)
        loader: DataLoader = DataLoader(indices, batch_size=self.run.settings.train_batch_size)
        return [index for batch in self.accelerator.prepare(loader) for index in batch.tolist()]
