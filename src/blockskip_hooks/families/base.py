"""What the core needs to know about a model family; each family is one file that fills this in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler


PromptEmbeds = dict[str, torch.Tensor]
"""One prompt's embeddings by name, without a batch dimension."""


class Family(ABC):
    """Prompt encoding, latent layout, transformer call and pipeline of one model family.

    Shapes use B batch, C latent channels, H and W latent height and width, S tokens.

    Args:
        model_path: Local folder of a pipeline.
        variant: Weight variant in the file names, such as ``"fp16"``.

    Attributes:
        name: Name in reports.
        pipeline_class: The stock pipeline whose LoRA loader reads what we export.
        lora_layers: Modules of a block that get LoRA when ``--lora_layers`` is not given, relative to the block.
        text_stream_layers: Of these, the layers whose only effect is on the block's text output.
        text_lora_layers: Linear layers that ``--train_text_encoder`` adapts, by name suffix.
        text_components: Pipeline components that encode prompts.
        block_stacks: See :func:`~blockskip_hooks.blocks.list_blocks`; ``None`` detects them.
        flag_defaults: Defaults of flags that differ between families.
        tags: Tags of the model card.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_layers: ClassVar[tuple[str, ...]]
    text_stream_layers: ClassVar[tuple[str, ...]] = ()
    text_lora_layers: ClassVar[tuple[str, ...]] = ()
    text_components: ClassVar[tuple[str, ...]] = ()
    block_stacks: ClassVar[tuple[str, ...] | None] = None
    flag_defaults: ClassVar[dict[str, Any]] = {}
    tags: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model_path: Path, variant: str | None = None) -> None:
        self.model_path = model_path
        self.variant = variant
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model_path, subfolder="scheduler")
        self.vae_config = AutoencoderKL.load_config(str(model_path / "vae"))

    # What is known before any weight is read

    @property
    @abstractmethod
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""

    @property
    @abstractmethod
    def latent_token_size(self) -> int:
        """Pixels per transformer token along one side: VAE factor x patchify."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side in pixels of the images that the pipeline makes unless told otherwise."""

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.vae_config["latent_channels"]

    # Encoding

    def load_text_pipeline(self, dtype: torch.dtype, device: torch.device | str) -> DiffusionPipeline:
        """The stock pipeline with text encoders and tokenizers only."""
        pipeline = self.pipeline_class.from_pretrained(
            self.model_path, transformer=None, vae=None, torch_dtype=dtype, variant=self.variant
        )
        return pipeline.to(device)

    @abstractmethod
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], max_sequence_length: int
    ) -> list[PromptEmbeds]:
        """Encode prompts with a text pipeline; every prompt gives tensors of the same shapes."""

    def load_vae(self, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
        """The VAE, frozen."""
        vae = AutoencoderKL.from_pretrained(self.model_path, subfolder="vae", torch_dtype=dtype, variant=self.variant)
        return vae.requires_grad_(False).eval().to(device)

    def posterior(self, vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents, each ``(B, C, H, W)``, of pixels ``(B, 3, h, w)`` in [-1, 1]."""
        distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return distribution.mean, distribution.std

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents in the range the transformer was trained on."""
        shift = self.vae_config.get("shift_factor") or 0.0
        return (latents - shift) * self.vae_config["scaling_factor"]

    # The transformer

    @abstractmethod
    def transformer_inputs(
        self,
        transformer_config: Mapping[str, Any],
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        embeds: PromptEmbeds,
        guidance_scale: float,
    ) -> dict[str, Any]:
        """Keyword arguments of the transformer's forward.

        Args:
            transformer_config: Config of the transformer.
            noisy_latents: ``(B, C, H, W)``.
            timesteps: The scheduler's timesteps, ``(B,)``, in (0, T].
            embeds: Prompt embeddings with a batch dimension.
            guidance_scale: For guidance-distilled models.
        """

    @abstractmethod
    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The transformer's output in the layout of the latents ``like``, ``(B, C, H, W)``."""

    # Text encoders in training

    def trainable_text_encoder(self, pipeline: DiffusionPipeline) -> torch.nn.Module:
        """The text encoder that ``--train_text_encoder`` adapts.

        Raises:
            ValueError: if the family has none.
        """
        raise self._no_trained_text()

    def prompt_tokens(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids for the trained text encoder, ``(B, S)``."""
        raise self._no_trained_text()

    def refresh_embeds(
        self, text_encoder: torch.nn.Module, tokens: torch.Tensor, embeds: PromptEmbeds
    ) -> PromptEmbeds:
        """``embeds`` with the trained text encoder's part computed anew, with gradients."""
        raise self._no_trained_text()

    def _no_trained_text(self) -> ValueError:
        return ValueError(f"--train_text_encoder is not available for {self.name}; leave it out.")

    # Images and export

    def image_pipeline(self, transformer: torch.nn.Module, vae: AutoencoderKL) -> DiffusionPipeline:
        """The stock pipeline without text encoders, around loaded modules."""
        pipeline = self.pipeline_class.from_pretrained(
            self.model_path,
            transformer=transformer,
            vae=vae,
            **dict.fromkeys(self.text_components),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @abstractmethod
    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, torch.Tensor]:
        """Keyword arguments that give the image pipeline its prompt (with a batch dimension)."""
