"""SANA and SANA-Sprint: linear-attention blocks that read the text by cross-attention; Gemma 2 token embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..layouts import BlockLayout
from .base import VALIDATION_FLAGS, Config, Family, Flag, PromptEmbeds


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


class Sana(Family):
    """SANA 1.0 and 1.5. Prompts always have ``max_sequence_length`` tokens, with a mask."""

    name = "sana"
    patch_size = None
    pipeline_name = "SanaPipeline"
    block_layouts = {"SanaTransformerBlock": BlockLayout()}
    text_components = ("text_encoder", "tokenizer")
    text_width = "caption_channels"
    text_masks = {"prompt_attention_mask": torch.long}
    cross_attention = "attn2"
    image_size = 1024
    lora_layers = ("to_k", "to_q", "to_v")
    own_flags = (
        Flag(
            "complex_human_instruction",
            {
                "type": str,
                "default": None,
                "help": "Instruction put before every prompt but the empty one, in images too; default: none.",
            },
        ),
        *VALIDATION_FLAGS,
    )
    flag_defaults = {"max_sequence_length": 300, "output_dir": "sana-dreambooth-lora"}
    negative_prompt: ClassVar[str | None] = ""
    tags = ("sana", "sana-diffusers")
    _encode_options: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        results = []
        for prompt in prompts:
            # The pipeline gives its negative prompt no instruction either.
            settings = {**self._prompt_settings(), **({} if prompt else {"complex_human_instruction": None})}
            embeds, mask = pipeline.encode_prompt([prompt], **self._encode_options, **settings)[:2]
            results.append({"prompt_embeds": embeds[0].cpu(), "prompt_attention_mask": mask[0].cpu()})
        return results

    def _prompt_settings(self) -> dict[str, Any]:
        instruction = self.flags["complex_human_instruction"]
        return {
            "max_sequence_length": self.flags["max_sequence_length"],
            # The pipeline takes lines; without the flag there are none, where its own default would be a long text.
            "complex_human_instruction": [instruction] if instruction else None,
        }

    def posterior(self, vae: ModelMixin, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent
        return latents, torch.zeros_like(latents)

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        # Configs from before SANA-Sprint lack the entry.
        scale = transformer_config.get("timestep_scale", 1.0)
        return {
            "hidden_states": noisy_latents,
            "encoder_hidden_states": embeds["prompt_embeds"],
            "encoder_attention_mask": embeds["prompt_attention_mask"],
            "timestep": timesteps * scale,
        }

    def prompt_inputs(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, **self._prompt_settings()}

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        # The default of the negative prompt is a text, which the pipeline does not take along with embeddings.
        no_text = {} if negative is None else {"negative_prompt": None}
        return super().pipeline_inputs(embeds, negative) | no_text


class SanaSprint(Sana):
    """SANA-Sprint, the consistency-distilled model for one to four steps.

    Its pipeline samples on the trigonometric path ``cos(t) x + sin(t) noise``, but the transformer inside sees
    ``(1 - s) x + s noise`` with ``s = sin(t) / (sin(t) + cos(t))``, is given ``s`` as its time and returns
    ``noise - x``. It is trained in those terms, with the flow-matching loss of the other families and the guidance
    embedding at the value the pipeline uses. That objective teaches the subject; it does not distil, so few-step
    quality may suffer in long runs.
    """

    name = "sana-sprint"
    pipeline_name = "SanaSprintPipeline"
    negative_prompt: ClassVar[str | None] = None
    _encode_options: ClassVar[Mapping[str, Any]] = {}
    _guidance_scale: ClassVar[float] = 4.5

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        guidance = self._guidance_scale * transformer_config["guidance_embeds_scale"]
        return {
            **super().transformer_inputs(transformer_config, noisy_latents, timesteps, embeds),
            "timestep": timesteps / self.scheduler.config["num_train_timesteps"],
            "guidance": torch.full_like(timesteps, guidance, dtype=embeds["prompt_embeds"].dtype),
        }
