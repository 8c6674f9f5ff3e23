"""Timestep-aware dynamic patch sampling (DiT-BlockSkip, section 3.2)."""

from __future__ import annotations

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
