"""Images from the whole model during and after training, with skipped blocks streamed where they hold no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image

from .families import Family, PromptEmbeds
from .training_data import place_embeds
from .transformer import DiTBlockSkipTransformer


@torch.no_grad()
def generate_images(
    prompts: Sequence[PromptEmbeds],
    *,
    family: Family,
    model: DiTBlockSkipTransformer,
    vae: ModelMixin,
    negative: PromptEmbeds | None = None,
    seeds: Sequence[int],
    pipeline_kwargs: Mapping[str, Any] | None = None,
) -> list[list[Image.Image]]:
    """Make images with the stock pipeline around the loaded modules.

    Args:
        prompts: Embeddings of each prompt, without a batch dimension.
        family: The model's family.
        model: The transformer; its adapters take part as they are.
        vae: The VAE.
        negative: Embeddings of the negative prompt, for pipelines that take one.
        seeds: One for each image of a prompt; an image has the same noise in every call.
        pipeline_kwargs: Further arguments of the pipeline call.

    Returns:
        For each prompt an image of each seed.
    """
    device = vae.device
    dtype = model.dtype

    def batched(embeds: PromptEmbeds) -> PromptEmbeds:
        return place_embeds(family.collate_embeds([embeds]), device, dtype)

    pipeline = family.image_pipeline(model.transformer, vae)
    kwargs = {k: v for k, v in (pipeline_kwargs or {}).items() if k not in ("negative_prompt", "max_sequence_length")}
    images = []
    was_training = model.training
    model.eval()
    with model.full_model():
        for embeds in prompts:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            inputs = family.pipeline_inputs(batched(embeds), None if negative is None else batched(negative))
            # What was asked for explicitly comes before a family's own settings.
            call = {**inputs, **kwargs, "num_images_per_prompt": len(seeds)}
            images.append(pipeline(**call, generator=generators).images)
    model.train(was_training)
    return images
