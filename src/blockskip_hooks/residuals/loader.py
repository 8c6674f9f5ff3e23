"""Records and crops in the order of training: read by a data loader, a batch ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ..data.sample_plan import Sample
from .batches import SampleMaker
from .store import DamagedRecord, Record, ResidualStore


T = TypeVar("T")


class RecordDataset(torch.utils.data.Dataset):
    """Map-style view of part of the sample plan: one item for each index, of every kind.

    Items are ``(samples, payloads)`` with one entry per kind; a payload is the sample's record, or its crop when
    there is no store. ``None`` stands for a record that is damaged.
    """

    def __init__(self, maker: SampleMaker, store: ResidualStore | None, indices: Sequence[int]) -> None:
        self.maker = maker
        self.store = store
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[list[Sample], list[Record | None]]:
        samples = self.maker.samples([self.indices[item]])
        if self.store is None:
            return samples, [{"pixels": self.maker.crop(sample)} for sample in samples]
        return samples, [self._read(sample, self.store) for sample in samples]

    def _read(self, sample: Sample, store: ResidualStore) -> Record | None:
        try:
            return self.maker.read_record(sample, store)
        except (DamagedRecord, KeyError):
            return None


def read_ahead(batches: Iterable[T]) -> Iterator[T]:
    """The batches, each made in a thread while the one before is trained on."""
    upcoming = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        made = pool.submit(next, upcoming, None)
        while (batch := made.result()) is not None:
            made = pool.submit(next, upcoming, None)
            yield batch


def collate_by_kind(
    items: Sequence[tuple[list[Sample], list[Record | None]]],
) -> tuple[list[Sample], list[Record | None]]:
    """Join items so that all instance samples come before all class samples."""
    samples = [sample for of_kind in zip(*(item[0] for item in items), strict=True) for sample in of_kind]
    payloads = [payload for of_kind in zip(*(item[1] for item in items), strict=True) for payload in of_kind]
    return samples, payloads
