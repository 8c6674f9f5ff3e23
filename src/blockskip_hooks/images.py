"""Images from the whole model during and after training, with skipped blocks streamed where they hold no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    images_at_once: int | None = None,
    vae_alone: bool = False,
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
        images_at_once: Images per call of the pipeline; by default all of a prompt.
        vae_alone: Keep the transformer's weights in host memory while the VAE decodes.

    Returns:
        For each prompt an image of each seed.
    """
    device = vae.device
    dtype = model.dtype

    def batched(embeds: PromptEmbeds) -> PromptEmbeds:
        return place_embeds(family.collate_embeds([embeds]), device, dtype)

    pipeline = family.image_pipeline(model.transformer, vae)
    kwargs = {k: v for k, v in (pipeline_kwargs or {}).items() if k not in ("negative_prompt", "max_sequence_length")}
    images: list[list[Image.Image]] = []
    at_once = images_at_once or len(seeds)
    was_training = model.training
    model.eval()
    with model.full_model(), _decoding(vae, model if vae_alone else None):
        for embeds in prompts:
            images.append([])
            for start in range(0, len(seeds), at_once):
                part = seeds[start : start + at_once]
                inputs = family.pipeline_inputs(batched(embeds), None if negative is None else batched(negative))
                # What was asked for explicitly comes before a family's own settings.
                call = {**inputs, **kwargs, "num_images_per_prompt": len(part)}
                generators = [torch.Generator().manual_seed(seed) for seed in part]
                images[-1] += pipeline(**call, generator=generators).images
    model.train(was_training)
    return images


@contextmanager
def _decoding(vae: ModelMixin, model: DiTBlockSkipTransformer | None) -> Iterator[None]:
    """Within this context the VAE decodes one image at a time and, if a model is given, without it on the device."""
    autoencoder: Any = vae
    decode = autoencoder.decode

    def alone(*args: Any, **kwargs: Any) -> Any:
        assert model is not None
        with model.on_host():
            return decode(*args, **kwargs)

    sliced = getattr(autoencoder, "use_slicing", None)
    if sliced is False:
        autoencoder.enable_slicing()
    if model is not None:
        autoencoder.decode = alone
    try:
        yield
    finally:
        if sliced is False:
            autoencoder.disable_slicing()
        if model is not None:
            # The attribute hid the class's method.
            del autoencoder.decode
