"""Rules between flags that need nothing loaded: what cannot work is said in one line before anything starts."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..families import FAMILIES, Family
from ..loading.quantization import read_quantization
from ..planning.options import MEMORY_OPTIONS
from ..selection import parse_skip_blocks
from ..training.comfyui import check_comfyui
from ..training.settings import TrainSettings
from ..training.used_flags import without_effect
from ..utils.errors import UserError, one_line
from ..utils.files import existing_parent
from .arguments import family_flags


logger = logging.getLogger(__name__)

# Flags of upstream scripts that no run here can honour, and why.
_REFUSED = {
    "do_fp8_training": "training in float8 is not supported; leave it out and use --mixed_precision bf16",
    "fsdp_text_encoder": "text encoders are freed before training, so there is nothing to shard; leave it out",
}


def check_family_flags(settings: TrainSettings, family: type[Family]) -> None:
    """Refuse flags that would have no effect with this family, or that no run can honour.

    Args:
        settings: From `parse_args`.
        family: The model's family.

    Raises:
        UserError: naming the flag, and what to do.
    """
    refusals = dict(_REFUSED)
    own = {flag.name: flag for flag in family.own_flags}
    for name in family_flags():
        if name not in own:
            owners = ", ".join(
                dict.fromkeys(f.name for f in FAMILIES.values() if name in {flag.name for flag in f.own_flags})
            )
            refusals[name] = f"it belongs to models of {owners} and does nothing for {family.name}; leave it out"
        elif own[name].refusal:
            refusals[name] = own[name].refusal
    for name in sorted(settings.given):
        if name in refusals:
            raise UserError(f"--{name} cannot be used: {refusals[name]}.")
    if settings.save_format == "comfyui":
        check_comfyui(family, trains_text=settings.train_text_encoder)


_AT_LEAST_ONE = (
    "resolution repeats max_sequence_length min_patch_size max_patch_size precompute_batch_size rank lora_alpha "
    "validation_resolution train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps "
    "sample_batch_size num_class_images validation_epochs validation_num_inference_steps checkpointing_steps "
    "checkpoints_total_limit lr_num_cycles stretch_steps record_repeats"
)
_NOT_NEGATIVE = (
    "dataloader_num_workers lr_warmup_steps num_validation_images seed guidance_scale validation_guidance_scale "
    "prior_loss_weight adam_weight_decay adam_weight_decay_text_encoder"
)
_ABOVE_ZERO = "learning_rate text_encoder_lr adam_epsilon max_grad_norm logit_std lr_power"
_FROM_ZERO_BELOW_ONE = "lora_dropout caption_dropout adam_beta1 adam_beta2 prodigy_beta3"
# Texts that mean something when they are empty; any other is a shell variable that was not set.
_MAY_BE_EMPTY = frozenset(
    ["instance_prompt", "class_prompt", "class_data_dir", "validation_prompt", "final_validation_prompt"]
)


def validate_args(settings: TrainSettings, *, warn: bool = True) -> None:
    """Check the rules between flags that need no model, photo or network, and warn of flags without effect.

    The optimizer may be written in any case; ``--report_to none`` means no tracker.

    Args:
        settings: From `parse_args`, after `apply_defaults` where there are defaults.
        warn: Whether to warn.

    Raises:
        UserError: one line that names the flag, its value and what to give instead.
    """
    values = settings.flags()
    check_texts({name: values[name] for name in settings.given})
    _check_numbers(values)
    _check_photos(settings)
    _check_skipping(settings)
    read_quantization(settings.quantization, settings.bnb_quantization_config_path)
    _check_optimizer(settings)
    _check_validation(settings)
    _check_output(settings)
    for name, needs in without_effect(settings) if warn else ():
        if name in settings.given:
            logger.warning("--%s has no effect without %s.", name, needs)


def _check_numbers(values: Mapping[str, Any]) -> None:
    for names, fits, wanted in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (_ABOVE_ZERO, lambda value: value > 0, "a number above 0"),
        (_FROM_ZERO_BELOW_ONE, lambda value: 0 <= value < 1, "a number from 0 up to, but not including, 1"),
        ("skip_ratio", lambda value: 0 < value < 1, "a number between 0 and 1 (0.3 is 30 %), or --skip_blocks none"),
        ("logit_mean mode_scale", lambda value: True, "a finite number"),
    ):
        for name in names.split():
            value = values[name]
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise UserError(f"--{name} is {value}; give {wanted}.")


def check_texts(values: Mapping[str, Any]) -> None:
    """Refuse texts that are blank where that means nothing.

    Args:
        values: Values of the flags that were given, by name.

    Raises:
        UserError: naming the flag.
    """
    for name in sorted(values.keys() - _MAY_BE_EMPTY):
        if isinstance(values[name], str) and not values[name].strip():
            raise UserError(f"--{name} is empty; give a value, or leave the flag out.")


def _check_photos(settings: TrainSettings) -> None:
    # Photos that came with the embedded model's defaults give way to the user's; two of the user's are a mistake.
    if {"instance_data_dir", "dataset_name"} <= settings.given:
        raise UserError(
            f"--instance_data_dir {settings.instance_data_dir} and --dataset_name {settings.dataset_name} both name "
            "the photos; give one of them."
        )
    has_photos = settings.instance_data_dir or settings.dataset_name
    if settings.pretrained_model_name_or_path is not None:
        model = f"--pretrained_model_name_or_path {settings.pretrained_model_name_or_path}"
        if not has_photos:
            raise UserError(f"{model} needs photos; give --instance_data_dir or --dataset_name.")
        # An empty prompt is a choice; a blank one is a mistake. The upstream scripts for pairs take captions alone.
        prompt, captions_alone = settings.instance_prompt, settings.condition_flag and settings.caption_column
        if prompt.isspace() if prompt is not None else not captions_alone:
            raise UserError(f'{model} needs --instance_prompt; give one like "a photo of sks dog".')
    elif {"instance_data_dir", "dataset_name"} & settings.given and "instance_prompt" not in settings.given:
        logger.warning(
            "No --instance_prompt for your photos: those without a caption get '%s'.", settings.instance_prompt
        )

    _check_conditions(settings)
    if settings.with_prior_preservation:
        for name, example in (("class_data_dir", "a folder"), ("class_prompt", '"a photo of a dog", say')):
            if not getattr(settings, name):
                raise UserError(f"--with_prior_preservation needs --{name}; give {example}.")
        if settings.class_folder.is_file():
            raise UserError(f"--class_data_dir {settings.class_data_dir} is a file; name a folder.")


def _check_conditions(settings: TrainSettings) -> None:
    """Condition images come with photos of their kind, and go with nothing that trains or drops text."""
    if (flag := settings.condition_flag) is None:
        return
    flags = settings.family_flags
    if flags["cond_image_column"] is not None and flags["cond_data_dir"] is not None:
        raise UserError("--cond_image_column and --cond_data_dir both name condition images; give one of them.")
    photos = {"cond_image_column": "dataset_name", "cond_data_dir": "instance_data_dir"}
    if getattr(settings, photos[flag]) is None:
        rules = " and ".join(f"--{name} with --{source}" for name, source in photos.items())
        raise UserError(f"--{flag} {flags[flag]} needs --{photos[flag]}; give {rules}.")
    for name in ("with_prior_preservation", "train_text_encoder", "caption_dropout"):
        if getattr(settings, name):
            raise UserError(f"--{name} does not go with condition images (--{flag} {flags[flag]}); leave one out.")
    prompts = settings.validation_prompt or settings.final_validation_prompt
    if prompts and settings.num_validation_images and flags["validation_image"] is None:
        raise UserError("--validation_prompt needs --validation_image where condition images are trained; name one.")


def _check_skipping(settings: TrainSettings) -> None:
    smallest, largest = settings.min_patch_size, settings.max_patch_size
    if settings.patch_mode != "none" or None not in (smallest, largest):
        lower = smallest or max(1, settings.resolution // 2)
        upper = largest or settings.resolution
        if lower > upper:
            low = f"--min_patch_size {lower}" + ("" if smallest else " (half of --resolution)")
            high = f"--max_patch_size {upper}" + ("" if largest else " (--resolution)")
            raise UserError(f"{low} is above {high}; lower the first or raise the second.")
    if settings.skip_budget is not None and parse_skip_blocks(settings.skip_blocks) != "auto":
        raise UserError(
            f"--skip_budget {settings.skip_budget} and --skip_blocks {settings.skip_blocks} both say what to skip; "
            "give --skip_blocks auto."
        )
    if settings.skip_budget is not None and settings.memory_budget is not None:
        raise UserError("--skip_budget and --memory_budget both choose the blocks to skip; give one of them.")
    if settings.selection_table is not None and not Path(settings.selection_table).is_file():
        inside = Path(settings.selection_table) / "selection.json"
        meant = inside if inside.is_file() else "the selection.json of a blockskip select"
        raise UserError(f"--selection_table {settings.selection_table} is not a file; give {meant}.")
    for option in settings.memory_options:
        if option not in MEMORY_OPTIONS:
            raise UserError(f"--memory_options is '{option}'; choose from {', '.join(MEMORY_OPTIONS)}.")


def _check_optimizer(settings: TrainSettings) -> None:
    from diffusers.optimization import SchedulerType  # slow to import, and --help can do without

    optimizer = settings.optimizer.lower()
    if optimizer not in ("adamw", "prodigy"):
        raise UserError(f"--optimizer is '{settings.optimizer}'; choose AdamW or prodigy.")
    if optimizer == "prodigy":
        if importlib.util.find_spec("prodigyopt") is None:
            raise UserError("--optimizer prodigy needs a package that is not installed; run: pip install prodigyopt")
        if settings.learning_rate <= 0.1:
            logger.warning("--learning_rate %s is low for prodigy, which works best near 1.", settings.learning_rate)
    elif settings.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--use_8bit_adam needs a package that is not installed; run: pip install bitsandbytes")

    # The piecewise schedule takes step rules, and there is no flag for them.
    schedulers = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    if settings.lr_scheduler not in schedulers:
        raise UserError(f"--lr_scheduler is '{settings.lr_scheduler}'; choose one of {', '.join(schedulers)}.")


def _check_validation(settings: TrainSettings) -> None:
    prompts = settings.validation_prompt or ()
    # A shell takes an unquoted sentence for as many prompts as it has words.
    if len(prompts) > 1 and not any(len(prompt.split()) > 1 for prompt in prompts):
        raise UserError(
            f"--validation_prompt has {len(prompts)} prompts of one word; put quotes around each: "
            f'--validation_prompt "{" ".join(prompts)}".'
        )


def _check_output(settings: TrainSettings) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    _check_trackers(settings)
    if settings.push_to_hub:
        repo_id = settings.hub_model_id or Path(settings.output_dir).resolve().name
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            flag = "--hub_model_id" if settings.hub_model_id else "--output_dir, without --hub_model_id,"
            raise UserError(f"{flag} is no name of a repository: {one_line(str(error))}") from error

    if settings.validation_model_path is not None and settings.train_text_encoder:
        raise UserError(
            "--validation_model_path has text encoders of its own, without the LoRA of --train_text_encoder; leave "
            "one of them out."
        )
    if settings.export_merged and settings.train_text_encoder:
        raise UserError(
            "--export_merged writes the transformer alone, without the LoRA of --train_text_encoder; leave one of "
            "them out."
        )

    if settings.residual_dir is not None and Path(settings.residual_dir).is_file():
        raise UserError(f"--residual_dir {settings.residual_dir} is a file; name a folder.")
    folder = Path(settings.output_dir)
    check_output_dir(folder)

    checkpoint = settings.resume_from_checkpoint
    if checkpoint not in (None, "latest") and not (Path(checkpoint).is_dir() or (folder / checkpoint).is_dir()):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} is not a folder, nor one in --output_dir {folder}; "
            "give an existing checkpoint or latest."
        )


def _check_trackers(settings: TrainSettings) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known, wanted = [kind.value for kind in LoggerType], settings.report_to
    for name in wanted:
        if name not in known:
            raise UserError(f"--report_to is '{','.join(wanted)}'; choose one of {', '.join(known)}, none.")
    # Trackers of services keep the command line.
    if set(wanted) - {"tensorboard"} and settings.hub_token is not None:
        raise UserError(
            f"--hub_token would be shown by --report_to {','.join(wanted)}; drop it and run `hf auth login` instead."
        )
    # accelerate leaves out a tracker whose package is missing without a word.
    for name in sorted(set(wanted) - {kind.value for kind in get_available_trackers()} - {"all"}):
        raise UserError(f"--report_to {name} is not installed; run: pip install {name}, or give --report_to none.")


def check_output_dir(folder: Path) -> None:
    """Check that ``--output_dir`` is a folder that can be written, or can become one.

    Raises:
        UserError: if not.
    """
    # The folder may be several levels short of existing; the first that does exist decides.
    existing = existing_parent(folder)
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is a file; name a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder} cannot be written; name a folder that you may write to.")
