"""FLUX.3: blocks that see the text or the image alone, then blocks over both; layers of Qwen3-VL as embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import torch

from ..layouts import BlockLayout
from ..loading.component_config import diffusers_class, load_config
from ..utils.errors import UserError
from .base import Config, Flag, PromptEmbeds
from .flux2 import Flux2


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .flux3_pipeline import Flux3ImagePipeline

TEXT_WINDOW = 80
"""A prompt is padded to a multiple of so many tokens, which the transformer sees like any other."""
IMAGE_STEP = 0.5
"""Positions between neighbours among the image's tokens."""


class Flux3(Flux2):
    """FLUX.3 without guidance or step distillation; latents are FLUX.2's.

    Text and image run through blocks of their own before they meet. The text's blocks read no timestep, so what they
    make of a prompt is the same in all of its samples. Blocks for images of reference have no part in training.
    """

    name = "flux3"
    pipeline_name = "Flux3ModularPipeline"
    block_stacks = ("txt_mode_blocks", "mode_blocks.image", "single_transformer_blocks")
    block_layouts: ClassVar[Mapping[str, BlockLayout]] = {
        "txt_mode_blocks": BlockLayout(only="text"),
        "mode_blocks.image": BlockLayout(only="image"),
        "Flux3SingleTransformerBlock": BlockLayout(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
    }
    idle_modules = (
        "mode_blocks.image_cond",
        "x_embedders.image_cond",
        "early_stream_modulations.image_cond",
        "single_stream_modulations.image_cond",
    )
    optional_components = ("scheduler",)
    unused_components = ("prompt_upsampler", "prompt_upsampler_processor")
    lora_layers = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")
    text_stream_layers = ()
    own_flags: ClassVar[tuple[Flag, ...]] = ()
    flag_defaults = {"max_sequence_length": 6 * TEXT_WINDOW, "output_dir": "flux3-dreambooth-lora"}
    negative_prompt = ""
    tags = ("flux3", "flux3-diffusers")
    comfyui = None

    @classmethod
    def find_pipeline_class(cls) -> type[Flux3ImagePipeline]:
        diffusers_class(cls.pipeline_name)
        from .flux3_pipeline import Flux3ImagePipeline

        return Flux3ImagePipeline

    def check(self) -> None:
        if load_config(self.model_path / "transformer").get("flow_map"):
            raise UserError(
                f"--pretrained_model_name_or_path {self.model_path} is distilled to few steps, which training would "
                "undo; name the model that it was made from."
            )

    def load_scheduler(self) -> Any:
        # The pipeline's blocks make it where the model comes without one.
        if (self.model_path / "scheduler").is_dir():
            return super().load_scheduler()
        from diffusers.modular_pipelines.flux3.before_denoise import Flux3SetTimestepsStep

        return diffusers.FlowMatchEulerDiscreteScheduler(shift=Flux3SetTimestepsStep().shift)

    def missing_components(self) -> dict[str, tuple[str, str] | None]:
        return {}  # As above.

    def empty_embeds(self, transformer_config: Config, text_tokens: int, dtype: torch.dtype) -> PromptEmbeds:
        window = -(-text_tokens // TEXT_WINDOW) * TEXT_WINDOW
        tokens = min(window, self.flags["max_sequence_length"])
        return super().empty_embeds(transformer_config, tokens, dtype)

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        tokens: Any = self.flags["max_sequence_length"]
        return [{"prompt_embeds": pipeline.encode_prompt(prompt, tokens)[0].cpu()} for prompt in prompts]  # type: ignore[attr-defined]

    def collate_embeds(self, embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
        lengths = sorted({len(prompt["prompt_embeds"]) for prompt in embeds})
        if len(lengths) > 1:
            raise UserError(
                f"FLUX.3 reads prompts of {lengths[0]} to {lengths[-1]} tokens with their padding, so they cannot "
                f"share a batch; give --train_batch_size 1, or --max_sequence_length {lengths[0]} to cut all of them."
            )
        return super().collate_embeds(embeds)

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        device, (height, width) = noisy_latents.device, noisy_latents.shape[2:]
        rows, columns = (torch.arange(size, device=device) * IMAGE_STEP for size in (height, width))
        origin = torch.zeros(1, device=device)
        text = torch.arange(embeds["prompt_embeds"].shape[1], device=device, dtype=torch.float32)
        return {
            "hidden_states": noisy_latents.flatten(2).transpose(1, 2),
            "encoder_hidden_states": embeds["prompt_embeds"],
            "timestep": timesteps / self.scheduler.config["num_train_timesteps"],
            "img_ids": torch.cartesian_prod(origin, rows, columns, origin),
            "txt_ids": torch.cartesian_prod(origin, origin, origin, text),
        }

    def text_positions(self, transformer_config: Config, inputs: Mapping[str, Any], length: int) -> torch.Tensor:
        text_tokens = inputs["encoder_hidden_states"].shape[1]
        # Blocks that see one kind of tokens alone have no text to hide from the image.
        is_joint = length == text_tokens + inputs["hidden_states"].shape[1]
        return (torch.arange(length) < (text_tokens if is_joint else 0))[None]

    def prompt_inputs(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "max_sequence_length": self.flags["max_sequence_length"]}
