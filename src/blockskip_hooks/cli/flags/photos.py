"""Flags of the photos that a run learns from, and of the class pictures beside them."""

from __future__ import annotations

import argparse

from ...data.buckets import parse_buckets
from ...data.photo_set import INTERPOLATION
from ...utils.files import expand_home
from .types import argument_type


def add_photos_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("photos").add_argument
    flag(
        "--instance_data_dir",
        type=expand_home,
        help="Folder with photos of the subject; name.txt beside name.jpg is its caption. Default: the "
        "embedded photos.",
    )
    flag(
        "--instance_prompt",
        help="Prompt for photos without a caption, with the subject's rare word in it; "
        "no default but the embedded one.",
    )
    flag(
        "--dataset_name",
        type=expand_home,
        help="Dataset with the photos, a hub id or a local folder, in place of --instance_data_dir; default: none.",
    )
    flag("--dataset_config_name", help="Configuration of --dataset_name; default: its only one.")
    flag("--image_column", default="image", help="Column of --dataset_name with the photos.")
    flag("--caption_column", help="Column of --dataset_name with captions; default: none, so --instance_prompt.")
    flag("--repeats", type=int, default=1, help="How many times each photo counts in an epoch.")
    flag("--resolution", type=int, default=512, help="Side in pixels of the training crop, and of the largest patch.")
    flag("--center_crop", action="store_true", help="Crop from the middle; otherwise anywhere.")
    flag("--random_flip", action="store_true", help="Mirror half of the samples.")
    flag(
        "--image_interpolation_mode",
        choices=tuple(INTERPOLATION),
        default="lanczos",
        help="Filter that photos and patches are resized with.",
    )
    flag("--use_aspect_ratio_buckets", action="store_true", help="Crop to common aspect ratios, not to a square.")
    flag(
        "--aspect_ratio_buckets",
        type=argument_type(parse_buckets),
        help="Crop to these shapes, in pixels, in place of a square: height,width;height,width;... "
        "Default: the square.",
    )
    flag(
        "--caption_dropout",
        type=float,
        default=0.0,
        help="Part of the samples, 0 to 1, that trains on an empty prompt.",
    )


def add_prior_preservation_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("prior preservation").add_argument
    flag("--with_prior_preservation", action="store_true", help="Also train on pictures of the subject's class.")
    flag("--prior_loss_weight", type=float, default=1.0, help="Weight of the class pictures in the loss.")
    flag(
        "--class_data_dir",
        type=expand_home,
        help="Folder of class pictures; those that are missing are generated. No default.",
    )
    flag("--class_prompt", help="Prompt of the class pictures; no default.")
    flag("--num_class_images", type=int, default=100, help="Class pictures wanted in --class_data_dir.")
    flag("--sample_batch_size", type=int, default=4, help="Class pictures generated at a time.")
    flag(
        "--prior_generation_precision",
        choices=("no", "fp32", "fp16", "bf16"),
        help="Number format for them; default: that of training.",
    )
