"""Timestep-aware dynamic patch sampling (DiT-BlockSkip, section 3.2)."""

from __future__ import annotations

import torch

from .config import PatchSamplingConfig


def patch_size_for(config: PatchSamplingConfig, t: float, u: float = 0.0) -> int:
    """Side in pixels of the crop for timestep ``t`` (Eq. 1): ``s(t) = s_min + t / T * (s_max - s_min)``.

    Rounded to a multiple of ``config.multiple`` within the limits; where the crop lies is not on the token grid. Modes
    ``"none"`` and ``"resize"`` always crop ``max_size``.

    Args:
        config: Patch sampling settings.
        t: Timestep as a fraction of T, in [0, 1]; 1 is pure noise.
        u: A uniform draw in [0, 1) that stands in for the timestep in mode ``"random"``.
    """
    if config.mode in ("none", "resize"):
        return config.max_size
    position = {"dynamic": t, "high_to_low": 1.0 - t, "random": u}[config.mode]
    size = config.min_size + position * (config.max_size - config.min_size)
    size = int(size / config.multiple + 0.5) * config.multiple
    return min(max(size, config.min_size), config.max_size)


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
