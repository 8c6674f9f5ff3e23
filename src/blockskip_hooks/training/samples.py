"""What a run trains on and for how long: its photos, the plan of its samples, and its optimiser steps."""

from __future__ import annotations

import math

from ..data.buckets import nearest_bucket
from ..data.photo import Photo
from ..data.photo_set import PhotoSet
from ..data.photos import scan_photos
from ..data.sample_plan import SampleKind, SamplePlan
from ..residuals.batches import PhotoSource
from .run import Run


def load_samples(run: Run) -> tuple[dict[SampleKind, PhotoSource], SamplePlan]:
    """Decode the photos and plan the samples; class images and the seed must be there."""
    settings = run.settings
    sources: dict[SampleKind, PhotoSource] = {
        "instance": PhotoSource(_photo_set(run, run.photos), settings.instance_prompt or "")
    }
    if settings.with_prior_preservation:
        photos = scan_photos(settings.class_folder, flag="--class_data_dir")
        photo_set = _photo_set(run, photos[: settings.num_class_images])
        sources["class"] = PhotoSource(photo_set, settings.class_prompt or "", use_captions=False)
    return sources, _sample_plan(run, run.seed, {kind: len(source.photos) for kind, source in sources.items()})


def _photo_set(run: Run, photos: list[Photo]) -> PhotoSet:
    interpolation = run.settings.image_interpolation_mode
    return PhotoSet(photos, run.patch.max_size, buckets=run.patch.buckets, interpolation=interpolation)


def _sample_plan(run: Run, seed: int, num_images: dict[SampleKind, int]) -> SamplePlan:
    settings = run.settings
    buckets = tuple(nearest_bucket(photo.size, run.patch.shapes) for photo in run.photos if photo.size)
    return SamplePlan(
        seed=seed,
        num_images=num_images,
        repeats=settings.repeats,
        timesteps=run.family.scheduler.timesteps,
        patch=run.patch,
        weighting_scheme=settings.weighting_scheme,
        logit_mean=settings.logit_mean,
        logit_std=settings.logit_std,
        mode_scale=settings.mode_scale,
        random_flip=settings.random_flip,
        center_crop=settings.center_crop,
        fixed_crops=(settings.cache_latents or run.encodes_pairs) and run.patch.mode == "none",
        buckets=buckets if run.patch.buckets else None,
        batch_size=settings.train_batch_size,
        caption_dropout=settings.caption_dropout,
    )


def schedule(run: Run, plan: SamplePlan, num_processes: int) -> tuple[int, int]:
    """Optimiser steps of an epoch and of the run, as the upstream flags define them."""
    of_epoch = math.ceil(plan.epoch_length / run.samples_per_step(num_processes))
    return of_epoch, run.settings.max_train_steps or run.settings.num_train_epochs * of_epoch


def expected_schedule(run: Run, num_processes: int) -> tuple[int, int]:
    """What :func:`schedule` says, before there is a sample plan."""
    settings = run.settings
    num_images = {kind: settings.num_class_images if kind == "class" else len(run.photos) for kind in run.kinds}
    return schedule(run, _sample_plan(run, settings.seed or 0, num_images), num_processes)
