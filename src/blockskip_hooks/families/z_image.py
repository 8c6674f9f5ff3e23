"""Z-Image: one stack of single-stream blocks over image and caption tokens, behind refiners that are never skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..layouts import BlockLayout
from ..loading.component_config import defining_module
from .base import ComfyUIFormat, Config, Family, PromptEmbeds
from .flux import Flux


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class ZImage(Family):
    """Z-Image, Z-Image-Turbo and models of their architecture.

    The transformer takes lists, one tensor per sample, and pads each joined sequence at its end. Prompts have their
    natural length; a batch of different lengths carries them as ``prompt_lengths`` ``(B,)``.
    """

    name = "z-image"
    pipeline_name = "ZImagePipeline"
    text_components = ("text_encoder", "tokenizer")
    text_arguments = {"output_hidden_states": True}
    text_width = "cap_feat_dim"
    trains_on_mode = True
    text_comes_first = False
    image_size = 1024
    lora_layers = ("attention.to_k", "attention.to_q", "attention.to_v", "attention.to_out.0")
    modulation_layers = ("adaLN_modulation.0",)
    block_stacks = ("layers",)
    # diffusers knows the block, but not that its first argument is called x.
    block_layouts = {"ZImageTransformerBlock": BlockLayout(hidden_states_argument_name="x")}
    # The upstream script takes --guidance_scale too; the transformer takes none, so it has no effect in training.
    own_flags = Flux.own_flags
    flag_defaults = {"max_sequence_length": 512, "output_dir": "z-image-dreambooth-lora"}
    negative_prompt = ""
    tags = ("z-image", "z-image-diffusers")
    comfyui = ComfyUIFormat("diffusion_model.", writes_alpha=True)

    def few_step_arguments(self) -> dict[str, Any]:
        # As Z-Image-Turbo's card says; Z-Image itself has a shift of 6.
        return {"num_inference_steps": 9, "guidance_scale": 0.0} if self.scheduler.shift <= 3.0 else {}

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        embeds, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.flags["max_sequence_length"],
        )
        return [{"prompt_embeds": tokens.cpu()} for tokens in embeds]

    def collate_embeds(self, embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
        batch = super().collate_embeds(embeds)
        lengths = [len(prompt["prompt_embeds"]) for prompt in embeds]
        if len(set(lengths)) > 1:
            # Only where they differ: reading a tensor's values costs a sync, and fake tensors have none.
            batch["prompt_lengths"] = torch.tensor(lengths)
        return batch

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        captions = embeds["prompt_embeds"]
        lengths = [captions.shape[1]] * len(captions)
        if "prompt_lengths" in embeds:
            lengths = embeds["prompt_lengths"].tolist()
        steps = self.scheduler.config["num_train_timesteps"]
        return {
            "x": list(noisy_latents.unsqueeze(2)),
            "t": (steps - timesteps) / steps,
            "cap_feats": [caption[:length] for caption, length in zip(captions, lengths, strict=True)],
        }

    def image_tokens(self, transformer_config: Config, inputs: Mapping[str, Any]) -> int:
        _, frames, height, width = inputs["x"][0].shape
        patch, frame_patch = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
        tokens = (frames // frame_patch) * (height // patch) * (width // patch)
        multiple = defining_module("ZImageTransformer2DModel").SEQ_MULTI_OF
        return -(-tokens // multiple) * multiple

    def prediction_to_latents(self, prediction: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        return -torch.stack(list(prediction)).squeeze(2)

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        inputs: dict[str, Any] = {"prompt_embeds": list(embeds["prompt_embeds"])}
        if negative is None:
            # The pipeline asks for negative embeddings unless guidance is off.
            return {**inputs, "guidance_scale": 0.0}
        return {**inputs, "negative_prompt_embeds": list(negative["prompt_embeds"])}
