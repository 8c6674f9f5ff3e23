"""FLUX.2: double-stream blocks, then single-stream blocks, all sharing their modulation; one language model as text
encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..layouts import BlockLayout
from ..loading.component_config import load_config, read_index
from ..utils.errors import UserError
from .base import CONDITION_FLAGS, VALIDATION_FLAGS, ComfyUIFormat, Config, Family, Flag, PromptEmbeds, split_batch


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


SHARED_FLAGS = (
    *CONDITION_FLAGS,
    Flag(
        "guidance_scale",
        {"type": float, "default": 3.5, "help": "Guidance value fed to guidance-distilled models."},
    ),
    Flag(
        "text_encoder_out_layers",
        {
            "type": int,
            "nargs": "+",
            "default": [10, 20, 30],
            "help": "Hidden layers of the text encoder whose outputs make up the prompt embeddings.",
        },
    ),
)


class Flux2(Family):
    """FLUX.2-dev and models of its architecture: Mistral text encoder, guidance-distilled."""

    name = "flux2"
    pipeline_name = "Flux2Pipeline"
    # diffusers describes these blocks from 0.42 on.
    block_layouts: ClassVar[Mapping[str, BlockLayout]] = {
        "Flux2TransformerBlock": BlockLayout(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
        "Flux2SingleTransformerBlock": BlockLayout(),
    }
    text_components = ("text_encoder", "tokenizer")
    text_arguments = {"output_hidden_states": True, "use_cache": False}
    # As the pipeline encodes reference images.
    trains_on_mode = True
    lora_layers: ClassVar[tuple[str, ...]] = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    )
    text_stream_layers: ClassVar[tuple[str, ...]] = (
        "attn.add_q_proj",
        "attn.to_add_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
    )
    own_flags: ClassVar[tuple[Flag, ...]] = (
        *SHARED_FLAGS,
        Flag(
            "remote_text_encoder",
            {"action": "store_true", "help": "Refused: prompts are encoded by the model's own text encoder."},
            refusal="it sends prompts to a remote service; leave it out, and the local text encoder is used",
        ),
    )
    flag_defaults = {"max_sequence_length": 512, "output_dir": "flux-dreambooth-lora"}
    tags = ("flux2", "flux2-diffusers")
    comfyui: ClassVar[ComfyUIFormat | None] = ComfyUIFormat()

    def check(self) -> None:
        index = read_index(self.model_path)
        if index["tokenizer"][1] == "PixtralProcessor" and importlib.util.find_spec("torchvision") is None:
            raise UserError("FLUX.2's text processor needs a package that is missing; run: pip install torchvision")
        encoder = load_config(self.model_path / "text_encoder")
        encoder = encoder.get("text_config", encoder)
        depth, layers = encoder["num_hidden_layers"], self.flags["text_encoder_out_layers"]
        wanted = load_config(self.model_path / "transformer")["joint_attention_dim"] // encoder["hidden_size"]
        if len(layers) != wanted or not all(0 <= layer <= depth for layer in layers):
            raise UserError(
                f"--text_encoder_out_layers {' '.join(map(str, layers))} does not fit this model; give {wanted} "
                f"numbers from 0 to {depth}."
            )

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        channels, rows, columns = self.vae_latent_shape(height, width)
        return (4 * channels, rows // 2, columns // 2)

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        embeds, _ = pipeline.encode_prompt(list(prompts), **self._encode_settings())
        return split_batch(prompt_embeds=embeds)

    def _encode_settings(self) -> dict[str, Any]:
        return {
            "max_sequence_length": self.flags["max_sequence_length"],
            "text_encoder_out_layers": tuple(self.flags["text_encoder_out_layers"]),
        }

    def scale_latents(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        patches = self.pipeline_class._patchify_latents(latents)
        mean, variance = (s.to(patches).reshape(1, -1, 1, 1) for s in (vae.bn.running_mean, vae.bn.running_var))
        return (patches - mean) / torch.sqrt(variance + vae.config["batch_norm_eps"])

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        device = noisy_latents.device
        guidance = None
        # Configs from before there were models without guidance lack the entry.
        if transformer_config.get("guidance_embeds", True):
            guidance = torch.full((len(noisy_latents),), self.flags["guidance_scale"], device=device)
        return {
            "hidden_states": self.pipeline_class._pack_latents(noisy_latents),
            "timestep": timesteps / self.scheduler.config["num_train_timesteps"],
            "guidance": guidance,
            "encoder_hidden_states": embeds["prompt_embeds"],
            "txt_ids": self.pipeline_class._prepare_text_ids(embeds["prompt_embeds"]).to(device),
            "img_ids": self.pipeline_class._prepare_latent_ids(noisy_latents).to(device),
        }

    def with_condition(self, inputs: dict[str, Any], condition: torch.Tensor) -> dict[str, Any]:
        # All samples have the place of a pipeline's first condition image.
        ids = self.pipeline_class._prepare_image_ids([condition[:1]]).to(condition.device)
        return {
            **inputs,
            "hidden_states": torch.cat([inputs["hidden_states"], self.pipeline_class._pack_latents(condition)], dim=1),
            "img_ids": torch.cat([inputs["img_ids"], ids.expand(len(condition), -1, -1)], dim=1),
        }

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return prediction[:, : like[0, 0].numel()].transpose(1, 2).reshape(like.shape)

    def prompt_inputs(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, **self._encode_settings()}


class Flux2Klein(Flux2):
    """FLUX.2-klein, base and distilled: Qwen3 text encoder, classifier-free guidance unless distilled."""

    name = "flux2-klein"
    pipeline_name = "Flux2KleinPipeline"
    own_flags = (*SHARED_FLAGS, *VALIDATION_FLAGS)
    negative_prompt = ""
    tags = ("flux2-klein", "flux2-klein-diffusers")
    comfyui = ComfyUIFormat()

    def few_step_arguments(self) -> dict[str, Any]:
        index = read_index(self.model_path)
        return {"num_inference_steps": 4, "guidance_scale": 1.0} if index.get("is_distilled") else {}
