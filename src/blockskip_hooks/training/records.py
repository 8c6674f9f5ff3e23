"""Where a run's batches come from: records made stretch by stretch, repaired where damaged, and read back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.training_utils import free_memory
from torch.utils.data import DataLoader

from ..data.sample_plan import Sample
from ..planning.plan import PlannedStage
from ..residuals.batches import SHARED_TEXT, Batch, SampleMaker
from ..residuals.loader import RecordDataset, collate_by_kind, read_ahead
from ..residuals.precompute import capture, encode_latents, only_new_garbage, precompute_records
from ..residuals.store import DamagedRecord, Record, ResidualStore, tensors_digest
from ..residuals.stretches import Stretches
from ..state import SpanResiduals
from ..transformer import DiTBlockSkipTransformer
from ..utils.seeds import derived_seed
from .adapters import Adapters
from .context import Context
from .record_count import RecordCount
from .run import Run


logger = logging.getLogger(__name__)

CHECKED = 4
"""Samples that the trailing approximation is looked at with, at most."""


class RecordSource:
    """Makes the records of a stretch before it is trained on, and the batches of its steps.

    Without a store nothing is recorded: every step encodes its crops, and the VAE stays loaded.

    Args:
        run: The run.
        context: Its surroundings.
        maker: Builds batches.
        model: The transformer with only its kept blocks loaded.
        adapters: The LoRA, which refreshed residuals follow.
        store: Takes the records, or ``None``.
        stretches: Which steps share a precompute, and what each trains on.

    Attributes:
        stretch_adapters: The LoRA that the stretch's records are made with, by parameter number: a checkpoint
            keeps it, so that a resumed run can repair them. Empty where residuals do not follow the LoRA.
        count: How many records were made.
    """

    def __init__(
        self,
        run: Run,
        context: Context,
        maker: SampleMaker,
        model: DiTBlockSkipTransformer,
        adapters: Adapters,
        store: ResidualStore | None,
        stretches: Stretches,
    ) -> None:
        self.maker, self.stretches = maker, stretches
        self._run, self._context, self._accelerator = run, context, context.accelerator
        self._model, self._adapters, self._store = model, adapters, store
        self._resident_vae = run.family.load_vae(maker.dtype, context.accelerator.device) if store is None else None
        self._stretch, self._samples = range(0), list[Sample]()
        self._planned = PlannedStage()
        self.stretch_adapters: dict[str, torch.Tensor] = {}
        self.count = RecordCount()

    @contextlib.contextmanager
    def vae(self) -> Iterator[ModelMixin]:
        """The VAE, loaded for this context only unless every step needs it; the caller lets go of it within."""
        vae = self._resident_vae or self._run.family.load_vae(self.maker.dtype, self._accelerator.device)
        try:
            yield vae
        finally:
            del vae
            free_memory()

    def precompute(self, stretch: range, first: int, planned: PlannedStage) -> None:
        """Make this process's records of a stretch, where they are missing.

        Args:
            stretch: The steps of the whole stretch, also when part of it has been trained: records then come out of
                the same batches, and on a CPU with the same last bits, as in a run that was never stopped.
            first: The first step that is still to be trained.
            planned: How the plan has it work. Samples per forward, which a flag may set, are halved when memory runs
                out; the transformer makes room while the VAE encodes, if that is to be alone.
        """
        store = self._store
        if store is None:
            return
        self.count.begin_stretch(stretch.start)
        recorded = self.stretches.recorded(stretch)
        if len(self.stretches) > 1:
            # A run that was killed behind its last checkpoint left records of a later stretch.
            wanted = self.maker.samples(self._indices(recorded))
            texts = {self.maker.shared_ids(sample).get(SHARED_TEXT, "") for sample in wanted}
            store.drop_others([*(sample.id for sample in wanted), *texts])
        self._stretch, self._samples = stretch, self.maker.samples(self._my_indices(recorded))
        batch_size = self._run.settings.precompute_batch_size or planned.batch_size
        self._planned = planned._replace(batch_size=batch_size)
        if self._run.refreshes:
            # One that is resumed in the middle of a stretch has the LoRA from the checkpoint.
            if first == stretch.start:
                self.stretch_adapters = self._adapters.values()
            with self._accelerator.main_process_first():
                store.begin_stretch(tensors_digest(self.stretch_adapters))
        with self._context.stop.held(), self._context.monitor.stage("precompute"):
            ids = [key for sample in self._samples for key in self.maker.record_ids(sample)]
            for problem in store.verify(dict.fromkeys(ids)):
                logger.warning("%s; its records are computed again.", problem)
            if self.count.goes_on and first == stretch.start:
                # Of the leg before, which was stopped before it trained on them: its checkpoint does not count them.
                present = sum(sample.id in store for sample in self._samples)
                self.count.add(present, store.num_bytes if self._accelerator.is_main_process else 0)
            self._make(store)
        self.count.together(self._accelerator)

    def _make(self, store: ResidualStore) -> None:
        """Make those of the stretch's records that are missing, in the stretch's batches."""
        samples, recorded = self._samples, self.stretches.recorded(self._stretch)
        context, model, sharded = self._context, self._model, self._model.is_sharded
        present = sum(sample.id in store for sample in samples)
        # Of all stretches, so that the whole run has one display of this stage.
        each_step = len(samples) // len(recorded)
        done = each_step * self.stretches.recorded_before(self._stretch)
        total = each_step * self.stretches.num_recorded_steps
        planned = self._planned
        common: dict[str, Any] = {"maker": self.maker, "store": store, "batch_size": planned.batch_size}
        with (
            self._accelerator.autocast(),
            only_new_garbage(),
            self._adapters_of_stretch(),
            context.progress.stage("precompute", done, crops=total, records=total) as progress,
        ):
            progress.skip(present)
            with model.on_host() if planned.vae.alone else contextlib.nullcontext(), self.vae() as vae:
                latents = encode_latents(
                    samples,
                    vae=vae,
                    progress=progress,
                    between_batches=(lambda: None) if sharded else context.stop.check,
                    **common,
                )
                # The transformer's forwards need the room.
                del vae
            progress.begin("records")
            written = store.bytes_written
            made = precompute_records(
                samples,
                latents,
                model=model,
                together=planned.together,
                with_residuals=self._run.stores_residuals,
                with_adapters=self._run.refreshes,
                progress=progress,
                between_batches=context.check_stop_together if sharded else context.stop.check,
                forwards=context.largest if sharded else None,
                **common,
            )
            self.count.add(made, store.bytes_written - written)

    @contextlib.contextmanager
    def _adapters_of_stretch(self) -> Iterator[None]:
        """Within this context the LoRA is the one that the stretch's records are made with."""
        if not self._run.refreshes:
            yield
            return
        with self._adapters.held_at(self.stretch_adapters):
            self.maker.embeds.update(self._adapters.current(self.maker.embeds, list(self.maker.embeds)))
            yield

    def loader(self, steps: range) -> Iterator[Batch]:
        """The batches of some optimiser steps, in order; the records that they use must have been made."""
        settings = self._run.settings
        loader = self._accelerator.prepare(
            DataLoader(
                RecordDataset(self.maker, self._store, self._indices(map(self.stretches.source, steps))),
                batch_size=settings.train_batch_size,
                collate_fn=collate_by_kind,
                num_workers=settings.dataloader_num_workers,
            )
        )
        # Records alone: crops are computed, and two threads that compute take the cores from each other.
        reads_ahead = self._store is not None and not settings.dataloader_num_workers
        for samples, payloads in read_ahead(loader) if reads_ahead else loader:
            if settings.lora_dropout:
                torch.manual_seed(derived_seed(self.maker.plan.seed, "dropout", samples[0].id))
            yield self._batch(samples, payloads)

    def _batch(self, samples: list[Sample], payloads: list[Record | None]) -> Batch:
        if self._store is not None:
            store = self._store
            records = [payload or self._repair(sample, store) for sample, payload in zip(samples, payloads)]
            return self.maker.batch_from_records(samples, records)
        assert self._resident_vae is not None
        crops = torch.stack([payload["pixels"] for payload in payloads if payload])
        return self.maker.batch(samples, self.maker.encode(self._resident_vae, samples, crops))

    def complete(self, batch: Batch) -> None:
        """Give a batch what no record holds: embeddings of text encoders that train, and residuals made online."""
        self._adapters.refresh(batch)
        if self._run.skips and self._run.config.residuals == "none":
            batch.residuals = SpanResiduals()
        elif self._run.skips and self._run.config.residuals == "online":
            with self._accelerator.autocast():
                batch.residuals = capture(self._model, self.maker, batch)

    def _repair(self, sample: Sample, store: ResidualStore) -> Record:
        """The record of a sample that could not be read, made again by the same forward; on a CPU to the same bits."""
        for sample_id in self.maker.record_ids(sample):
            try:
                store.read(sample_id)
            except KeyError:
                pass
            except DamagedRecord as error:
                logger.warning("%s; its records are computed again.", error)
                store.forget(sample_id)
        if self._model.is_sharded:
            raise OSError(
                f"{store.directory}: the record of {self.maker.describe(sample)} cannot be read, and processes "
                "that share weights make records together only; the same command with --resume_from_checkpoint latest "
                "makes it again."
            )
        if not self.maker.is_recorded(sample, store):
            self._make(store)
        return self.maker.read_record(sample, store)

    @torch.no_grad()
    def trailing_error(self) -> float | None:
        """How far recorded trailing residuals of a few samples are from what the span contributes with the LoRA now.

        Records are the base model's, or those of the LoRA as a refreshed stretch began; training goes on with them as
        if the trailing span added the same to whatever the kept blocks have come to say. Nothing of the training
        changes.

        Returns:
            Norm of the difference relative to that of the residual now; ``None`` if no record can be read.
        """
        store, maker, samples = self._store, self.maker, self._samples
        assert store is not None
        alike = [sample for sample in samples if maker.shape_key(sample) == maker.shape_key(samples[0])]
        chosen = alike[:: max(1, -(-len(alike) // min(CHECKED, self._planned.batch_size or 1)))]
        try:
            records = [maker.read_record(sample, store) for sample in chosen]
        except (KeyError, DamagedRecord):
            records = []
        # Processes that share weights run the model together or not at all.
        if self._context.largest(not records) if self._model.is_sharded else not records:
            return None
        batch = maker.batch_from_records(chosen, records)
        assert batch.residuals is not None and batch.residuals.trailing_hidden_states is not None
        recorded = batch.residuals.trailing_hidden_states.float()
        with self._adapters.without_dropout():
            self._adapters.refresh(batch)
        with self._accelerator.autocast():
            now = capture(self._model, maker, batch).trailing_hidden_states
        assert now is not None
        return ((now.float() - recorded).norm() / now.float().norm().clamp_min(1e-12)).item()

    def drop(self, *, store_too: bool = False) -> None:
        """Delete the records of the stretch, which no later one uses; at the end of a run, their store as well."""
        if self._store is not None:
            self._store.remove() if store_too else self._store.drop()

    def _indices(self, steps: Iterable[int]) -> list[int]:
        """Numbers in the sample plan of the samples of these steps, over all processes."""
        size = self._run.samples_per_step(self._accelerator.num_processes)
        return [index for step in steps for index in range(step * size, (step + 1) * size)]

    def _my_indices(self, steps: range) -> list[int]:
        """This process's share of the samples, dealt out as the training loader deals them."""
        indices: Any = self._indices(steps)
        loader: DataLoader = DataLoader(indices, batch_size=self._run.settings.train_batch_size)
        return [index for batch in self._accelerator.prepare(loader) for index in batch.tolist()]
