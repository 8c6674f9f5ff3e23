"""Ideogram 4: single-stream blocks over one packed sequence of image and text tokens; Qwen3-VL text features."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch.nn.functional import pad, pixel_unshuffle

from ..layouts import BlockLayout
from ..loading.component_config import defining_module, diffusers_class
from .base import Config, Family, Flag, PromptEmbeds
from .flux import Flux


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

PATCH_SIZE = 2
SCHEDULE_SIDE = 512
"""Side of the images at which the upstream training noise schedule is not shifted."""


def _constants() -> Any:
    """The module of the transformer, which holds its numbers for kinds of tokens."""
    return defining_module("Ideogram4Transformer2DModel")


@cache
def embedded_prompt_pipeline() -> Any:
    """The class of the stock pipeline with text features ``(1, S, D)`` in the place of a prompt."""

    stock: Any = diffusers_class("Ideogram4Pipeline")

    class EmbeddedPromptPipeline(stock):
        def __call__(self, prompt_embeds: torch.Tensor, **kwargs: Any) -> Any:
            self._prompt_embeds = prompt_embeds
            return super().__call__("", max_sequence_length=prompt_embeds.shape[1], **kwargs)

        def encode_prompt(
            self, prompt: str | list[str], grid_h: int, grid_w: int, max_sequence_length: int, device: torch.device
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
            features = pad(self._prompt_embeds.to(device), (0, 0, 0, grid_h * grid_w))
            return features, *self._prepare_ids([max_sequence_length], grid_h, grid_w, max_sequence_length, device)

    return EmbeddedPromptPipeline


class Ideogram4(Family):
    """Ideogram 4.

    Latents are the VAE's in 2 x 2 patches, normalised: a latent is a token. Tokens attend to each other wherever they
    stand, so a sample is laid out as image, text, padding: all images start at the same place, padding is at the end.
    """

    name = "ideogram4"
    pipeline_name = "Ideogram4Pipeline"
    block_layouts = {"Ideogram4TransformerBlock": BlockLayout()}
    text_components = ("text_encoder", "tokenizer")
    text_width = "llm_features_dim"
    text_masks = {"prompt_mask": torch.bool}
    trains_on_mode = True
    unused_components = ("unconditional_transformer", "prompt_enhancer_head")
    image_components = ("unconditional_transformer",)
    image_size = 2048
    lora_layers = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    modulation_layers = ("adaln_modulation",)
    # The upstream script takes --guidance_scale too; the transformer takes none, so it has no effect.
    own_flags = (
        *Flux.own_flags,
        Flag(
            "upsample_prompt",
            {"action": "store_true", "help": "Rewrite every prompt as the structured caption the model was made for."},
        ),
        Flag(
            "prompt_enhancer_head_id",
            {
                "type": str,
                "default": "diffusers/qwen3-vl-8b-instruct-lm-head",
                "help": "Folder or hub id of the language-model head that --upsample_prompt writes with.",
            },
        ),
        Flag(
            "disable_training_autocast",
            {"action": "store_true", "help": "Refused: training in half precision runs under autocast."},
            refusal="training in half precision runs under autocast; leave it out",
        ),
    )
    flag_defaults = {
        "max_sequence_length": 2048,
        "output_dir": "flux-dreambooth-lora",
        "weighting_scheme": "logit_normal",
        "logit_std": 1.5,
    }
    tags = ("ideogram4", "ideogram4-diffusers")

    def load_scheduler(self) -> Any:
        # Upstream draws the noise level itself from a distribution, whose logit-normal form moves with the resolution
        # as a shift of the schedule does, and does not use the model's schedule.
        side = self.flags.get("resolution") or SCHEDULE_SIDE
        shift = side / SCHEDULE_SIDE if self.flags["weighting_scheme"] == "logit_normal" else 1.0
        return diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
            self.model_path, subfolder="scheduler", shift=shift, use_dynamic_shifting=False
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        channels, rows, columns = self.vae_latent_shape(height, width)
        return (channels * PATCH_SIZE**2, rows // PATCH_SIZE, columns // PATCH_SIZE)

    def streamable_text_encoders(self, *, trains_text: bool) -> list[str]:
        # Writing a prompt runs every layer once per word.
        return [] if self.flags["upsample_prompt"] else super().streamable_text_encoders(trains_text=trains_text)

    def load_text_pipeline(
        self, dtype: torch.dtype, device: torch.device | str, streamed: Collection[str] = ()
    ) -> DiffusionPipeline:
        pipeline = super().load_text_pipeline(dtype, device, streamed)
        if self.flags["upsample_prompt"]:
            head = diffusers_class("Ideogram4PromptEnhancerHead").from_pretrained(
                self.flags["prompt_enhancer_head_id"], dtype=dtype
            )
            pipeline.register_modules(prompt_enhancer_head=head.to(device))
        return pipeline

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        side, text = self.image_size, _constants().LLM_TOKEN_INDICATOR
        embeds = []
        # One at a time: each is as long as the longest prompt allowed until its padding is cut off.
        for prompt in prompts:
            if self.flags["upsample_prompt"]:
                # Seeded, because a resumed run encodes its prompts again.
                generator = torch.Generator().manual_seed(self.flags.get("seed") or 0)
                (prompt,) = pipeline.upsample_prompt(prompt, height=side, width=side, generator=generator)
            features, _, _, indicator = pipeline.encode_prompt(
                prompt, 1, 1, self.flags["max_sequence_length"], pipeline.text_encoder.device
            )
            tokens = features[indicator == text].cpu()
            embeds.append({"prompt_embeds": tokens, "prompt_mask": torch.ones(len(tokens), dtype=torch.bool)})
        return embeds

    def scale_latents(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        # Within a token the place in the patch comes first, then the VAE's channel.
        patches = pixel_unshuffle(latents, PATCH_SIZE).unflatten(1, (-1, PATCH_SIZE**2)).transpose(1, 2).flatten(1, 2)
        std = (vae.bn.running_var + self.vae_config["batch_norm_eps"]).sqrt()
        return (patches - vae.bn.running_mean[:, None, None].to(patches)) / std[:, None, None].to(patches)

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        ids = _constants()
        batch, _, height, width = noisy_latents.shape
        device, mask = noisy_latents.device, embeds["prompt_mask"]
        text_tokens, image_tokens = mask.shape[1], height * width
        grid = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, height, width)))
        text = torch.arange(text_tokens, device=device)[:, None].expand(-1, 3)
        positions = torch.cat([grid + ids.IMAGE_POSITION_OFFSET, text]).expand(batch, -1, -1)
        real = pad(mask, (image_tokens, 0), value=True)
        indicator = torch.full_like(real, ids.OUTPUT_IMAGE_INDICATOR, dtype=torch.long)
        indicator[:, image_tokens:] = mask * ids.LLM_TOKEN_INDICATOR
        return {
            "hidden_states": pad(noisy_latents.flatten(2).transpose(1, 2), (0, 0, 0, text_tokens)),
            "timestep": (1.0 - timesteps / self.scheduler.config["num_train_timesteps"]).to(noisy_latents.dtype),
            "encoder_hidden_states": pad(embeds["prompt_embeds"], (0, 0, image_tokens, 0)),
            "position_ids": positions,
            "segment_ids": torch.where(real, 1, ids.SEQUENCE_PADDING_INDICATOR),
            "indicator": indicator,
        }

    def text_positions(self, transformer_config: Config, inputs: Mapping[str, Any], length: int) -> torch.Tensor:
        return inputs["indicator"] == _constants().LLM_TOKEN_INDICATOR

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        image_tokens = like.shape[-2] * like.shape[-1]
        return -prediction[:, :image_tokens].transpose(1, 2).unflatten(2, like.shape[-2:])

    def image_pipeline(self, transformer: torch.nn.Module, vae: ModelMixin) -> DiffusionPipeline:
        # Guidance needs the unconditional transformer: the pipeline calls it in every step.
        absent = dict.fromkeys((*self.text_components, "prompt_enhancer_head"))
        pipeline = embedded_prompt_pipeline().from_pretrained(
            self.model_path,
            transformer=transformer,
            vae=vae,
            **absent,
            dtype=transformer.dtype,
            variant=self.variant,
        )
        pipeline.unconditional_transformer.to(vae.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        return {"prompt_embeds": embeds["prompt_embeds"]}
