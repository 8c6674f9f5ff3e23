"""Stable Diffusion 3 and 3.5: joint blocks, the last of which drops the text; two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ..loading.component_config import load_config
from ..utils.errors import UserError
from .base import VALIDATION_FLAGS, ComfyUIFormat, Config, Family, Flag, PromptEmbeds, repeat_given_embeds, split_batch


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


class StableDiffusion3(Family):
    """Stable Diffusion 3 medium, 3.5 medium and large, and models of their architecture.

    A prompt is the joined tokens of both CLIPs, as many as these have positions, followed by
    ``--max_sequence_length`` tokens of T5, zeros where the model comes without T5. The model was trained on the
    padding, so nothing is masked.
    """

    name = "sd3"
    patch_size = None
    pipeline_name = "StableDiffusion3Pipeline"
    text_components = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    text_arguments = {"output_hidden_states": True}
    optional_components = ("text_encoder_3", "tokenizer_3")
    trained_text_components = ("text_encoder", "text_encoder_2")
    unused_components = ("image_encoder", "feature_extractor")
    text_comes_first = False
    lora_layers = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )
    modulation_layers = ("norm1.linear", "norm1_context.linear")
    text_stream_layers = (
        "attn.add_q_proj",
        "attn.to_add_out",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    text_lora_layers = ("q_proj", "k_proj", "v_proj", "out_proj")
    own_flags = (
        Flag(
            "precondition_outputs",
            {
                "type": int,
                "default": 1,
                "help": "1: compare the clean latents that the prediction implies; 0: compare velocities.",
            },
        ),
        *VALIDATION_FLAGS,
    )
    flag_defaults = {
        "max_sequence_length": 77,
        "output_dir": "sd3-dreambooth",
        "weighting_scheme": "logit_normal",
        "lora_alpha": None,
    }
    negative_prompt = ""
    tags = ("sd3", "sd3-diffusers")
    comfyui = ComfyUIFormat()

    def empty_embeds(self, transformer_config: Config, text_tokens: int, dtype: torch.dtype) -> PromptEmbeds:
        clip_tokens = load_config(self.model_path / "text_encoder")["max_position_embeddings"]
        width = transformer_config["joint_attention_dim"]
        return {
            "prompt_embeds": torch.empty((clip_tokens + text_tokens, width), dtype=dtype),
            "pooled_prompt_embeds": torch.empty(transformer_config["pooled_projection_dim"], dtype=dtype),
        }

    def check(self) -> None:
        if (self.model_path / "text_encoder_3").is_dir() and not (self.model_path / "tokenizer_3").is_dir():
            raise UserError(
                f"--pretrained_model_name_or_path {self.model_path} has T5 (text_encoder_3) without its tokenizer_3; "
                "download it, or save the pipeline with neither."
            )

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        if pipeline.text_encoder_3 is None and pipeline.transformer is None:
            # In the place of T5's tokens the pipeline makes zeros as wide as the transformer's config says.
            width = load_config(self.model_path / "transformer")["joint_attention_dim"]
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.flags["max_sequence_length"],
        )
        return split_batch(prompt_embeds=tokens, pooled_prompt_embeds=pooled)

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy_latents,
            "timestep": timesteps,
            "encoder_hidden_states": embeds["prompt_embeds"],
            "pooled_projections": embeds["pooled_prompt_embeds"],
        }

    def loss_terms(
        self,
        prediction: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        noisy_latents: torch.Tensor,
        sigmas: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.flags["precondition_outputs"]:
            return noisy_latents - sigmas * prediction, latents
        return super().loss_terms(prediction, latents, noise, noisy_latents, sigmas)

    def refresh_embeds(
        self, encoders: Mapping[str, torch.nn.Module], tokens: Mapping[str, torch.Tensor], embeds: PromptEmbeds
    ) -> PromptEmbeds:
        names = ("text_encoder", "text_encoder_2")
        outputs = [encoders[name](tokens[name], output_hidden_states=True) for name in names]
        old = embeds["prompt_embeds"]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        clip = torch.nn.functional.pad(clip, (0, old.shape[-1] - clip.shape[-1])).to(old.dtype)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return {
            **embeds,
            "prompt_embeds": torch.cat([clip, old[:, clip.shape[1] :].to(clip.device)], dim=1),
            "pooled_prompt_embeds": pooled.to(old.dtype),
        }

    def image_pipeline(self, transformer: torch.nn.Module, vae: ModelMixin) -> DiffusionPipeline:
        pipeline = super().image_pipeline(transformer, vae)
        repeat_given_embeds(pipeline)
        return pipeline
