"""Qwen-Image: joint blocks with a text and an image stream; a vision-language model as text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..utils.files import expand_home
from .base import ComfyUIFormat, Config, Family, Flag, PromptEmbeds


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


UPSTREAM_LEFTOVER = {
    "type": expand_home,
    "default": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "help": "No effect; kept because the upstream script takes it.",
}


class VideoLatents(Family):
    """A family whose VAE is one of videos: an image has one frame, and each channel its own mean and deviation."""

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])

    def vae_latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.vae_scale_factor
        return (self.vae_config["z_dim"], 1, height // factor, width // factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        channels, _, rows, columns = self.vae_latent_shape(height, width)
        return (channels, rows, columns)

    def posterior(self, vae: ModelMixin, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().posterior(vae, pixels.unsqueeze(2))

    def scale_latents(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        mean, std = (
            latents.new_tensor(self.vae_config[f"latents_{name}"]).reshape(1, -1, 1, 1) for name in ("mean", "std")
        )
        return (latents.squeeze(2) - mean) / std


class QwenImage(VideoLatents):
    """Qwen-Image and models of its architecture."""

    name = "qwen-image"
    pipeline_name = "QwenImagePipeline"
    text_components = ("text_encoder", "tokenizer")
    text_arguments = {"output_hidden_states": True}
    text_masks = {"prompt_embeds_mask": torch.bool}
    template_tokens = 34
    lora_layers = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")
    modulation_layers = ("img_mod.1", "txt_mod.1")
    text_stream_layers = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    own_flags = (
        Flag("pretrained_text_encoder_4_name_or_path", UPSTREAM_LEFTOVER),
        Flag("pretrained_tokenizer_4_name_or_path", UPSTREAM_LEFTOVER),
    )
    flag_defaults = {"max_sequence_length": 512, "output_dir": "hidream-dreambooth-lora"}
    # The pipeline guides only if it is given a negative prompt; its authors advise a space for none.
    negative_prompt = " "
    tags = ("qwen-image", "qwen-image-diffusers")
    comfyui = ComfyUIFormat("diffusion_model.", writes_alpha=True)

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        encoded = []
        # One at a time, so that no prompt is padded to the length of another.
        for prompt in prompts:
            embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=self.flags["max_sequence_length"])
            tokens = embeds[0].cpu()
            encoded.append({"prompt_embeds": tokens, "prompt_embeds_mask": torch.ones(len(tokens), dtype=torch.bool)})
        return encoded

    def kept_tokens(self, pipeline: DiffusionPipeline) -> int | None:
        # The template before the prompt is cut off, and then what is too long.
        return pipeline.prompt_template_encode_start_idx + self.flags["max_sequence_length"]

    def collate_embeds(self, embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
        tokens = [prompt["prompt_embeds"] for prompt in embeds]
        collated = {"prompt_embeds": pad_sequence(tokens, batch_first=True)}
        if len({len(prompt) for prompt in tokens}) > 1:
            # Only if there is padding, as in the pipeline: attention without a mask is faster.
            masks = [prompt["prompt_embeds_mask"] for prompt in embeds]
            collated["prompt_embeds_mask"] = pad_sequence(masks, batch_first=True)
        return collated

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        batch, channels, height, width = noisy_latents.shape
        return {
            "hidden_states": self.pipeline_class._pack_latents(noisy_latents, batch, channels, height, width),
            "timestep": timesteps / self.scheduler.config["num_train_timesteps"],
            "encoder_hidden_states": embeds["prompt_embeds"],
            "encoder_hidden_states_mask": embeds.get("prompt_embeds_mask"),
            "img_shapes": [[(1, height // 2, width // 2)]] * batch,
        }

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        factor = self.vae_scale_factor
        height, width = (side * factor for side in like.shape[-2:])
        return self.pipeline_class._unpack_latents(prediction, height, width, factor).squeeze(2)

    def prompt_inputs(self, prompt: str) -> dict[str, Any]:
        return {**super().prompt_inputs(prompt), "negative_prompt": self.negative_prompt}

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        inputs = {}
        for prefix, prompt in (("", embeds), ("negative_", negative)):
            if prompt is not None:
                tokens = prompt["prompt_embeds"]
                inputs[f"{prefix}prompt_embeds"] = tokens
                inputs[f"{prefix}prompt_embeds_mask"] = torch.ones_like(tokens[..., 0], dtype=torch.bool)
        return inputs
