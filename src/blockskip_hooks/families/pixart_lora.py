"""PixArt-Sigma's transformer and pipeline with the LoRA methods that diffusers has not given them."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin


class PixArtLoraTransformer(PixArtTransformer2DModel, PeftAdapterMixin):
    """The stock transformer with the LoRA methods of diffusers' other transformers, which it was left without."""


class PixArtSigmaLoraPipeline(PixArtSigmaPipeline, SanaLoraLoaderMixin):
    """The stock pipeline with ``load_lora_weights`` and ``save_lora_weights``, which diffusers has not given it.

    The methods are those of the SANA pipelines, whose only adapted component is the transformer too. To use a LoRA,
    load the model with this class instead of ``PixArtSigmaPipeline``.
    """

    def __init__(
        self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: PixArtTransformer2DModel, scheduler: Any
    ) -> None:
        if type(transformer) is PixArtTransformer2DModel:
            # The same modules and weights; only the methods are added.
            transformer.__class__ = PixArtLoraTransformer
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
