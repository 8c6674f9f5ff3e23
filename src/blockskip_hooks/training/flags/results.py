"""Flags of what a run shows and leaves: validation pictures, checkpoints, the LoRA and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...utils.files import expand_home
from .types import argument_type, flag, parse_trackers


@dataclass(frozen=True, kw_only=True)
class ValidationFlags:
    """The pictures that show what was learnt."""

    title: ClassVar[str] = "validation"
    validation_prompt: tuple[str, ...] | None = flag(
        None, "Prompts, each in quotes, to draw pictures of in and after training; default: none.", nargs="+"
    )
    num_validation_images: int = flag(4, "Pictures per validation.")
    validation_resolution: int | None = flag(
        None, "Side of the pictures in pixels; default: the model's own, or --resolution where it has none.", type=int
    )
    validation_epochs: int = flag(50, "Epochs between validations.")
    validation_model_path: str | None = flag(
        None,
        "Hub id or folder of the model that makes the pictures, with the LoRA put on it: the distilled sibling of "
        "the trained one, say; default: the trained one.",
        type=expand_home,
    )
    final_validation_prompt: str | None = flag(
        None, "Prompt of the pictures after training; default: --validation_prompt."
    )
    skip_final_inference: bool = flag(False, "Draw no pictures after training.")


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What a run leaves, where, and what it says meanwhile."""

    title: ClassVar[str] = "output"
    output_dir: str = flag("flux-dreambooth-lora", "Folder for the LoRA, reports and checkpoints.", type=expand_home)
    checkpointing_steps: int = flag(500, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = flag(
        None, "Checkpoints kept; older ones are removed. Default: all.", type=int
    )
    resume_from_checkpoint: str | None = flag(
        None, "Checkpoint folder to go on from, or latest; default: begin anew.", type=expand_home
    )
    upcast_before_saving: bool = flag(False, "Save the LoRA in float32.")
    save_format: str = flag(
        "diffusers",
        "comfyui: beside the file that diffusers reads, one that ComfyUI reads.",
        choices=("diffusers", "comfyui"),
    )
    export_merged: bool = flag(False, "Also write the transformer with the LoRA in its weights.")
    open: bool = flag(False, "Show report.html in this machine's browser at the end.")
    logging_dir: str = flag("logs", "Folder for tracker logs, inside --output_dir.", type=expand_home)
    report_to: Sequence[str] = flag(
        "tensorboard",
        "Trackers: tensorboard, wandb, ..., several by commas, all or none.",
        type=argument_type(parse_trackers),
    )
    log_level: str = flag(
        "warning",
        "What is said on stderr: everything, each stage's cost, warnings and progress, or errors alone.",
        choices=("debug", "info", "warning", "error"),
    )
    push_to_hub: bool = flag(False, "Upload the result to the hub.")
    hub_token: str | None = flag(None, "Token for the upload; default: that of hf auth login, which is safer.")
    hub_model_id: str | None = flag(None, "Name of the repository on the hub; default: the name of --output_dir.")
