"""Precompute: records for the samples of a stretch, before training on them (DiT-BlockSkip, section 3.3)."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from accelerate.utils import find_executable_batch_size
from diffusers import ModelMixin

from ..data.sample_plan import Sample
from ..lora import ASSISTANT, only_adapters
from ..state import SpanResiduals
from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import UserError
from ..utils.progress import SILENT_STAGE, StageProgress
from .batches import SHARED_TEXT, Batch, SampleMaker
from .dtype import pack_record
from .store import Record, ResidualStore


T = TypeVar("T")

LARGEST_BATCH = 64
LARGEST_BATCH_ON_CPU = 32
"""Samples per forward, if nobody says: fewer do not fill a device."""


def frozen_model(transformer: ModelMixin) -> contextlib.AbstractContextManager[None]:
    """Within this context the LoRA that trains takes no part, so residuals are the frozen model's.

    A frozen assistant stays, as it does in training.
    """
    return only_adapters(transformer, [ASSISTANT])


@contextlib.contextmanager
def only_new_garbage() -> Iterator[None]:
    """Within this context collecting garbage does not look at the objects that were there before.

    The libraries used here collect on every change of model or batch size, and walking over all they have loaded takes
    longer than the forward of a few samples.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def capture(model: DiTBlockSkipTransformer, maker: SampleMaker, batch: Batch) -> SpanResiduals:
    """Residuals of one batch by a no-grad forward of the whole model, without the LoRA's dropout."""
    inputs = batch.arguments(maker.family, model.config)
    trains = model.training
    model.eval()
    try:
        return model.capture_residuals(**inputs, return_dict=False)
    finally:
        model.train(trains)


