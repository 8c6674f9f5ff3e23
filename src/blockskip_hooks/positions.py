"""Rotary positions that differ from sample to sample: diffusers' FLUX takes those of one image for the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .utils.errors import UserError


class _TableOfSamples:
    """A rotary table ``(B, S, D)`` where attention expects one ``(S, D)`` and adds the axes of batch and heads."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def __getitem__(self, axes: tuple[Any, ...]) -> torch.Tensor:
        # The first new axis is the batch's, which this table has.
        own = (slice(None), *axes[1:])
        return self._table[own]


@contextmanager
def positions_by_sample(transformer: torch.nn.Module, ids: torch.Tensor | None) -> Iterator[None]:
    """Within this context the next forward of the transformer gives each sample positions of its own.

    Args:
        transformer: A model with a ``pos_embed`` that makes tables of text and image ids, text first.
        ids: Ids of the image tokens, ``(B, tokens, axes)``; ``None`` leaves the model's own.

    Raises:
        ValueError: if the model has no such module.
    """
    if ids is None:
        yield
        return
    if not isinstance(embed := getattr(transformer, "pos_embed", None), torch.nn.Module):
        raise UserError(f"{type(transformer).__name__} makes no rotary tables in pos_embed; leave out sample_ids.")

    def tables(module: torch.nn.Module, args: tuple[torch.Tensor, ...], _: Any) -> tuple[_TableOfSamples, ...]:
        # Forwards in step begin one after the other, each with a hook of its own.
        handle.remove()
        text = args[0][: -ids.shape[1]]
        of_samples = [module.forward(torch.cat([text, own])) for own in ids]
        return tuple(_TableOfSamples(torch.stack(part)) for part in zip(*of_samples, strict=True))

    handle = embed.register_forward_hook(tables)
    try:
        yield
    finally:
        handle.remove()
