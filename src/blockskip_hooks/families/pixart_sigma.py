"""PixArt-Sigma: blocks that read the text by cross-attention; T5 token embeddings; predicts the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from ..loading.component_config import diffusers_class
from .base import Config, Family, PromptEmbeds, split_batch


if TYPE_CHECKING:
    from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin

    from .pixart_lora import PixArtLoraTransformer, PixArtSigmaLoraPipeline


class PixArtSigma(Family):
    """PixArt-Sigma. Prompts always have ``max_sequence_length`` tokens, with a mask.

    Its noise schedule is DDPM's: ``x_t = sqrt(a_t) x + sqrt(1 - a_t) noise``, and the loss compares noise. For what
    asks for a flow's ``sigma``, such as loss weightings, the schedule gives that of the same signal-to-noise ratio.
    """

    name = "pixart-sigma"
    patch_size = None
    pipeline_name = "PixArtSigmaPipeline"
    text_components = ("text_encoder", "tokenizer")
    text_width = "caption_channels"
    text_masks = {"prompt_attention_mask": torch.long}
    cross_attention = "attn2"
    lora_layers = ("to_k", "to_q", "to_v")
    flag_defaults = {"max_sequence_length": 300, "output_dir": "pixart-sigma-dreambooth-lora"}
    negative_prompt = ""
    tags = ("pixart-sigma", "pixart-sigma-diffusers")

    @classmethod
    def find_pipeline_class(cls) -> Any:
        return _with_lora("PixArtSigmaLoraPipeline")

    def transformer_class(self, transformer_config: Config) -> type[ModelMixin]:
        return _with_lora("PixArtLoraTransformer")

    def load_scheduler(self) -> DDPMScheduler:
        scheduler: Any = diffusers.DDPMScheduler.from_pretrained(self.model_path, subfolder="scheduler")
        signal, noise = self._signal_and_noise(scheduler, scheduler.timesteps)
        scheduler.sigmas = noise / (signal + noise)
        return scheduler

    @staticmethod
    def _signal_and_noise(scheduler: DDPMScheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal = scheduler.alphas_cumprod[timesteps]
        return signal.sqrt(), (1.0 - signal).sqrt()

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        from diffusers.utils import is_bs4_available, is_ftfy_available

        embeds, mask, _, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            # As the pipeline's own call does, which warns where the packages are missing.
            clean_caption=is_bs4_available() and is_ftfy_available(),
            max_sequence_length=self.flags["max_sequence_length"],
        )
        return split_batch(prompt_embeds=embeds, prompt_attention_mask=mask)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        """Latents at the noise levels of ``indices`` into the schedule: ``sqrt(a) x + sqrt(1 - a) noise``."""
        levels = self._signal_and_noise(self.scheduler, self.scheduler.timesteps[list(indices)])
        signal, noise_level = (level.reshape(-1, 1, 1, 1).to(latents) for level in levels)
        return signal * latents + noise_level * noise

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy_latents,
            "encoder_hidden_states": embeds["prompt_embeds"],
            "encoder_attention_mask": embeds["prompt_attention_mask"],
            "timestep": timesteps,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The predicted noise, not a velocity: see :meth:`loss_terms`. Channels of the variance are dropped."""
        return prediction[:, : like.shape[1]]

    def loss_terms(
        self,
        prediction: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        noisy_latents: torch.Tensor,
        sigmas: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted and true noise."""
        return prediction, noise

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        # The default of the negative prompt is a text, which the pipeline does not take along with embeddings.
        no_text = {} if negative is None else {"negative_prompt": None}
        return super().pipeline_inputs(embeds, negative) | no_text


def _with_lora(name: str) -> Any:
    """A class of :mod:`.pixart_lora`, whose bases are classes of diffusers that have to be there."""
    for base in ("PixArtTransformer2DModel", "PixArtSigmaPipeline"):
        diffusers_class(base)
    from . import pixart_lora

    return getattr(pixart_lora, name)


def __getattr__(name: str) -> Any:
    if name in ("PixArtLoraTransformer", "PixArtSigmaLoraPipeline"):
        return _with_lora(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["PixArtLoraTransformer", "PixArtSigma", "PixArtSigmaLoraPipeline"]
