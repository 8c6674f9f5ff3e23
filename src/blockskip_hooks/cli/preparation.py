"""Flags to a run: every setting resolved and checked before any weight is read, so that mistakes cost seconds."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import PatchMode
from ..data.checks import check_photos
from ..data.dataset import load_dataset_photos
from ..data.folder import condition_paths, image_paths, no_photos
from ..data.photo import Photo
from ..data.photos import scan_photos
from ..data.picture import open_picture
from ..data.summary import summarize_photos
from ..embedded import BEST_CLASSES, DEFAULT_SUBJECT, embedded_model, embedded_photos, embedded_subjects, unknown_words
from ..families import Family, detect_family, unread_components
from ..loading.checks import check_model
from ..loading.download import resolve_model
from ..loading.model_defaults import model_defaults
from ..loading.quantization import QuantizationConfig, read_quantization
from ..planning.options import QUANTIZING_OPTIONS
from ..residuals.store import check_store_folder
from ..training.assistant import Assistant, find_assistant
from ..training.chosen_blocks import choose_blocks
from ..training.run import Run
from ..training.settings import TrainSettings
from ..training.sharding import asks_for_sharding
from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import UserError
from ..utils.launcher import check_launcher
from .argument_checks import check_family_flags, validate_args
from .arguments import apply_defaults
from .image_settings import check_pipeline, image_size, typed_image_arguments, with_validation_model


logger = logging.getLogger(__name__)

EMBEDDED_PROMPTS = 4


def prepare_run(settings: TrainSettings) -> Run:
    """Resolve and check everything that needs no weights.

    Args:
        settings: From :func:`~blockskip_hooks.cli.arguments.parse_args`.

    Raises:
        UserError: one line that names the flag and the fix.
        OSError: if a folder cannot be read or written.
    """
    check_launcher(settings.mixed_precision)
    embedded = settings.pretrained_model_name_or_path is None
    model_name = settings.pretrained_model_name_or_path or "embedded micro-FLUX"
    if not embedded:
        # What the user typed is checked before a download starts.
        validate_args(settings, warn=False)
    model_path = _find_model(settings)
    family_class = detect_family(model_path)
    check_family_flags(settings, family_class)
    defaults, folder_kwargs = model_defaults(model_path)
    prompts: list[str] = []
    if embedded:
        defaults |= _embedded_defaults(settings)
        if "instance_data_dir" in defaults:
            # The last one's red background hides the edges of a pink teapot.
            prompts = embedded_subjects()[DEFAULT_SUBJECT]["validation_prompts"][:EMBEDDED_PROMPTS]
    settings = apply_defaults(settings, {**family_class.flag_defaults, **defaults})
    if settings.lora_alpha is None:
        settings = settings.with_values({"lora_alpha": settings.rank})
    validate_args(settings)
    if settings.validation_prompt is not None:
        prompts = list(settings.validation_prompt)
    elif embedded and not prompts and settings.instance_prompt:
        # A first try ends in pictures; those of this model take seconds.
        prompts = [settings.instance_prompt]

    check_model(model_path, family_class, settings.variant, plan_only=settings.plan_only)
    try:
        family = family_class(model_path, settings.variant, settings.flags())
        blocks = choose_blocks(settings, family, model_name)
    except OSError as error:
        raise UserError(f"--pretrained_model_name_or_path {model_path} cannot be used: {error}") from error
    # Only of distilled models is anything trained beside an assistant.
    few = family.few_step_arguments() if settings.assistant_lora else {}
    few.pop("max_sequence_length", None)
    pipeline_kwargs = {**image_size(settings, family, settings.pretrained_model_name_or_path), **few, **folder_kwargs}
    quantization, shares_weights = _weights_in_training(settings, blocks["skeleton"])
    assistant = _find_assistant(settings, family, blocks["skeleton"])
    check_pipeline(family, pipeline_kwargs)
    photos = _find_photos(settings, family_class)
    for line in summarize_photos(photos, blocks["patch"].shapes).warnings():
        logger.warning(line)
    for line in _lines_on_words(settings.instance_prompt or "", prompts, embedded):
        logger.warning(line)
    if settings.with_prior_preservation:
        _check_class_images(settings.class_folder)
    if not settings.instance_prompt and any(photo.caption is None for photo in photos):
        logger.warning("--instance_prompt is empty: photos without a caption train on an empty prompt.")
    _check_features(settings, family, blocks["patch"].mode)
    _check_writable(settings.output_folder)
    run = Run(
        settings=settings,
        family=family,
        model_name=model_name,
        embedded=embedded,
        **blocks,
        photos=photos,
        prompts=prompts,
        validation_image=_find_validation_image(settings),
        pipeline_kwargs=pipeline_kwargs,
        quantization=quantization,
        shares_weights=shares_weights,
        assistant=assistant,
        validation_kwargs=pipeline_kwargs | typed_image_arguments(settings),
    )
    if run.uses_store:
        check_store_folder(run.residual_dir)
    return with_validation_model(run) if settings.validation_model_path and run.makes_images else run


def other_capitals(prompt: str, others: Sequence[str]) -> dict[str, str]:
    """Words of other prompts that ``prompt`` spells with other capitals, with its spelling; first words may differ."""
    spelled = {word.lower(): word for word in prompt.split()[1:]}
    words = [word for other in others for word in other.split()[1:]]
    return {word: spelled[word.lower()] for word in words if spelled.get(word.lower(), word) != word}


def _lines_on_words(prompt: str, others: Sequence[str], embedded: bool) -> list[str]:
    """What is likely a mistake in the words of the prompts: a line of each kind."""
    lines = []
    if embedded and (unknown := unknown_words(" ".join([prompt, *others]))):
        lines.append(
            f"The embedded model has never read {', '.join(unknown)}; of things it knows {', '.join(BEST_CLASSES)} "
            'best. Write "object" for anything else, or name a larger model.'
        )
    if found := other_capitals(prompt, others):
        pairs = ", ".join(f"{spelled} ({word})" for word, spelled in found.items())
        lines.append(
            f"Capital letters of --instance_prompt differ from those of a validation prompt: {pairs}. To many text "
            "encoders these are other words; write them alike."
        )
    return lines


def _weights_in_training(
    settings: TrainSettings, skeleton: DiTBlockSkipTransformer
) -> tuple[QuantizationConfig | None, bool]:
    """How kept blocks' weights are held, and whether processes divide them."""
    quantization = read_quantization(settings.quantization, settings.bnb_quantization_config_path)
    if quantization and not quantization.layers(skeleton.transformer, [block.name for block in skeleton.spans.kept]):
        raise UserError(
            f"No kept block has a layer that can be held in {quantization.name}; leave --quantization out."
        )
    shares_weights = asks_for_sharding()
    may_quantize = quantization is not None or not QUANTIZING_OPTIONS.isdisjoint(settings.memory_options)
    if shares_weights and may_quantize:
        raise UserError(
            "--quantization, also as one of --memory_options, and accelerate's FSDP do not go together: quantised "
            "weights cannot be divided; leave one of them out."
        )
    if settings.compile and (shares_weights or may_quantize):
        raise UserError(
            "--compile goes neither with --quantization, also as one of --memory_options, nor with accelerate's FSDP: "
            "compiled blocks of such weights were never tried; leave one of them out."
        )
    return quantization, shares_weights


