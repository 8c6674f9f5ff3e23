"""FLUX.1: double-stream blocks, then single-stream blocks; CLIP pooled and T5 token embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..loading.component_config import load_config
from .base import CONDITION_FLAGS, VALIDATION_FLAGS, ComfyUIFormat, Config, Family, Flag, PromptEmbeds, split_batch


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Flux(Family):
    """FLUX.1-dev, FLUX.1-schnell and models of their architecture."""

    name = "flux"
    pipeline_name = "FluxPipeline"
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    trained_text_components = ("text_encoder",)
    lora_layers: ClassVar[tuple[str, ...]] = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    modulation_layers = ("norm1.linear", "norm1_context.linear", "norm.linear")
    places_patches = True
    text_stream_layers = (
        "attn.add_q_proj",
        "attn.to_add_out",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    text_lora_layers = ("q_proj", "k_proj", "v_proj", "out_proj")
    own_flags: ClassVar[tuple[Flag, ...]] = (
        Flag(
            "guidance_scale",
            {"type": float, "default": 3.5, "help": "Guidance value fed to guidance-distilled models."},
        ),
        *VALIDATION_FLAGS,
    )
    flag_defaults = {"max_sequence_length": 512, "output_dir": "flux-dreambooth-lora"}
    tags: ClassVar[tuple[str, ...]] = ("flux", "flux-diffusers")
    comfyui = ComfyUIFormat(writes_alpha=True)

    def few_step_arguments(self) -> dict[str, Any]:
        if load_config(self.model_path / "transformer").get("guidance_embeds"):
            return {}
        # FLUX.1-schnell, as its card says.
        return {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}

    def empty_embeds(self, transformer_config: Config, text_tokens: int, dtype: torch.dtype) -> PromptEmbeds:
        return {
            "prompt_embeds": torch.empty((text_tokens, transformer_config["joint_attention_dim"]), dtype=dtype),
            "pooled_prompt_embeds": torch.empty(transformer_config["pooled_projection_dim"], dtype=dtype),
        }

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        tokens, pooled, _ = pipeline.encode_prompt(
            list(prompts), prompt_2=None, max_sequence_length=self.flags["max_sequence_length"]
        )
        return split_batch(prompt_embeds=tokens, pooled_prompt_embeds=pooled)

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        batch, channels, height, width = noisy_latents.shape
        device, dtype = noisy_latents.device, noisy_latents.dtype
        guidance = None
        if transformer_config["guidance_embeds"]:
            guidance = torch.full((batch,), self.flags["guidance_scale"], device=device)
        return {
            "hidden_states": self.pipeline_class._pack_latents(noisy_latents, batch, channels, height, width),
            "timestep": timesteps / self.scheduler.config["num_train_timesteps"],
            "guidance": guidance,
            "pooled_projections": embeds["pooled_prompt_embeds"],
            "encoder_hidden_states": embeds["prompt_embeds"],
            "txt_ids": torch.zeros(embeds["prompt_embeds"].shape[1], 3, device=device, dtype=dtype),
            "img_ids": self.pipeline_class._prepare_latent_image_ids(batch, height // 2, width // 2, device, dtype),
        }

    def with_positions(self, inputs: dict[str, Any], positions: torch.Tensor) -> dict[str, Any]:
        # In half precision neighbours of large images would share a position.
        ids = inputs["img_ids"].float().repeat(len(positions), 1, 1)
        ids[..., 1:] = positions
        return {**inputs, "img_ids": ids[0], **({"img_ids_by_sample": ids} if len(ids) > 1 else {})}

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        factor = self.vae_scale_factor
        return self.pipeline_class._unpack_latents(
            prediction, like.shape[-2] * factor, like.shape[-1] * factor, factor
        )

    def refresh_embeds(
        self, encoders: Mapping[str, torch.nn.Module], tokens: Mapping[str, torch.Tensor], embeds: PromptEmbeds
    ) -> PromptEmbeds:
        pooled = encoders["text_encoder"](tokens["text_encoder"], output_hidden_states=False).pooler_output
        return {**embeds, "pooled_prompt_embeds": pooled.to(embeds["prompt_embeds"].dtype)}


class FluxKontext(Flux):
    """FLUX.1-Kontext: the transformer of FLUX.1-dev, with the tokens of a condition image behind the image's."""

    name = "flux-kontext"
    pipeline_name = "FluxKontextPipeline"
    unused_components = ("image_encoder", "feature_extractor")
    places_patches = False
    lora_layers = (*Flux.lora_layers, "proj_mlp")
    own_flags = (
        *Flux.own_flags,
        *CONDITION_FLAGS,
        Flag(
            "vae_encode_mode",
            {
                "choices": ("sample", "mode"),
                "default": "mode",
                "help": "Whether latents are drawn from the VAE's posterior or are its mode.",
            },
        ),
    )
    flag_defaults = {**Flux.flag_defaults, "output_dir": "flux-kontext-lora"}
    tags = ("flux-kontext", *Flux.tags)

    def __init__(self, model_path: Path, variant: str | None = None, flags: Mapping[str, Any] | None = None) -> None:
        super().__init__(model_path, variant, flags)
        self.trains_on_mode = self.flags["vae_encode_mode"] == "mode"

    def image_arguments(self, side: int) -> dict[str, Any]:
        # The pipeline scales what it draws, and what it is given, to a megapixel.
        return {**super().image_arguments(side), "max_area": side**2, "_auto_resize": False}

    def with_condition(self, inputs: dict[str, Any], condition: torch.Tensor) -> dict[str, Any]:
        batch, channels, height, width = condition.shape
        tokens = self.pipeline_class._pack_latents(condition, batch, channels, height, width)
        ids = self.pipeline_class._prepare_latent_image_ids(
            batch, height // 2, width // 2, condition.device, condition.dtype
        )
        ids[..., 0] = 1
        return {
            **inputs,
            "hidden_states": torch.cat([inputs["hidden_states"], tokens], dim=1),
            "img_ids": torch.cat([inputs["img_ids"], ids]),
        }

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return super().prediction_to_latents(prediction[:, : like[0, 0].numel() // 4], like)
