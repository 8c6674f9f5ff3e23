"""Rules between flags that need nothing loaded: what cannot work is said in one line before anything starts."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

from ..data.buckets import parse_buckets
from ..families import FAMILIES, Family
from ..loading.quantization import read_quantization
from ..training.comfyui import check_comfyui
from .arguments import (
    MEMORY_OPTIONS,
    family_flags,
    looks_up_blocks,
    parse_bytes,
    parse_skip_blocks,
    parse_trackers,
)
from .errors import one_line


logger = logging.getLogger(__name__)

# Flags of upstream scripts that no run here can honour, and why.
_REFUSED = {
    "do_fp8_training": "training in float8 is not supported; leave it out and use --mixed_precision bf16",
    "fsdp_text_encoder": "text encoders are freed before training, so there is nothing to shard; leave it out",
}


def check_family_flags(args: argparse.Namespace, family: type[Family]) -> None:
    """Refuse flags that would have no effect with this family, or that no run can honour.

    Args:
        args: From `parse_args`.
        family: The model's family.

    Raises:
        ValueError: naming the flag, and what to do.
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
    for name in sorted(args.given):
        if name in refusals:
            raise ValueError(f"--{name} cannot be used: {refusals[name]}.")
    if args.save_format == "comfyui":
        check_comfyui(family, trains_text=args.train_text_encoder)


_AT_LEAST_ONE = (
    "resolution repeats max_sequence_length min_patch_size max_patch_size precompute_batch_size rank lora_alpha "
    "probe_steps train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps sample_batch_size "
    "num_class_images validation_epochs validation_num_inference_steps checkpointing_steps checkpoints_total_limit "
    "lr_num_cycles stretch_steps record_repeats"
)
_NOT_NEGATIVE = (
    "dataloader_num_workers lr_warmup_steps num_validation_images seed guidance_scale validation_guidance_scale "
    "prior_loss_weight adam_weight_decay adam_weight_decay_text_encoder"
)
_ABOVE_ZERO = "learning_rate text_encoder_lr adam_epsilon max_grad_norm logit_std lr_power"
_FROM_ZERO_BELOW_ONE = "lora_dropout caption_dropout adam_beta1 adam_beta2 prodigy_beta3"
# Above these numbers a flag is a slip of the keyboard: nothing could run, or nothing would come of it.
_AT_MOST = (
    (2**10, "dataloader_num_workers shared_by"),
    (
        2**14,
        "resolution training_resolution validation_resolution min_patch_size max_patch_size max_sequence_length rank",
    ),
    (
        2**16,
        "train_batch_size gradient_accumulation_steps precompute_batch_size sample_batch_size num_validation_images "
        "repeats lora_alpha num_inference_steps images_at_once",
    ),
    (10**6, "num_class_images learning_rate text_encoder_lr guidance_scale validation_guidance_scale max_grad_norm"),
    (10**6, "adam_epsilon adam_weight_decay adam_weight_decay_text_encoder prior_loss_weight logit_mean logit_std"),
    (10**6, "mode_scale lr_power num_train_epochs lr_num_cycles probe_steps validation_num_inference_steps"),
    (10**9, "max_train_steps lr_warmup_steps validation_epochs checkpointing_steps checkpoints_total_limit"),
)
# Texts that mean something when they are empty; any other is a shell variable that was not set.
_MAY_BE_EMPTY = frozenset(
    ["instance_prompt", "class_prompt", "class_data_dir", "validation_prompt", "final_validation_prompt"]
)
_PRODIGY_FLAGS = "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup"


def validate_args(args: argparse.Namespace, *, warn: bool = True) -> None:
    """Check the rules between flags that need no model, photo or network, and warn of flags without effect.

    The optimizer may be written in any case; ``--report_to none`` means no tracker.

    Args:
        args: From `parse_args`, after `apply_defaults` where there are defaults.
        warn: Whether to warn.

    Raises:
        ValueError: one line that names the flag, its value and what to give instead.
    """
    check_texts(args)
    _check_numbers(args)
    _check_photos(args)
    _check_skipping(args)
    read_quantization(args.quantization, args.bnb_quantization_config_path)
    _check_optimizer(args)
    _check_output(args)
    for name, needs in _without_effect(args) if warn else ():
        if name in args.given:
            logger.warning("--%s has no effect without %s.", name, needs)


