"""Lumina-Image 2.0: one sequence of caption and image tokens, after refiners of each; Gemma 2 token embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..layouts import BlockLayout
from .base import Config, Family, Flag, PromptEmbeds, repeat_given_embeds


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


class Lumina2(Family):
    """Lumina-Image 2.0. Its time runs from 0 (noise) to 1 (image), and it predicts ``x - noise``."""

    name = "lumina2"
    patch_size = None
    pipeline_name = "Lumina2Pipeline"
    text_components = ("text_encoder", "tokenizer")
    text_arguments = {"output_hidden_states": True}
    text_width = "cap_feat_dim"
    text_masks = {"prompt_attention_mask": torch.long}
    lora_layers = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")
    modulation_layers = ("norm1.linear",)
    block_stacks = ("layers",)
    block_layouts = {"Lumina2TransformerBlock": BlockLayout()}
    own_flags = (
        Flag(
            "system_prompt",
            {
                "type": str,
                "default": None,
                "help": "Text put before every prompt but the empty one; by default the pipeline's own.",
            },
        ),
    )
    flag_defaults = {"max_sequence_length": 256, "output_dir": "lumina2-dreambooth-lora", "lora_alpha": None}
    negative_prompt = ""
    tags = ("lumina2", "lumina2-diffusers")

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        results = []
        for prompt in prompts:
            settings = {k: v for k, v in self.prompt_inputs(prompt).items() if k != "prompt"}
            encoded = pipeline.encode_prompt([prompt], do_classifier_free_guidance=not prompt, **settings)
            # The pipeline puts no system prompt before its negative prompt, which is what the empty one stands for.
            embeds, mask = encoded[:2] if prompt else encoded[2:]
            # Padding is at the end and masked, so the model's output does not depend on it.
            tokens = int(mask.sum())
            results.append(
                {"prompt_embeds": embeds[0, :tokens].cpu(), "prompt_attention_mask": mask[0, :tokens].cpu()}
            )
        return results

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy_latents,
            "timestep": 1 - timesteps / self.scheduler.config["num_train_timesteps"],
            "encoder_hidden_states": embeds["prompt_embeds"],
            "encoder_attention_mask": embeds["prompt_attention_mask"],
        }

    def text_positions(self, transformer_config: Config, inputs: Mapping[str, Any], length: int) -> torch.Tensor:
        # Every sample begins with its own text, without padding.
        lengths = inputs["encoder_attention_mask"].sum(1)
        return torch.arange(length, device=lengths.device) < lengths[:, None]

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return -prediction

    def prompt_inputs(self, prompt: str) -> dict[str, Any]:
        return {**super().prompt_inputs(prompt), "system_prompt": self.flags["system_prompt"]}

    def image_pipeline(self, transformer: torch.nn.Module, vae: ModelMixin) -> DiffusionPipeline:
        pipeline = super().image_pipeline(transformer, vae)
        repeat_given_embeds(pipeline)
        return pipeline

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        if negative is None:
            return dict(embeds)
        # The pipeline wants both of one length.
        both = self.collate_embeds([{name: e[name][0] for name in e} for e in (embeds, negative)])
        inputs = {name: tensor[:1] for name, tensor in both.items()}
        return {**inputs, **{f"negative_{name}": tensor[1:] for name, tensor in both.items()}}
