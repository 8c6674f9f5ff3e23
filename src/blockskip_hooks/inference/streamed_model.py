"""A whole model that makes images, for searches and evaluations: named by flags, checked, loaded."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline

from ..blocks import block_bytes, list_blocks
from ..config import BlockSkipConfig
from ..embedded import embedded_model
from ..families import Family, PromptEmbeds, detect_family
from ..families.prompts import encode_prompts
from ..loading.checks import check_lora_file, check_model
from ..loading.component_config import load_config
from ..loading.download import check_weights, resolve_model
from ..loading.model_defaults import model_defaults
from ..loading.models import empty_model
from ..transformer import DiTBlockSkipTransformer
from ..utils.accelerator import start_accelerator, weight_dtype
from ..utils.digests import folder_digest
from .lora_files import load_text_adapters


GUIDANCE_FLAGS = ("guidance_scale", "true_cfg_scale")
PIXELS_AT_ONCE = 16 * 256**2
"""Images in one forward hold about as many pixels as 16 of 256 px: one image of 1024 px."""


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


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that name the model and how it is read, with the meaning that they have in training."""
    flag = parser.add_argument
    flag("--pretrained_model_name_or_path", help="Hub id or folder of a pipeline; without it, the embedded model.")
    flag("--revision", help="Branch, tag or commit of the model on the hub.")
    flag("--variant", help="Weight file variant, fp16 say.")
    flag("--cache_dir", help="Where downloaded models are kept.")
    flag("--hub_token", help="Token for the download; logging in beforehand is safer.")
    flag("--max_sequence_length", type=int, help="Tokens of a prompt; default: that of the model.")
    flag("--mixed_precision", choices=("no", "fp16", "bf16"), help="Number format; default: accelerate's setting.")


def image_settings(args: argparse.Namespace, *, largest_side: int | None = None) -> ImageSettings:
    """Resolve and check what the flags say about the model and its images; no weights are read.

    Args:
        args: Flags of :func:`add_model_flags`, ``resolution`` and ``num_inference_steps``; those of
            ``GUIDANCE_FLAGS`` count if they are there.
        largest_side: Images are not larger than this unless ``--resolution`` or the model asks for it.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    embedded = args.pretrained_model_name_or_path is None
    model_path = (
        embedded_model()
        if embedded
        else resolve_model(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            token=args.hub_token,
        )
    )
    family_class: type[Family] = detect_family(model_path)
    check_weights(model_path, family_class.text_components, args.variant)
    check_model(model_path, family_class, args.variant)
    defaults, pipeline_kwargs = model_defaults(model_path)
    length = args.max_sequence_length or defaults.get("max_sequence_length")
    family = family_class(model_path, args.variant, {"max_sequence_length": length} if length else {})
    family.check()
    native = min(largest_side or family.image_size, family.image_size)
    side = args.resolution or defaults.get("resolution") or native
    if side % family.latent_token_size:
        raise ValueError(f"--resolution is {side}; give a multiple of {family.latent_token_size}.")
    pipeline_kwargs |= {"height": side, "width": side}
    if args.num_inference_steps is not None:
        pipeline_kwargs["num_inference_steps"] = args.num_inference_steps
    taken = inspect.signature(family.pipeline_class.__call__).parameters
    for name in GUIDANCE_FLAGS:
        value = getattr(args, name, None)
        if value is not None and name not in taken:
            raise ValueError(f"--{name} is nothing that {family.pipeline_class.__name__} takes; leave it out.")
        if value is not None:
            pipeline_kwargs[name] = value
    if "true_cfg_scale" in pipeline_kwargs and family.negative_prompt is None:
        # Without a negative prompt there is nothing to guide away from.
        pipeline_kwargs.setdefault("negative_prompt", "")
    accelerator = start_accelerator(args.mixed_precision)
    return ImageSettings(
        family=family,
        model_name="embedded micro-FLUX" if embedded else args.pretrained_model_name_or_path,
        embedded=model_path.resolve() == embedded_model().resolve(),
        pipeline_kwargs=pipeline_kwargs,
        dtype=weight_dtype(accelerator),
        device=accelerator.device,
    )


def check_loras(family: Family, loras: Iterable[Path]) -> None:
    """Check that LoRAs' files are whole and of this model; no weights are read.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    config = load_config(family.model_path / "transformer")
    transformer = empty_model(config, family.transformer_class(config))
    for lora in loras:
        check_lora_file(lora, transformer, f"--lora_weights {lora}")


def describe_images(family: Family, pipeline_kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Everything but prompt, seed and LoRA that an image depends on."""
    components = ("transformer", "vae", *family.text_components)
    return {
        "weights": {
            name: folder_digest(family.model_path / name) for name in components if (family.model_path / name).is_dir()
        },
        "flags": {flag.name: family.flags.get(flag.name) for flag in family.own_flags},
        "max_sequence_length": family.flags["max_sequence_length"],
        "pipeline_kwargs": pipeline_kwargs,
        "dtype": str(dtype),
    }


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
        large = sum(parameters) * dtype.itemsize > _free_memory(device) / 2
        spans = stream_all(len(parameters)) if large and not takes_lora else BlockSkipConfig()
    return DiTBlockSkipTransformer.from_pretrained(
        family.model_path,
        spans,
        torch_dtype=dtype,
        device=device,
        variant=family.variant,
        stacks=family.block_stacks,
        transformer_class=family.transformer_class(config),
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


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
