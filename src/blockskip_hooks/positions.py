"""Rotary positions of patches: where their tokens lie in the photo, which differs from sample to sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .config import PatchSamplingConfig
from .utils.errors import UserError


def patch_positions(
    config: PatchSamplingConfig, patch_size: int, top: float, left: float, bucket: int = 0
) -> torch.Tensor:
    """Rows and columns on which the tokens of a resized patch lie in the token grid of the whole crop.

    A patch of side s that is trained at side s' has its tokens ``s / s'`` apart, from where it was cut. What is far
    apart in the photo is then as far apart for the rotary embedding, in training as in images of the whole size. A
    patch that is not resized has whole numbers plus where it begins. This is not in the paper.

    Args:
        config: Patch sampling settings.
        patch_size: Side of the patch in pixels, of its square counterpart with buckets.
        top: Where it lies in the free space, in [0, 1].
        left: Likewise.
        bucket: Number of the aspect-ratio bucket.

    Returns:
        float32 of shape ``(tokens, 2)``, row by row.
    """
    shapes = config.shapes[bucket], config.patch_shape(bucket, patch_size), config.training_shape(bucket)
    axes = []
    for whole, patch, trained, place in zip(*shapes, (top, left), strict=True):
        tokens = trained // config.multiple
        middles = place * (whole - patch) + (torch.arange(tokens) + 0.5) * (patch / tokens)
        axes.append(middles / config.multiple - 0.5)
    return torch.cartesian_prod(*axes)


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

    diffusers' models take the positions of one image for the whole batch.

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
        raise UserError(
            f"{type(transformer).__name__} makes no rotary tables in pos_embed; leave out img_ids_by_sample."
        )

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