def encode_latents(
    samples: Sequence[Sample],
    *,
    maker: SampleMaker,
    vae: ModelMixin,
    store: ResidualStore,
    batch_size: int | None = None,
    progress: StageProgress = SILENT_STAGE,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Clean latents of the samples that :func:`precompute_records` will work on, by sample id, on the CPU.

    Encoding all of them first lets the VAE go before the transformer runs.

    Args:
        samples: Samples to have records of.
        maker: Builds batches.
        vae: Encodes crops.
        store: Holds records already.
        batch_size: Crops at a time, as many as samples per forward later.
        progress: The running stage, which advances by one per sample that lacks a record of its own.
        between_batches: Called before each batch; may raise to stop.
    """
    latents: dict[str, torch.Tensor] = {}

    def run(size: int) -> None:
        for part in _unfinished_batches(samples, maker, store, size):
            between_batches()
            if part[0].id not in latents:
                encoded = maker.encode(vae, part).cpu()
                _check_finite(part, encoded, maker, "The VAE makes latents")
                latents.update(zip((sample.id for sample in part), encoded, strict=True))
                progress.update(sum(sample.id not in store for sample in part))

    _halving(run, _start_size(samples, maker, batch_size))
    return latents


def _check_finite(samples: Sequence[Sample], tensor: torch.Tensor, maker: SampleMaker, what: str) -> None:
    """Check a tensor ``(B, ...)``, so that no record holds what would only show as a loss that is not a number.

    Raises:
        UserError: naming the samples whose part of it is not finite.
    """
    finite = tensor.flatten(1).isfinite().all(1).tolist()
    broken = [maker.describe(sample) for sample, fine in zip(samples, finite, strict=True) if not fine]
    if broken:
        raise UserError(
            f"{what} that are not finite of {broken[0]}, one of {len(broken)} in a batch; give another "
            "--mixed_precision, or check the photo and the model's files."
        )


def precompute_records(
    samples: Sequence[Sample],
    latents: Mapping[str, torch.Tensor],
    *,
    model: DiTBlockSkipTransformer,
    maker: SampleMaker,
    store: ResidualStore,
    batch_size: int | None = None,
    together: int = 1,
    with_residuals: bool = True,
    with_adapters: bool = False,
    progress: StageProgress = SILENT_STAGE,
    between_batches: Callable[[], None] = lambda: None,
    forwards: Callable[[int], int] | None = None,
) -> int:
    """Write the records that ``store`` lacks: clean latents and, with skipped blocks, the spans' residuals.

    Weights of skipped blocks are read once for as many batches of samples as go in step. Where the spans see the text
    alone, there is one forward for each prompt. Samples share a batch only if their tensors have the same shapes, so
    that no record depends on its neighbours. Which samples share a batch does not depend on what the store holds
    already, so that records of a run that was killed come out as they would have.

    Args:
        samples: Samples to have records of.
        latents: Their clean latents, from :func:`encode_latents`.
        model: The transformer.
        maker: Builds batches.
        store: Takes the records.
        batch_size: Samples per forward; by default the largest that fits the device.
        together: Forwards in step, see :meth:`~blockskip_hooks.transformer.DiTBlockSkipTransformer.together`.
        with_residuals: Whether to run the transformer at all.
        with_adapters: Whether the LoRA that trains takes part; otherwise residuals are the frozen model's.
        progress: The running stage, which advances by one per sample, those that had their own record included.
        between_batches: Called between forwards, and between blocks of those in step; may raise to stop.
        forwards: Where processes share weights: how many forwards all of them do, from the number that this one needs.
            What it does beyond those is not kept, and the batch size stays when memory runs out.

    Returns:
        Number of samples whose own records were written.
    """
    missing = sum(sample.id not in store for sample in samples)
    progress.skip(len(samples) - missing)

    def forward(part: Sequence[Sample]) -> dict[str, torch.Tensor]:
        of_part = [latents[sample.id] if sample.id in latents else store.read(sample.id)["latents"] for sample in part]
        batch = maker.batch(part, torch.stack(of_part))
        residuals = capture(model, maker, batch) if captures else SpanResiduals()
        recorded = {name: tensor.cpu() for name, tensor in residuals.tensors().items()}
        for tensor in recorded.values():
            _check_finite(part, tensor, maker, "The transformer makes residuals")
        return {"latents": batch.recorded_latents.cpu(), **recorded}

    def run(size: int) -> int:
        # Called again when memory runs out, with half the size and then one forward at a time; what is written stays.
        in_step = together if size == start_size and captures and not model.is_sharded else 1
        done, parts = 0, _unfinished_batches(samples, maker, store, size)
        while group := list(itertools.islice(parts, in_step)):
            between_batches()
            made = model.together([partial(forward, part) for part in group], between_batches)
            for part, tensors in zip(group, made, strict=True):
                fresh = sum(sample.id not in store for sample in part)
                store.write(_records(part, tensors, maker, store))
                progress.update(fresh)
                done += 1
        return done

    start_size, captures = _start_size(samples, maker, batch_size), with_residuals
    with contextlib.nullcontext() if with_adapters else frozen_model(model.transformer), model.full_model():
        if captures and maker.shares_text and _sees_text_alone(model):
            # Of the others a record would have to be read.
            known_first = sorted(samples, key=lambda sample: sample.id not in latents)
            _write_texts(known_first, forward, model, maker, store, together, between_batches)
            captures = False
        if forwards is None:
            _halving(run, start_size)
        else:
            wanted = forwards(len(list(_unfinished_batches(samples, maker, store, start_size))))
            for _ in range(run(start_size), wanted):
                between_batches()
                forward(samples[:1])
    return missing


def _sees_text_alone(model: DiTBlockSkipTransformer) -> bool:
    """Whether a prompt is all that the residuals depend on; processes that share weights take every sample's forward.

    Nothing is read of the image then: the forward ends before its first block.
    """
    seen = set().union(*(block.kinds for block in model.spans.skipped))
    return seen == {"text"} and not model.recorded_layers and not model.is_sharded


def _write_texts(
    samples: Sequence[Sample],
    forward: Callable[[Sequence[Sample]], dict[str, torch.Tensor]],
    model: DiTBlockSkipTransformer,
    maker: SampleMaker,
    store: ResidualStore,
    together: int,
    between_batches: Callable[[], None],
) -> None:
    """Write the text of each prompt after the leading span, from a forward of its first sample, some in step."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(maker.shared_ids(sample)[SHARED_TEXT], sample)

    def run(in_step: int) -> None:
        missing = ((record, sample) for record, sample in first.items() if record not in store)
        while group := list(itertools.islice(missing, in_step)):
            between_batches()
            made = model.together([partial(forward, [sample]) for _, sample in group], between_batches)
            for (record, sample), tensors in zip(group, made, strict=True):
                store.write({record: _records([sample], tensors, maker, store)[record]})

    _halving(run, together)


def _start_size(samples: Sequence[Sample], maker: SampleMaker, batch_size: int | None) -> int:
    largest = LARGEST_BATCH_ON_CPU if maker.device.type == "cpu" else LARGEST_BATCH
    return batch_size or min(len(samples), largest) or 1


def _unfinished_batches(
    samples: Sequence[Sample], maker: SampleMaker, store: ResidualStore, size: int
) -> Iterator[list[Sample]]:
    """Batches of samples of the same shapes, those alone that bring records that are missing.

    Those are samples without a record of their own and, of a record that none of these shares, the first that does.
    """
    wanted = {sample.id for sample in samples if sample.id not in store}
    shared = {record for sample in samples if sample.id in wanted for record in maker.record_ids(sample)}
    for sample in samples:
        if any(record not in store and record not in shared for record in maker.record_ids(sample)):
            wanted.add(sample.id)
            shared.update(maker.record_ids(sample))
    groups: dict[tuple, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(maker.shape_key(sample), []).append(sample)
    batches = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
    return (batch for batch in batches if any(sample.id in wanted for sample in batch))


def _halving(work: Callable[[int], T], size: int) -> T:
    """Do work with a batch size that is halved whenever memory runs out.

    Raises:
        RuntimeError: if it runs out with a batch of one.
    """

    def halve() -> int:
        nonlocal size
        size //= 2
        return size

    return find_executable_batch_size(work, starting_batch_size=size, reduce_batch_size_fn=halve)()


def _records(
    samples: Sequence[Sample], tensors: dict[str, torch.Tensor], maker: SampleMaker, store: ResidualStore
) -> dict[str, Record]:
    """Records by id that the store lacks: one for each sample of a batch, and those that samples share."""
    records: dict[str, Record] = {}
    for row, sample in enumerate(samples):
        shared = {name: record for name, record in maker.shared_ids(sample).items() if name in tensors}
        own = {sample.id: [name for name in tensors if name not in shared]}
        for record, names in (own | {record: [name] for name, record in shared.items()}).items():
            if record not in records and record not in store:
                made = {name: tensors[name][row].clone() for name in names}
                records[record] = pack_record(made) if maker.residual_dtype == "float8" else made
    return records
