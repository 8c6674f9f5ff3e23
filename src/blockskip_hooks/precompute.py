"""Precompute: records for the samples of a stretch, before training on them (DiT-BlockSkip, section 3.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.utils import find_executable_batch_size
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm

from .hooks import SpanResiduals
from .residual_store import Record, ResidualStore
from .sample_plan import Sample
from .training_data import Batch, SampleMaker
from .transformer import DiTBlockSkipTransformer


# Streaming reads the skipped weights once per batch, so bigger is faster until activations fill the device.
LARGEST_BATCH = {"cpu": 32, "cuda": 64}


@contextlib.contextmanager
def base_model(transformer: ModelMixin) -> Iterator[None]:
    """Within this context adapters take no part, so residuals are the frozen model's."""
    has_adapters = any(isinstance(module, BaseTunerLayer) for module in transformer.modules())
    if has_adapters:
        transformer.disable_adapters()
    try:
        yield
    finally:
        if has_adapters:
            transformer.enable_adapters()


def capture(model: DiTBlockSkipTransformer, maker: SampleMaker, batch: Batch) -> SpanResiduals:
    """Residuals of one batch by a no-grad forward of the whole model."""
    inputs = maker.family.transformer_inputs(model.config, batch.noisy_latents, batch.timesteps, batch.embeds)
    return model.capture_residuals(**inputs, return_dict=False)


def precompute_records(
    samples: Sequence[Sample],
    *,
    model: DiTBlockSkipTransformer,
    maker: SampleMaker,
    vae: ModelMixin,
    store: ResidualStore,
    batch_size: int | None = None,
    with_residuals: bool = True,
    progress: tqdm | None = None,
) -> int:
    """Write the records that ``store`` lacks: clean latents and, with skipped blocks, the spans' residuals.

    Weights of skipped blocks are read once per batch of samples. Samples share a batch only if their tensors have the
    same shapes, so that no record depends on its neighbours. Adapters are left out: residuals are the base model's.

    Args:
        samples: Samples to have records of.
        model: The transformer.
        maker: Builds batches.
        vae: Encodes crops.
        store: Takes the records.
        batch_size: Samples per forward; by default the largest that fits the device.
        with_residuals: Whether to run the transformer at all.
        progress: Advanced by one per sample, present ones included.

    Returns:
        Number of records written.
    """
    missing = [sample for sample in samples if not maker.is_recorded(sample, store)]
    if progress is not None:
        progress.update(len(samples) - len(missing))
    start_size = batch_size or min(len(missing), LARGEST_BATCH.get(maker.device.type, 32)) or 1
    groups: dict[tuple, list[Sample]] = {}
    for sample in missing:
        groups.setdefault(maker.shape_key(sample), []).append(sample)

    @find_executable_batch_size(starting_batch_size=start_size)
    def run(size: int) -> None:
        # Called again with half the size when memory runs out; what is written stays.
        for group in groups.values():
            while group:
                part = group[:size]
                batch = maker.batch(part, maker.encode(vae, part))
                residuals = capture(model, maker, batch) if with_residuals else SpanResiduals()
                store.write(_records(batch, residuals, maker, store))
                del group[: len(part)]
                if progress is not None:
                    progress.update(len(part))

    with base_model(model.transformer):
        run()
    return len(missing)


def _records(batch: Batch, residuals: SpanResiduals, maker: SampleMaker, store: ResidualStore) -> dict[str, Record]:
    """Records by id: one for each sample, and one for each modulation that the store lacks."""
    stacked: dict[str, Any] = {"latents": batch.latents, **residuals.tensors()}
    on_cpu = {name: tensor.cpu() for name, tensor in stacked.items()}
    modulation = on_cpu.pop("modulation", None)
    records: dict[str, Record] = {}
    for row, sample in enumerate(batch.samples):
        records[sample.id] = {name: tensor[row].clone() for name, tensor in on_cpu.items()}
        shared = maker.modulation_id(sample)
        if modulation is not None and shared not in records and shared not in store:
            records[shared] = {"modulation": modulation[row].clone()}
    return records
