"""Flags of the photos that a run learns from, and of the class pictures beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...data.buckets import parse_buckets
from ...data.photo_set import INTERPOLATION
from ...utils.files import expand_home
from .types import argument_type, flag


@dataclass(frozen=True, kw_only=True)
class PhotoFlags:
    """What a run learns from."""

    title: ClassVar[str] = "photos"
    instance_data_dir: str | None = flag(
        None,
        "Folder with photos of the subject; name.txt beside name.jpg is its caption. Default: the embedded photos.",
        type=expand_home,
    )
    instance_prompt: str | None = flag(
        None,
        "Prompt for photos without a caption, with the subject's rare word in it; no default but the embedded one.",
    )
    dataset_name: str | None = flag(
        None,
        "Dataset with the photos, a hub id or a local folder, in place of --instance_data_dir; default: none.",
        type=expand_home,
    )
    dataset_config_name: str | None = flag(None, "Configuration of --dataset_name; default: its only one.")
    image_column: str = flag("image", "Column of --dataset_name with the photos.")
    caption_column: str | None = flag(
        None, "Column of --dataset_name with captions; default: none, so --instance_prompt."
    )
    repeats: int = flag(1, "How many times each photo counts in an epoch.")
    resolution: int = flag(512, "Side in pixels of the training crop, and of the largest patch.")
    center_crop: bool = flag(False, "Crop from the middle; otherwise anywhere.")
    random_flip: bool = flag(False, "Mirror half of the samples.")
    image_interpolation_mode: str = flag(
        "lanczos", "Filter that photos and patches are resized with.", choices=tuple(INTERPOLATION)
    )
    use_aspect_ratio_buckets: bool = flag(False, "Crop to common aspect ratios, not to a square.")
    aspect_ratio_buckets: tuple[tuple[int, int], ...] | None = flag(
        None,
        "Crop to these shapes, in pixels, in place of a square: height,width;height,width;... Default: the square.",
        type=argument_type(parse_buckets),
    )
    caption_dropout: float = flag(0.0, "Part of the samples, 0 to 1, that trains on an empty prompt.")


@dataclass(frozen=True, kw_only=True)
class PriorPreservationFlags:
    """The class pictures beside the photos."""

    title: ClassVar[str] = "prior preservation"
    with_prior_preservation: bool = flag(False, "Also train on pictures of the subject's class.")
    prior_loss_weight: float = flag(1.0, "Weight of the class pictures in the loss.")
    class_data_dir: str | None = flag(
        None, "Folder of class pictures; those that are missing are generated. No default.", type=expand_home
    )
    class_prompt: str | None = flag(None, "Prompt of the class pictures; no default.")
    num_class_images: int = flag(100, "Class pictures wanted in --class_data_dir.")
    sample_batch_size: int = flag(4, "Class pictures generated at a time.")
    prior_generation_precision: str | None = flag(
        None, "Number format for them; default: that of training.", choices=("no", "fp32", "fp16", "bf16")
    )
