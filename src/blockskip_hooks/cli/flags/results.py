"""Flags of what a run shows and leaves: validation pictures, checkpoints, the LoRA and reports."""

from __future__ import annotations

import argparse

from ...utils.files import expand_home
from .types import argument_type, parse_trackers


def add_validation_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("validation").add_argument
    flag(
        "--validation_prompt",
        nargs="+",
        help="Prompts, each in quotes, to draw pictures of in and after training; default: none.",
    )
    flag("--num_validation_images", type=int, default=4, help="Pictures per validation.")
    flag(
        "--validation_resolution",
        type=int,
        help="Side of the pictures in pixels; default: the model's own, or --resolution where it has none.",
    )
    flag("--validation_epochs", type=int, default=50, help="Epochs between validations.")
    flag(
        "--validation_model_path",
        type=expand_home,
        help="Hub id or folder of the model that makes the pictures, with the LoRA put on it: the distilled sibling "
        "of the trained one, say; default: the trained one.",
    )
    flag("--final_validation_prompt", help="Prompt of the pictures after training; default: --validation_prompt.")
    flag("--skip_final_inference", action="store_true", help="Draw no pictures after training.")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("output").add_argument
    flag(
        "--output_dir",
        type=expand_home,
        default="flux-dreambooth-lora",
        help="Folder for the LoRA, reports and checkpoints.",
    )
    flag("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    flag("--checkpoints_total_limit", type=int, help="Checkpoints kept; older ones are removed. Default: all.")
    flag(
        "--resume_from_checkpoint",
        type=expand_home,
        help="Checkpoint folder to go on from, or latest; default: begin anew.",
    )
    flag("--upcast_before_saving", action="store_true", help="Save the LoRA in float32.")
    flag(
        "--save_format",
        choices=("diffusers", "comfyui"),
        default="diffusers",
        help="comfyui: beside the file that diffusers reads, one that ComfyUI reads.",
    )
    flag("--export_merged", action="store_true", help="Also write the transformer with the LoRA in its weights.")
    flag("--open", action="store_true", help="Show report.html in this machine's browser at the end.")
    flag("--logging_dir", type=expand_home, default="logs", help="Folder for tracker logs, inside --output_dir.")
    flag(
        "--report_to",
        type=argument_type(parse_trackers),
        default="tensorboard",
        help="Trackers: tensorboard, wandb, ..., several by commas, all or none.",
    )
    flag(
        "--log_level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="What is said on stderr: everything, each stage's cost, warnings and progress, or errors alone.",
    )
    flag("--push_to_hub", action="store_true", help="Upload the result to the hub.")
    flag("--hub_token", help="Token for the upload; default: that of hf auth login, which is safer.")
    flag("--hub_model_id", help="Name of the repository on the hub; default: the name of --output_dir.")
