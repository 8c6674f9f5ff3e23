"""Krea 2: single-stream blocks over text and image tokens; several layers of Qwen3-VL as text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..layouts import BlockLayout
from .base import VALIDATION_FLAGS, ComfyUIFormat, Config, PromptEmbeds, split_batch
from .qwen_image import VideoLatents


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PATCH_SIZE = 2


class Krea2(VideoLatents):
    """Krea 2 and its distilled variant.

    Text comes before the image in the blocks' sequence and has no positions, so every prompt keeps the fixed length
    that the model was trained with, masked where it is padding: image tokens stand at the same place in all samples.
    """

    name = "krea2"
    pipeline_name = "Krea2Pipeline"
    block_layouts = {"Krea2TransformerBlock": BlockLayout()}
    text_components = ("text_encoder", "tokenizer")
    text_arguments = {"output_hidden_states": True}
    template_tokens = 34
    image_size = 1024
    lora_layers = (
        "img_in",
        "final_layer.linear",
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.to_gate",
        "ff.up",
        "ff.down",
        "text_fusion.projector",
        "txt_in.linear_1",
        "txt_in.linear_2",
        "time_embed.linear_1",
        "time_embed.linear_2",
        "time_mod_proj",
    )
    own_flags = VALIDATION_FLAGS
    flag_defaults = {
        "max_sequence_length": 512,
        # Of the distilled variant, which upstream's script makes them with.
        "validation_guidance_scale": 0.0,
        "validation_num_inference_steps": 8,
        "output_dir": "krea2-dreambooth-lora",
        "rank": 32,
        "lora_alpha": 32,
        "learning_rate": 3e-4,
    }
    negative_prompt = ""
    tags = ("krea2", "krea2-diffusers")
    comfyui = ComfyUIFormat()

    def empty_embeds(self, transformer_config: Config, text_tokens: int, dtype: torch.dtype) -> PromptEmbeds:
        length = max(text_tokens, self.flags["max_sequence_length"])
        shape = (length, transformer_config["num_text_layers"], transformer_config["text_hidden_dim"])
        return {
            "prompt_embeds": torch.empty(shape, dtype=dtype),
            "prompt_embeds_mask": torch.arange(length) < text_tokens,
        }

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        embeds, masks = pipeline.encode_prompt(list(prompts), max_sequence_length=self.flags["max_sequence_length"])
        return split_batch(prompt_embeds=embeds, prompt_embeds_mask=masks)

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        patches = pixel_unshuffle(noisy_latents, PATCH_SIZE)
        text_tokens = embeds["prompt_embeds"].shape[1]
        place = self.pipeline_class.prepare_position_ids
        return {
            "hidden_states": patches.flatten(2).transpose(1, 2),
            "encoder_hidden_states": embeds["prompt_embeds"],
            "timestep": timesteps / self.scheduler.config["num_train_timesteps"],
            "position_ids": place(text_tokens, *patches.shape[2:], noisy_latents.device),
            "encoder_attention_mask": embeds["prompt_embeds_mask"],
        }

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        grid = (like.shape[-2] // PATCH_SIZE, like.shape[-1] // PATCH_SIZE)
        return pixel_shuffle(prediction.transpose(1, 2).unflatten(2, grid), PATCH_SIZE)

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        return super().pipeline_inputs(embeds, negative) | {
            "guidance_scale": self.flags["validation_guidance_scale"],
            "num_inference_steps": self.flags["validation_num_inference_steps"],
        }
