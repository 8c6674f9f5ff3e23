"""What makes validation images, and with which arguments: the model that is trained, or another one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..blocks import list_blocks
from ..families import Family, detect_family, unread_components
from ..loading.checks import check_model
from ..loading.component_config import load_config
from ..loading.download import resolve_model
from ..loading.model_defaults import model_defaults
from ..loading.models import empty_model
from ..training.run import Run
from ..training.settings import TrainSettings
from ..utils.errors import UserError


def typed_image_arguments(settings: TrainSettings) -> dict[str, Any]:
    """Arguments of the pipeline call that flags give for validation images."""
    flags = {"guidance_scale": "validation_guidance_scale", "num_inference_steps": "validation_num_inference_steps"}
    return {name: settings.family_flags[flag] for name, flag in flags.items() if flag in settings.given}


def with_validation_model(run: Run) -> Run:
    """A run with the model of ``--validation_model_path`` in the place of the trained one for validation images.

    Raises:
        UserError: if that is no model which the LoRA fits.
    """
    settings, name = run.settings, run.settings.validation_model_path or ""
    flag = f"--validation_model_path {name}"
    if run.shares_weights:
        raise UserError(f"{flag} needs room that the trained model has by accelerate's FSDP; leave one of them out.")
    place: dict[str, Any] = {"variant": settings.variant, "cache_dir": settings.cache_dir, "token": settings.hub_token}
    try:
        path = resolve_model(name, configs_only=settings.plan_only, unread=unread_components, **place)
        family_class = detect_family(path)
        check_model(path, family_class, settings.variant, plan_only=settings.plan_only)
        defaults, folder_kwargs = model_defaults(path)
        family = family_class(path, settings.variant, settings.flags())
        family.check()
    except UserError as error:
        # Which is written for the model that is trained.
        raise UserError(str(error).replace("--pretrained_model_name_or_path", "--validation_model_path")) from error
    _check_layers(run, family, flag)
    few = family.few_step_arguments()
    length = few.pop("max_sequence_length", None)
    if "max_sequence_length" not in settings.given:
        length = defaults.get("max_sequence_length", length)
        family.flags |= {} if length is None else {"max_sequence_length": length}
    kwargs = {**image_size(settings, family, name), **few, **folder_kwargs}
    check_pipeline(family, kwargs)
    if run.validation_image and "image" not in inspect.signature(family.pipeline_class.__call__).parameters:
        raise UserError(f"{flag} takes no condition image, and --validation_image is one; name a model that does.")
    return replace(run, validation_family=family, validation_kwargs=kwargs | typed_image_arguments(settings))


def _check_layers(run: Run, family: Family, flag: str) -> None:
    """Check that a model has the blocks, and the layers with LoRA, of the model that is trained."""
    config = load_config(family.model_path / "transformer")
    other, trained = empty_model(config, family.transformer_class(config)), run.skeleton.transformer
    blocks = [
        [block.name for block in list_blocks(model, stacks)]
        for model, stacks in ((other, family.block_stacks), (trained, run.family.block_stacks))
    ]
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (other, trained)]
    unlike = [name for target in run.targets if shapes[0].get(name := f"{target}.weight") != shapes[1][name]]
    if type(other) is not type(trained) or blocks[0] != blocks[1] or unlike:
        raise UserError(
            f"{flag} has other blocks or layers than {run.model_name}, so the LoRA does not fit it; name a model of "
            "the same architecture."
        )


def image_size(settings: TrainSettings, family: Family, named: str | None) -> dict[str, Any]:
    """The size of images where the pipeline's own are not those of the model.

    Args:
        settings: The flags.
        family: Family and folder of the model that makes them.
        named: What a flag calls it; ``None`` for the embedded model.

    Raises:
        UserError: if the model cannot make images of the size that the flag asks for.
    """
    multiple, wanted = family.latent_token_size, settings.validation_resolution
    if wanted is not None and wanted % multiple:
        raise UserError(
            f"--validation_resolution is {wanted}, which is not a multiple of this model's latent token size "
            f"({multiple} px); use {max(multiple, round(wanted / multiple) * multiple)}."
        )
    size = None if named is None else family.known_image_size
    if size is None:
        # A name on the hub is that of a published model.
        published = named is not None and not Path(named).is_dir()
        size = family.image_size if published else settings.resolution
    size = max(size // multiple, 1) * multiple
    return {} if size == family.image_size else family.image_arguments(size)


def check_pipeline(family: Family, pipeline_kwargs: Mapping[str, Any]) -> None:
    """Check that the pipeline takes what the model's folder gives its call."""
    accepted = inspect.signature(family.pipeline_class.__call__).parameters
    unknown = sorted(pipeline_kwargs.keys() - accepted.keys())
    if unknown:
        raise UserError(
            f"{family.model_path}/blockskip_defaults.json: the model's pipeline takes no {', '.join(unknown)}."
        )
