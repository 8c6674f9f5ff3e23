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
    num_images: int = 1,
    seed: int | None = None,
    pipeline_kwargs: Mapping[str, Any] | None = None,
) -> list[list[Image.Image]]:
    """Make images with the stock pipeline around the loaded modules.

    Args:
        prompts: Embeddings of each prompt, without a batch dimension.
        family: The model's family.
        model: The transformer; its adapters take part as they are.
        vae: The VAE.
        negative: Embeddings of the negative prompt, for pipelines that take one.
        num_images: Images of each prompt.
        seed: Seed; each image has its own noise, the same in every call.
        pipeline_kwargs: Further arguments of the pipeline call.

    Returns:
        ``num_images`` images for each prompt.
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
            generators = [
                None if seed is None else torch.Generator().manual_seed(seed + number) for number in range(num_images)
            ]
            inputs = family.pipeline_inputs(batched(embeds), None if negative is None else batched(negative))
            # What was asked for explicitly comes before a family's own settings.
            call = {**inputs, **kwargs, "num_images_per_prompt": num_images}
            result = pipeline(**call, generator=None if seed is None else generators)
            images.append(result.images)
    model.train(was_training)
    return images
