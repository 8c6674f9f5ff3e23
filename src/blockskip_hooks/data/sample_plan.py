"""The sample plan: training sample i as a pure function of (seed, i).

Everything else that is random in training, such as the LoRA's first weights and its dropout, is seeded from the same
seed. So any process can rebuild any sample: residuals are precomputed for exactly the samples that training will use,
a killed run resumes bit for bit on a CPU, and the work can be spread over any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from ..config import PatchSamplingConfig
from ..patch_sampling import patch_size_for
from ..utils.seeds import derived_seed


SampleKind = Literal["instance", "class"]

PLACED_SHARE = 0.5
"""Samples with positions of the photo, where these are asked for; the others have those of the patch.

The tokens of a shrunk patch lie further apart than neighbours of an image do. Without samples that have neighbours at
every noise level images get stripes, two tokens wide.
"""

# Of two kinds, the epoch at hand and the one beside it.
_KEPT_ORDERS = 4


@dataclass(frozen=True)
class Sample:
    """Everything random about one training sample.

    Attributes:
        kind: Whether the image is one of the subject (``"instance"``) or of prior preservation (``"class"``).
        index: Number of the sample in the run.
        image: Number of the image among those of its kind.
        flip: Whether the crop is mirrored.
        patch_size: Side of the square crop in pixels, of the image whose shorter side is the maximum patch size. With
            aspect-ratio buckets the photo is scaled to cover its bucket, and the crop has the bucket's shape; this is
            the side of its square counterpart (:meth:`PatchSamplingConfig.patch_shape`).
        top: Vertical position of the crop, as a fraction of the free space, in [0, 1).
        left: Horizontal position of the crop, likewise.
        timestep_index: Index into the scheduler's training timesteps (0 is the noisiest).
        noise_seed: Seed of the sample's noise and of its draw from the VAE's posterior.
        bucket: Number of the aspect-ratio bucket.
        drop_caption: Whether the sample is trained with an empty prompt.
        is_placed: Whether its tokens have the positions of the photo.
    """

    kind: SampleKind
    index: int
    image: int
    flip: bool
    patch_size: int
    top: float
    left: float
    timestep_index: int
    noise_seed: int
    bucket: int = 0
    drop_caption: bool = False
    is_placed: bool = False

    @property
    def id(self) -> str:
        """Name of the sample's record in the residual store."""
        return f"{self.kind}-{self.index:08d}"


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Rule that makes :class:`Sample` number i of a run.

    Images are taken epoch by epoch, each epoch in an order of its own. The timestep is drawn first, with the upstream
    distribution of the weighting scheme; the patch size follows from it.

    With aspect-ratio buckets, samples come in groups of ``batch_size`` that share a bucket, and a class sample takes
    the bucket of the instance sample it is trained with, so that batches have one shape.

    Args:
        seed: Seed of the run.
        num_images: Number of images of each kind; the class kind only with prior preservation.
        repeats: How many times each instance image counts in an epoch.
        timesteps: The scheduler's training timesteps in (0, T], noisiest first, shape ``(num_train_timesteps,)``.
        patch: Patch sampling settings.
        weighting_scheme, logit_mean, logit_std, mode_scale: As the upstream flags of these names.
        random_flip: Mirror half of the samples.
        center_crop: Take every crop from the centre; positions have no effect then.
        fixed_crops: One crop and flip per image for the whole run, as upstream does; lets latents be cached once.
        buckets: Bucket number of every instance image; ``None`` when there is one bucket.
        batch_size: Samples that must share a bucket.
        caption_dropout: Part of the samples that is trained with an empty prompt.
    """

    seed: int
    num_images: dict[SampleKind, int]
    timesteps: torch.Tensor
    patch: PatchSamplingConfig
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    random_flip: bool = False
    center_crop: bool = False
    fixed_crops: bool = False
    repeats: int = 1
    buckets: tuple[int, ...] | None = None
    batch_size: int = 1
    caption_dropout: float = 0.0

    @cached_property
    def epoch_length(self) -> int:
        """Samples of each kind in one epoch; each bucket is filled up to whole batches."""
        length = max(self.num_images["instance"] * self.repeats, self.num_images.get("class", 0))
        if self.buckets is None:
            return length
        return sum(self._padded_share(bucket, length) for bucket in set(self.buckets))

    def _padded_share(self, bucket: int, length: int) -> int:
        """Samples of a bucket in an epoch that would have ``length`` without buckets."""
        assert self.buckets is not None
        share = -(-length * self.buckets.count(bucket) // len(self.buckets))
        return -(-share // self.batch_size) * self.batch_size

    def _generator(self, *parts: object) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, *parts))

    def _image(self, kind: SampleKind, index: int) -> int:
        epoch, position = divmod(index, self.epoch_length)
        if (kind, epoch) not in self._orders:
            # Samples are mostly asked for in order: the epochs before are not needed any more.
            for old in list(self._orders)[: -_KEPT_ORDERS + 1]:
                del self._orders[old]
            self._orders[kind, epoch] = self._epoch(kind, epoch)
        return self._orders[kind, epoch][position]

    @cached_property
    def _orders(self) -> dict[tuple[SampleKind, int], list[int]]:
        """Images in order, by kind and epoch, of the epochs that were asked for last."""
        return {}

    def _epoch(self, kind: SampleKind, epoch: int) -> list[int]:
        if kind == "instance" and self.buckets is not None:
            return self._bucketed_epoch(epoch)
        order = torch.randperm(self.epoch_length, generator=self._generator("order", kind, epoch))
        return (order % self.num_images[kind]).tolist()

    def _bucketed_epoch(self, epoch: int) -> list[int]:
        """Images of an epoch in order: whole batches of one bucket, in shuffled order."""
        assert self.buckets is not None
        length = max(self.num_images["instance"] * self.repeats, self.num_images.get("class", 0))
        batches: list[list[int]] = []
        for bucket in sorted(set(self.buckets)):
            members = [image for image, own in enumerate(self.buckets) if own == bucket]
            share = self._padded_share(bucket, length)
            order = torch.randperm(share, generator=self._generator("order", "instance", epoch, bucket)).tolist()
            images = [members[place % len(members)] for place in order]
            batches += [images[start : start + self.batch_size] for start in range(0, share, self.batch_size)]
        order = torch.randperm(len(batches), generator=self._generator("batches", epoch)).tolist()
        return [image for number in order for image in batches[number]]

    def sample(self, index: int, kind: SampleKind = "instance") -> Sample:
        """Sample number ``index`` of ``kind``."""
        generator = self._generator("sample", kind, index)
        density = compute_density_for_timestep_sampling(
            self.weighting_scheme,
            batch_size=1,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
            generator=generator,
        )
        num_timesteps = len(self.timesteps)
        # In the "mode" scheme a draw may be exactly 1, or out of [0, 1] for scales beyond -1 to 1.75.
        timestep_index = min(max(int(density.item() * num_timesteps), 0), num_timesteps - 1)
        t = float(self.timesteps[timestep_index]) / num_timesteps

        image = self._image(kind, index)
        if self.fixed_crops:
            generator = self._generator("crop", kind, image)
        size_draw, top, left, flip_draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        bucket = 0
        if self.buckets is not None:
            bucket = self.buckets[image if kind == "instance" else self._image("instance", index)]
        drop_draw, place_draw = (
            torch.rand(1, generator=self._generator(what, kind, index), dtype=torch.float64).item()
            for what in ("caption", "place")
        )
        return Sample(
            kind=kind,
            index=index,
            image=image,
            flip=self.random_flip and flip_draw < 0.5,
            patch_size=patch_size_for(self.patch, t, size_draw),
            top=top,
            left=left,
            timestep_index=timestep_index,
            noise_seed=derived_seed(self.seed, "noise", kind, index),
            bucket=bucket,
            drop_caption=drop_draw < self.caption_dropout,
            is_placed=self.patch.positions == "photo" and place_draw < PLACED_SHARE,
        )