def _find_assistant(settings: TrainSettings, family: Family, skeleton: DiTBlockSkipTransformer) -> Assistant | None:
    if settings.assistant_lora is None:
        return None
    if asks_for_sharding():
        raise UserError(
            "--assistant_lora and accelerate's FSDP do not go together: divided layers with a frozen LoRA were never "
            "tried; leave one of them out."
        )
    transformer = skeleton.transformer
    return find_assistant(settings.assistant_lora, family, transformer, settings.cache_dir, settings.hub_token)


def known_defaults(settings: TrainSettings) -> dict[str, Any]:
    """What a run would put in place of flags' own defaults, as far as that is known without asking the hub.

    Raises:
        UserError: if the model's folder is not one of a supported pipeline.
    """
    name = settings.pretrained_model_name_or_path
    embedded, folder = name is None, embedded_model() if name is None else Path(name)
    if not folder.is_dir():
        return {}
    own = model_defaults(folder)[0] | (_embedded_defaults(settings) if embedded else {})
    return {**detect_family(folder).flag_defaults, **own}


def _embedded_defaults(settings: TrainSettings) -> dict[str, Any]:
    if {"instance_data_dir", "dataset_name"} & settings.given:
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


def _find_model(settings: TrainSettings) -> Path:
    if settings.pretrained_model_name_or_path is None:
        return embedded_model()
    if not Path(settings.pretrained_model_name_or_path).is_dir():
        # Before a download.
        _check_files(settings)
    return resolve_model(
        settings.pretrained_model_name_or_path,
        revision=settings.revision,
        variant=settings.variant,
        cache_dir=settings.cache_dir,
        token=settings.hub_token,
        configs_only=settings.plan_only,
        unread=unread_components,
    )


