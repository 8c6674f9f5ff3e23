"""A whole model that makes images, for searches and evaluations: named by flags, checked, loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..blocks import block_bytes, list_blocks
from ..config import BlockSkipConfig
from ..embedded import embedded_model
from ..families import Family, PromptEmbeds, detect_family, unread_components
from ..families.prompts import encode_prompts
from ..loading.checks import check_lora_file, check_model
from ..loading.component_config import load_config
from ..loading.download import resolve_model
from ..loading.model_defaults import model_defaults
from ..loading.models import empty_model
from ..transformer import DiTBlockSkipTransformer
from ..utils.accelerator import start_accelerator, weight_dtype
from ..utils.device_memory import free_memory_bytes
from ..utils.digests import component_digests
from ..utils.errors import UserError
from ..utils.machine import cache_bytes
from .lora_files import load_text_adapters


GUIDANCE_FLAGS = ("guidance_scale", "true_cfg_scale")
PIXELS_AT_ONCE, LARGEST_BATCH = 16 * 256**2, 32
"""Images in one forward hold about as many pixels as 16 of 256 px: one image of 1024 px."""


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """What the flags of a script say about the model and its images; ``None`` where they say nothing.

    The first ones mean what they mean in training. ``guidance_scale`` and ``true_cfg_scale`` go to pipelines that take
    them.
    """

    pretrained_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    cache_dir: str | None
    hub_token: str | None
    max_sequence_length: int | None
    mixed_precision: str | None
    resolution: int | None
    num_inference_steps: int | None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What makes the images.

    Attributes:
        family: The model's family, on the model's folder.
        model_name: What the user calls the model.
        embedded: Whether it is the embedded one.
        pipeline_kwargs: Size, steps and guidance of the images.
        dtype: Dtype of the models.
        device: Where they run.
    """

    family: Family
    model_name: str
    embedded: bool
    pipeline_kwargs: dict[str, Any]
    dtype: torch.dtype
    device: torch.device


def image_settings(flags: ImageFlags, *, largest_side: int | None = None) -> ImageSettings:
    """Resolve and check what the flags say about the model and its images; no weights are read.

    Args:
        flags: The flags.
        largest_side: Images are not larger than this unless ``--resolution`` or the model asks for it.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    name = flags.pretrained_model_name_or_path
    model_path = (
        embedded_model()
        if name is None
        else resolve_model(
            name,
            revision=flags.revision,
            variant=flags.variant,
            cache_dir=flags.cache_dir,
            token=flags.hub_token,
            unread=unread_components,
        )
    )
    family_class: type[Family] = detect_family(model_path)
    check_model(model_path, family_class, flags.variant)
    defaults, pipeline_kwargs = model_defaults(model_path)
    length = flags.max_sequence_length or defaults.get("max_sequence_length")
    family = family_class(model_path, flags.variant, {"max_sequence_length": length} if length else {})
    family.check()
    native = min(largest_side or family.image_size, family.image_size)
    side = flags.resolution or defaults.get("resolution") or native
    if side % family.latent_token_size:
        raise UserError(f"--resolution is {side}; give a multiple of {family.latent_token_size}.")
    # Where a pipeline draws at sizes that it was trained on and scales the image, it may.
    sized = {name: v for name, v in family.image_arguments(side).items() if name != "use_resolution_binning"}
    pipeline_kwargs |= sized
    if flags.num_inference_steps is not None:
        pipeline_kwargs["num_inference_steps"] = flags.num_inference_steps
    taken = inspect.signature(family.pipeline_class.__call__).parameters
    for guidance in GUIDANCE_FLAGS:
        value = getattr(flags, guidance)
        if value is not None and guidance not in taken:
            raise UserError(f"--{guidance} is nothing that {family.pipeline_class.__name__} takes; leave it out.")
        if value is not None:
            pipeline_kwargs[guidance] = value
    if "true_cfg_scale" in pipeline_kwargs and family.negative_prompt is None:
        # Without a negative prompt there is nothing to guide away from.
        pipeline_kwargs.setdefault("negative_prompt", "")
    accelerator = start_accelerator(flags.mixed_precision)
    return ImageSettings(
        family=family,
        model_name="embedded micro-FLUX" if name is None else name,
        embedded=model_path.resolve() == embedded_model().resolve(),
        pipeline_kwargs=pipeline_kwargs,
        dtype=weight_dtype(accelerator),
        device=accelerator.device,
    )


def check_loras(family: Family, loras: Iterable[Path]) -> None:
    """Check that LoRAs' files are whole and of this model; no weights are read.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    config = load_config(family.model_path / "transformer")
    transformer = empty_model(config, family.transformer_class(config))
    for lora in loras:
        check_lora_file(lora, transformer, f"--lora_weights {lora}")


