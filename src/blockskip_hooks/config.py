"""Settings of the two halves of DiT-BlockSkip, validated once, before any weight is read."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .utils.errors import UserError


ResidualMode = Literal["precomputed", "online", "none"]
PatchMode = Literal["dynamic", "resize", "random", "high_to_low", "none"]
PatchPositions = Literal["patch", "photo"]


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class BlockSkipConfig:
    """Which blocks of a diffusion transformer are skipped (DiT-BlockSkip, section 3.3).

    Blocks are numbered ``0 .. N-1`` in execution order. The leading span is blocks ``0 .. leading-1``, the trailing
    span is blocks ``N-trailing .. N-1``; the kept blocks between them carry the LoRA.

    Args:
        leading: Number of skipped blocks at the start (n).
        trailing: Number of skipped blocks at the end (m).
        residuals: Where residual features come from. ``"precomputed"``: from records made before training.
            ``"online"``: from a no-grad forward of the whole model in every step. ``"none"``: skipped spans are the
            identity, an ablation that loses the subject (the paper's table 5).

    Raises:
        ValueError: if a count is no whole number or negative, or ``residuals`` is unknown.
    """

    leading: int = 0
    trailing: int = 0
    residuals: ResidualMode = "precomputed"

    def __post_init__(self) -> None:
        for name in ("leading", "trailing"):
            if not _is_count(count := getattr(self, name)) or count < 0:
                raise UserError(f"BlockSkipConfig.{name} is {count!r}; give a whole number of blocks >= 0.")
        if self.residuals not in get_args(ResidualMode):
            raise UserError(
                f"BlockSkipConfig.residuals is '{self.residuals}'; choose one of {', '.join(get_args(ResidualMode))}."
            )

    @property
    def num_skipped(self) -> int:
        """k = n + m."""
        return self.leading + self.trailing

    def validate_for(self, num_blocks: int) -> None:
        """Check the spans against a transformer of ``num_blocks`` blocks.

        Raises:
            ValueError: if no block would be kept.
        """
        if self.num_skipped >= num_blocks:
            raise UserError(
                f"BlockSkipConfig(leading={self.leading}, trailing={self.trailing}) skips {self.num_skipped} of "
                f"{num_blocks} blocks and leaves none to train; leading + trailing must be at most {num_blocks - 1}."
            )


@dataclass(frozen=True, kw_only=True)
class PatchSamplingConfig:
    """Timestep-aware dynamic patch sampling (DiT-BlockSkip, section 3.2, Eq. 1). Sizes are pixels of a square's side.

    Args:
        mode: ``"dynamic"``: the patch grows with the timestep (Eq. 1). ``"high_to_low"`` and ``"random"``: the
            paper's ablations. ``"resize"``: the whole ``max_size`` crop, shrunk. ``"none"``: the upstream crop of
            ``max_size``, not resized.
        min_size: Patch size at t = 0, and the training resolution every patch is resized to.
        max_size: Patch size at t = T; images are first resized so that their shorter side is this long.
        multiple: Latent token size in pixels (VAE factor x patchify: 16 for FLUX, 32 for SANA); patch sizes are
            rounded to it.
        buckets: Heights and widths of the aspect-ratio buckets, in place of the square of ``max_size``. A photo is
            scaled to cover its bucket; patches and training images have the bucket's shape, scaled as the square's
            would be.
        positions: Where the rotary embedding takes the tokens of a patch to lie: ``"patch"``, one beside the other as
            in an image of the patch's own size, as in the paper; ``"photo"``, for half of the samples where they lie
            in the whole crop. See :func:`~blockskip_hooks.positions.patch_positions`.

    Raises:
        ValueError: if the mode or the positions are unknown, a size is not a positive whole multiple of ``multiple``,
            or min > max. The message names the arguments.
    """

    mode: PatchMode = "none"
    min_size: int
    max_size: int
    multiple: int
    buckets: tuple[tuple[int, int], ...] = ()
    positions: PatchPositions = "patch"

    def __post_init__(self) -> None:
        for name, choices in (("mode", get_args(PatchMode)), ("positions", get_args(PatchPositions))):
            if (chosen := getattr(self, name)) not in choices:
                raise UserError(f"PatchSamplingConfig.{name} is '{chosen}'; choose one of {', '.join(choices)}.")
        for name in ("multiple", "min_size", "max_size"):
            if not _is_count(size := getattr(self, name)) or size <= 0:
                raise UserError(f"PatchSamplingConfig.{name} is {size!r}; give a whole number of pixels above 0.")
            if size % self.multiple:
                nearest = max(self.multiple, round(size / self.multiple) * self.multiple)
                raise UserError(
                    f"PatchSamplingConfig.{name} is {size}, which is not a multiple of this model's latent token size "
                    f"({self.multiple} px); use {nearest}."
                )
        if self.min_size > self.max_size:
            raise UserError(
                f"PatchSamplingConfig.min_size {self.min_size} is above PatchSamplingConfig.max_size "
                f"{self.max_size}; lower the first."
            )
        for height, width in self.buckets:
            if height <= 0 or width <= 0 or height % self.multiple or width % self.multiple:
                raise UserError(
                    f"PatchSamplingConfig.buckets has {height},{width}, which are not positive multiples of this "
                    f"model's latent token size ({self.multiple} px); round them to it."
                )

    @property
    def training_resolution(self) -> int:
        """Side in pixels of the square images the transformer trains on."""
        return self.max_size if self.mode == "none" else self.min_size

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the whole crop of every bucket; without buckets, of the only one."""
        return self.buckets or ((self.max_size, self.max_size),)

    def patch_shape(self, bucket: int, patch_size: int) -> tuple[int, int]:
        """Height and width of a bucket's patch whose square counterpart has the side ``patch_size``."""
        height, width = self.shapes[bucket]
        scale = patch_size / self.max_size
        return self._on_grid(height * scale), self._on_grid(width * scale)

    def training_shape(self, bucket: int) -> tuple[int, int]:
        """Height and width of the images of a bucket that the transformer trains on."""
        return self.patch_shape(bucket, self.training_resolution)

    def _on_grid(self, length: float) -> int:
        return max(self.multiple, int(length / self.multiple + 0.5) * self.multiple)