def _check_files(settings: TrainSettings) -> None:
    """Look for photos and condition images where they are said to be; whether they can be read is seen later."""
    folder = Path(settings.instance_data_dir or "")
    if settings.instance_data_dir and not (folder.is_dir() and image_paths(folder)):
        raise UserError(no_photos(folder, "--instance_data_dir"))
    conditions, shown = (settings.family_flags[name] for name in ("cond_data_dir", "validation_image"))
    if conditions and not Path(conditions).is_dir():
        raise UserError(f"--cond_data_dir {conditions} is not a folder; name the one that holds the condition images.")
    if shown and settings.condition_flag and not Path(shown).is_file():
        raise UserError(f"--validation_image {shown} is not a file; name the condition image of validation pictures.")


def _check_class_images(folder: Path) -> None:
    """Check the class images that are there already."""
    if folder.is_dir() and image_paths(folder):
        scan_photos(folder, flag="--class_data_dir")


def _find_photos(settings: TrainSettings, family: type[Family]) -> list[Photo]:
    if settings.dataset_name:
        return load_dataset_photos(
            settings.dataset_name,
            settings.dataset_config_name,
            settings.image_column,
            settings.caption_column,
            settings.cache_dir,
            cond_image_column=settings.family_flags["cond_image_column"],
        )
    folder, conditions = Path(settings.instance_data_dir or ""), settings.family_flags["cond_data_dir"]
    photos = scan_photos(folder, conditions=conditions and Path(conditions))
    if conditions is None and "cond_data_dir" in {flag.name for flag in family.own_flags}:
        for path in list(condition_paths(folder, [photo.path for photo in photos if photo.path]).values())[:1]:
            advice = f"--cond_data_dir {folder} makes condition images of them"
            logger.warning("--instance_data_dir %s: %s and others train as photos; %s.", folder, path.name, advice)
    return photos


def _find_validation_image(settings: TrainSettings) -> Image.Image | None:
    """The condition image of validation images, decoded; ``None`` where there are none."""
    name = settings.family_flags["validation_image"]
    if name is None or settings.condition_flag is None:
        return None
    path = Path(name)
    (photo,) = check_photos([Photo(path.name, None, partial(open_picture, path), path)], f"--validation_image {name}")
    return photo.decode()


def _check_features(settings: TrainSettings, family: Family, patch_mode: PatchMode) -> None:
    """Refuse flags that ask for what the family, or a package, does not have."""
    if settings.train_text_encoder and not family.text_lora_layers:
        raise UserError(f"--train_text_encoder is not available for {family.name}; leave it out.")
    family.check()
    if settings.condition_flag and family.reads_condition and patch_mode != "none":
        raise UserError(
            f"--patch_sampling is {patch_mode}; {family.name}'s text encoder sees the condition image, so crops are "
            "the same in the whole run: give --patch_sampling none."
        )
    if settings.enable_npu_flash_attention and importlib.util.find_spec("torch_npu") is None:
        raise UserError("--enable_npu_flash_attention needs a package that is not installed: torch_npu.")


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder} cannot be written; choose another folder.")