def _check_numbers(args: argparse.Namespace) -> None:
    for names, fits, wanted in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (_ABOVE_ZERO, lambda value: value > 0, "a number above 0"),
        (_FROM_ZERO_BELOW_ONE, lambda value: 0 <= value < 1, "a number from 0 up to, but not including, 1"),
        ("skip_ratio", lambda value: 0 < value < 1, "a number between 0 and 1, or --skip_blocks none"),
        ("logit_mean mode_scale", lambda value: True, "a finite number"),
        ("seed", lambda value: value < 2**32, "a number below 2**32"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise ValueError(f"--{name} is {value}; give {wanted}.")

    check_at_most(args)


def check_at_most(args: argparse.Namespace) -> None:
    """Refuse numbers that are a slip of the keyboard, among those of the flags that ``args`` has.

    Raises:
        ValueError: naming the flag and the most that it takes.
    """
    for largest, names in _AT_MOST:
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and abs(value) > largest:
                raise ValueError(f"--{name} is {value:g}; give at most {largest:,}.")


def check_texts(args: argparse.Namespace) -> None:
    """Refuse texts that are blank where that means nothing.

    Raises:
        ValueError: naming the flag.
    """
    for name in sorted(set(getattr(args, "given", vars(args))) - _MAY_BE_EMPTY):
        value = getattr(args, name)
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"--{name} is empty; give a value, or leave the flag out.")


def _check_photos(args: argparse.Namespace) -> None:
    # Photos that came with the embedded model's defaults give way to the user's; two of the user's are a mistake.
    if {"instance_data_dir", "dataset_name"} <= args.given:
        raise ValueError(
            f"--instance_data_dir {args.instance_data_dir} and --dataset_name {args.dataset_name} both name the "
            "photos; give one of them."
        )
    has_photos = args.instance_data_dir or args.dataset_name
    if args.pretrained_model_name_or_path is not None:
        model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
        if not has_photos:
            raise ValueError(f"{model} needs photos; give --instance_data_dir or --dataset_name.")
        # An empty prompt is a choice; a blank one is a mistake.
        if args.instance_prompt is None or args.instance_prompt.isspace():
            raise ValueError(f'{model} needs --instance_prompt; give one like "a photo of sks dog".')
    elif {"instance_data_dir", "dataset_name"} & args.given and "instance_prompt" not in args.given:
        logger.warning("No --instance_prompt for your photos: those without a caption get the embedded model's.")

    if args.with_prior_preservation:
        for name, example in (("class_data_dir", "a folder"), ("class_prompt", '"a photo of a dog", say')):
            if not getattr(args, name):
                raise ValueError(f"--with_prior_preservation needs --{name}; give {example}.")
        if Path(args.class_data_dir).is_file():
            raise ValueError(f"--class_data_dir {args.class_data_dir} is a file; name a folder.")


