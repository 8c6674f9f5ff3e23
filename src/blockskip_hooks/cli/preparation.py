"""Flags to a run: every setting resolved and checked before any weight is read, so that mistakes cost seconds."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import logging
import os
from pathlib import Path
from typing import Any

from ..data.photos import Photo, image_paths, load_dataset_photos, scan_photos
from ..embedded import DEFAULT_SUBJECT, embedded_model, embedded_photos, embedded_subjects, model_defaults
from ..families import detect_family
from ..loading.checks import check_model
from ..loading.download import check_weights, has_weights, resolve_model
from ..loading.quantization import read_quantization
from ..training.settings import Run
from ..training.sharding import asks_for_sharding
from .argument_checks import check_family_flags, validate_args
from .arguments import QUANTIZING_OPTIONS, apply_defaults
from .chosen_blocks import choose_blocks


logger = logging.getLogger(__name__)

EMBEDDED_PROMPTS = 4


def prepare_run(args: argparse.Namespace) -> Run:
    """Resolve and check everything that needs no weights.

    Args:
        args: From :func:`~blockskip_hooks.cli.arguments.parse_args`; changed in place.

    Raises:
        ValueError: one line that names the flag and the fix.
        OSError: if a folder cannot be read or written.
    """
    embedded = args.pretrained_model_name_or_path is None
    model_name = args.pretrained_model_name_or_path or "embedded micro-FLUX"
    if not embedded:
        # What the user typed is checked before a download starts.
        validate_args(args, warn=False)
    model_path = embedded_model() if embedded else resolve_model(args)
    family_class = detect_family(model_path)
    check_family_flags(args, family_class)
    defaults, pipeline_kwargs = model_defaults(model_path)
    prompts: list[str] = []
    if embedded:
        defaults |= _embedded_defaults(args)
        if "instance_data_dir" in defaults:
            prompts = embedded_subjects()[DEFAULT_SUBJECT]["validation_prompts"][:EMBEDDED_PROMPTS]
    apply_defaults(args, {**family_class.flag_defaults, **defaults})
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    validate_args(args)
    if embedded:
        pipeline_kwargs = {"height": args.resolution, "width": args.resolution, **pipeline_kwargs}
    if args.validation_prompt is not None:
        prompts = [args.validation_prompt]

    # A plan needs no weights; what is there is checked.
    configs_only = args.plan_only and not has_weights(model_path)
    if not configs_only:
        check_weights(model_path, family_class, args.variant)
    check_model(model_path, family_class, args.variant, configs_only=configs_only)
    try:
        family = family_class(model_path, args.variant, vars(args))
        blocks = choose_blocks(args, family, model_name)
    except OSError as error:
        raise ValueError(f"--pretrained_model_name_or_path {model_path} cannot be used: {error}") from error
    skeleton, quantization = blocks["skeleton"], read_quantization(args)
    if quantization and not quantization.layers(skeleton.transformer, [block.name for block in skeleton.spans.kept]):
        raise ValueError(
            f"No kept block has a layer that can be held in {quantization.name}; leave --quantization out."
        )
    shares_weights = asks_for_sharding()
    if shares_weights and (quantization or not QUANTIZING_OPTIONS.isdisjoint(args.memory_options)):
        raise ValueError(
            "--quantization, also as one of --memory_options, and accelerate's FSDP do not go together: quantised "
            "weights cannot be divided; leave one of them out."
        )
    accepted = inspect.signature(family.pipeline_class.__call__).parameters
    unknown = sorted(pipeline_kwargs.keys() - accepted.keys())
    if unknown:
        raise ValueError(f"{model_path}/blockskip_defaults.json: the model's pipeline takes no {', '.join(unknown)}.")
    photos = _find_photos(args)
    if args.with_prior_preservation and Path(args.class_data_dir).is_dir() and image_paths(Path(args.class_data_dir)):
        scan_photos(Path(args.class_data_dir), flag="--class_data_dir")
    if not args.instance_prompt and any(photo.caption is None for photo in photos):
        logger.warning("--instance_prompt is empty: photos without a caption train on an empty prompt.")
    if args.train_text_encoder and not family.text_lora_layers:
        raise ValueError(f"--train_text_encoder is not available for {family.name}; leave it out.")
    family.check()
    if args.enable_npu_flash_attention and importlib.util.find_spec("torch_npu") is None:
        raise ValueError("--enable_npu_flash_attention needs a package that is not installed: torch_npu.")
    _check_writable(Path(args.output_dir))
    return Run(
        args=args,
        family=family,
        model_name=model_name,
        embedded=embedded,
        **blocks,
        photos=photos,
        prompts=prompts,
        pipeline_kwargs=pipeline_kwargs,
        quantization=quantization,
        shares_weights=shares_weights,
    )


def known_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """What a run would put in place of flags' own defaults, as far as that is known without asking the hub.

    Raises:
        ValueError: if the model's folder is not one of a supported pipeline.
    """
    embedded = args.pretrained_model_name_or_path is None
    folder = embedded_model() if embedded else Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        return {}
    own = model_defaults(folder)[0] | (_embedded_defaults(args) if embedded else {})
    return {**detect_family(folder).flag_defaults, **own}


def _embedded_defaults(args: argparse.Namespace) -> dict[str, Any]:
    if {"instance_data_dir", "dataset_name"} & args.given:
        return {"instance_prompt": "a photo of sks object"}
    subject = embedded_subjects()[DEFAULT_SUBJECT]
    return {
        "instance_data_dir": str(embedded_photos(DEFAULT_SUBJECT)),
        "instance_prompt": subject["instance_prompt"],
        "class_prompt": subject["class_prompt"],
        "num_validation_images": 2,
        "checkpointing_steps": 100,
        "seed": 0,
    }


def _find_photos(args: argparse.Namespace) -> list[Photo]:
    if args.dataset_name:
        return load_dataset_photos(
            args.dataset_name, args.dataset_config_name, args.image_column, args.caption_column, args.cache_dir
        )
    return scan_photos(Path(args.instance_data_dir))


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written; choose another folder.")