def describe_images(family: Family, pipeline_kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Everything but prompt, seed and LoRA that an image depends on."""
    components = ("transformer", "vae", *family.text_components)
    return {
        "weights": component_digests(family.model_path, components),
        "flags": {flag.name: family.flags.get(flag.name) for flag in family.own_flags},
        "max_sequence_length": family.flags["max_sequence_length"],
        "pipeline_kwargs": pipeline_kwargs,
        "dtype": str(dtype),
    }


def images_at_once(pipeline_kwargs: dict[str, Any], wanted: int | None) -> int:
    """Images in one forward: as many as are wanted, or as their size suggests."""
    if wanted is not None:
        return wanted
    return min(max(PIXELS_AT_ONCE // (pipeline_kwargs["height"] * pipeline_kwargs["width"]), 1), LARGEST_BATCH)


def block_parameters(family: Family, transformer_config: dict[str, Any]) -> list[int]:
    """Number of parameters of each block."""
    transformer = empty_model(transformer_config, family.transformer_class(transformer_config))
    # An int8 takes one byte.
    return block_bytes(list_blocks(transformer, family.block_stacks), torch.int8)


def stream_all(num_blocks: int) -> BlockSkipConfig:
    """Spans of which as many blocks as can be are streamed: one has to be kept."""
    return BlockSkipConfig(leading=num_blocks - 1)


def load_image_transformer(
    family: Family,
    *,
    dtype: torch.dtype,
    device: torch.device,
    spans: BlockSkipConfig | None = None,
    takes_lora: bool = False,
) -> DiTBlockSkipTransformer:
    """The transformer for images.

    Args:
        family: The model's family.
        dtype: Dtype of its weights.
        device: Where it runs.
        spans: Leading and trailing blocks that are read from the checkpoint as they run, where no LoRA may be;
            ``None`` for all of them when they would fill more than half of what is free and no LoRA comes.
        takes_lora: Whether LoRAs are going to be loaded.
    """
    config = load_config(family.model_path / "transformer")
    if spans is None:
        parameters = block_parameters(family, config)
        large = sum(parameters) * dtype.itemsize > free_memory_bytes(device) / 2
        spans = stream_all(len(parameters)) if large and not takes_lora else BlockSkipConfig()
    return DiTBlockSkipTransformer.from_pretrained(
        family.model_path,
        spans,
        torch_dtype=dtype,
        device=device,
        variant=family.variant,
        stacks=family.block_stacks,
        transformer_class=family.transformer_class(config),
        stream_cache=cache_bytes("auto", device),
    )


def encode_for_images(
    family: Family,
    prompts: Sequence[str],
    pipeline_kwargs: dict[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    lora: Path | None = None,
) -> tuple[dict[str, PromptEmbeds], PromptEmbeds | None]:
    """Embeddings of prompts, and of the negative prompt for pipelines that take one.

    Args:
        family: The model's family.
        prompts: Prompts.
        pipeline_kwargs: Arguments of the pipeline call, which may hold a negative prompt.
        dtype: Dtype of the text encoders.
        device: Where they run.
        lora: A LoRA whose text encoders are to be used; see
            :func:`~blockskip_hooks.inference.lora_files.changes_text`.
    """
    negative = pipeline_kwargs.get("negative_prompt", family.negative_prompt)
    wanted = [*prompts, *([] if negative is None else [negative])]

    def adapt(pipeline: DiffusionPipeline) -> None:
        if lora is not None:
            load_text_adapters(family, pipeline, lora)

    embeds, _ = encode_prompts(family, wanted, dtype=dtype, device=device, adapt=adapt)
    return embeds, None if negative is None else embeds[negative]