def _check_skipping(args: argparse.Namespace) -> None:
    parse_skip_blocks(args.skip_blocks)
    smallest, largest = args.min_patch_size, args.max_patch_size
    if _patch_mode(args) != "none" or None not in (smallest, largest):
        lower = smallest or max(1, args.resolution // 2)
        upper = largest or args.resolution
        if lower > upper:
            low = f"--min_patch_size {lower}" + ("" if smallest else " (half of --resolution)")
            high = f"--max_patch_size {upper}" + ("" if largest else " (--resolution)")
            raise ValueError(f"{low} is above {high}; lower the first or raise the second.")
    if args.aspect_ratio_buckets is not None:
        parse_buckets(args.aspect_ratio_buckets)
    if args.skip_budget is not None and parse_skip_blocks(args.skip_blocks) != "auto":
        raise ValueError(
            f"--skip_budget {args.skip_budget} and --skip_blocks {args.skip_blocks} both say what to skip; give "
            "--skip_blocks auto."
        )
    if args.skip_budget is not None and args.memory_budget is not None:
        raise ValueError("--skip_budget and --memory_budget both choose the blocks to skip; give one of them.")
    if args.selection_table is not None and args.select_on == "subject":
        raise ValueError("--selection_table and --select_on subject are two sources of one choice; give one of them.")
    if args.selection_table is not None and not Path(args.selection_table).is_file():
        raise ValueError(f"--selection_table {args.selection_table} is not a file; give one of select_blocks.py's.")
    for name in ("residual_budget", "memory_budget", "skip_budget"):
        if getattr(args, name) is not None:
            try:
                parse_bytes(getattr(args, name))
            except ValueError as error:
                raise ValueError(f"--{name} is {error}") from None
    for option in args.memory_options:
        if option not in MEMORY_OPTIONS:
            raise ValueError(f"--memory_options is '{option}'; choose from {', '.join(MEMORY_OPTIONS)}.")


def _check_optimizer(args: argparse.Namespace) -> None:
    from diffusers.optimization import SchedulerType  # slow to import, and --help can do without

    optimizer = args.optimizer.lower()
    if optimizer not in ("adamw", "prodigy"):
        raise ValueError(f"--optimizer is '{args.optimizer}'; choose AdamW or prodigy.")
    if optimizer == "prodigy":
        if importlib.util.find_spec("prodigyopt") is None:
            raise ValueError("--optimizer prodigy needs a package that is not installed; run: pip install prodigyopt")
        if args.learning_rate <= 0.1:
            logger.warning("--learning_rate %s is low for prodigy, which works best near 1.", args.learning_rate)
    elif args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs a package that is not installed; run: pip install bitsandbytes")

    # The piecewise schedule takes step rules, and there is no flag for them.
    schedulers = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    if args.lr_scheduler not in schedulers:
        raise ValueError(f"--lr_scheduler is '{args.lr_scheduler}'; choose one of {', '.join(schedulers)}.")


def _check_output(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    _check_trackers(args)
    if args.push_to_hub:
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            flag = "--hub_model_id" if args.hub_model_id else "--output_dir, without --hub_model_id,"
            raise ValueError(f"{flag} is no name of a repository: {one_line(str(error))}") from error

    if args.export_merged and args.train_text_encoder:
        raise ValueError(
            "--export_merged writes the transformer alone, without the LoRA of --train_text_encoder; leave one of "
            "them out."
        )

    folder = Path(args.output_dir)
    check_output_dir(folder)

    checkpoint = args.resume_from_checkpoint
    if checkpoint not in (None, "latest") and not (Path(checkpoint).is_dir() or (folder / checkpoint).is_dir()):
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is not a folder, nor one in --output_dir {folder}; "
            "give an existing checkpoint or latest."
        )


def _check_trackers(args: argparse.Namespace) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known, wanted = [kind.value for kind in LoggerType], parse_trackers(args.report_to)
    for name in wanted:
        if name not in known:
            raise ValueError(f"--report_to is '{args.report_to}'; choose one of {', '.join(known)}, none.")
    # Trackers of services keep the command line.
    if set(wanted) - {"tensorboard"} and args.hub_token is not None:
        raise ValueError(
            f"--hub_token would be shown by --report_to {args.report_to}; drop it and run `hf auth login` instead."
        )
    # accelerate leaves out a tracker whose package is missing without a word.
    for name in sorted(set(wanted) - {kind.value for kind in get_available_trackers()} - {"all"}):
        raise ValueError(f"--report_to {name} is not installed; run: pip install {name}, or give --report_to none.")


def check_output_dir(folder: Path) -> None:
    """Check that ``--output_dir`` is a folder that can be written, or can become one.

    Raises:
        ValueError: if not.
    """
    # The folder may be several levels short of existing; the first that does exist decides.
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not existing.is_dir():
        raise ValueError(f"--output_dir {folder}: {existing} is a file; name a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {folder} cannot be written; name a folder that you may write to.")


def _skips(args: argparse.Namespace) -> bool:
    return parse_skip_blocks(args.skip_blocks) not in ("none", 0, (0, 0))


def _patch_mode(args: argparse.Namespace) -> str:
    """What ``--patch_sampling`` comes to, as far as the flags alone tell."""
    if args.patch_sampling != "auto":
        return args.patch_sampling
    return "dynamic" if _skips(args) else "none"


def _without_effect(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Pairs of a flag that this run does not look at, and what would make it count."""
    skipping = _skips(args)
    prodigy = args.optimizer.lower() == "prodigy"
    embedded = args.pretrained_model_name_or_path is None
    for useful, names, needs in (
        (args.with_prior_preservation, ("class_data_dir", "class_prompt"), "--with_prior_preservation"),
        (args.dataset_name, ("dataset_config_name", "image_column", "caption_column"), "--dataset_name"),
        (parse_skip_blocks(args.skip_blocks) == "auto", ("skip_ratio",), "--skip_blocks auto"),
        (not args.skip_budget, ("skip_ratio",), "a choice by ratio, which --skip_budget replaces"),
        (
            looks_up_blocks(args),
            ("selection_table", "select_on", "strict_table"),
            "--skip_blocks auto or a number of blocks",
        ),
        (args.select_on != "table", ("selection_encoder",), "--select_on base or subject"),
        (args.select_on == "subject", ("probe_steps",), "--select_on subject"),
        (skipping or args.memory_budget, ("residuals",), "skipped blocks"),
        (args.memory_budget, ("memory_options",), "--memory_budget"),
        (
            skipping and args.residuals == "precomputed",
            (
                *("residual_dir", "residual_dtype", "residual_budget"),
                *("precompute_batch_size", "overwrite_residuals", "keep_modulation"),
                *("stretch_steps", "record_repeats", "refresh_residuals"),
            ),
            "precomputed residuals of skipped blocks",
        ),
        (_patch_mode(args) != "none", ("min_patch_size",), "--patch_sampling other than none"),
        (args.train_text_encoder, ("text_encoder_lr", "adam_weight_decay_text_encoder"), "--train_text_encoder"),
        (prodigy, _PRODIGY_FLAGS.split(), "--optimizer prodigy"),
        (not prodigy, ("use_8bit_adam",), "--optimizer AdamW"),
        (args.weighting_scheme == "logit_normal", ("logit_mean", "logit_std"), "--weighting_scheme logit_normal"),
        (args.weighting_scheme == "mode", ("mode_scale",), "--weighting_scheme mode"),
        (
            args.validation_prompt or args.final_validation_prompt or embedded,
            ("num_validation_images",),
            "--validation_prompt",
        ),
        (args.validation_prompt, ("validation_epochs",), "--validation_prompt"),
        (args.push_to_hub, ("hub_model_id",), "--push_to_hub"),
    ):
        if not useful:
            for name in names:
                yield name, needs
