"""Qwen-Image 2.1: single-stream blocks over text and image, block-causal; a VAE of four channels."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..layouts import BlockLayout
from ..loading.component_config import read_index
from ..utils.errors import UserError
from .base import CONDITION_FLAGS, VALIDATION_FLAGS, Config, PromptEmbeds, no_progress_bar
from .qwen_image import VideoLatents
from .qwen_image_21_layout import SLOT, LayoutByShape


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from PIL import Image


class QwenImage21(VideoLatents):
    """Qwen-Image 2.1, whose prompts stand behind a system message.

    The image is behind the text in the blocks' sequence, and its rotary position on the first axis is the number of
    text tokens before it, padding included. So prompts that share batches have one length in the whole run: that of
    the longest.
    """

    name = "qwen-image-2.1"
    pipeline_name = "QwenImage21Pipeline"
    block_layouts = {"QwenImage21TransformerBlock": BlockLayout()}
    text_components = ("text_encoder", "processor")
    text_arguments = {"output_hidden_states": True}
    text_width = "context_in_dim"
    image_size = 1024
    template_tokens = 13
    aligns_prompts = True
    reads_condition = True
    condition_on_mode = True
    lora_layers = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")
    own_flags = (*CONDITION_FLAGS, *VALIDATION_FLAGS[1:])  # of validation the number of steps alone, as upstream
    flag_defaults = {
        "max_sequence_length": 512,
        "output_dir": "hidream-dreambooth-lora",
        "rank": 16,
        "lora_alpha": 16,
        "validation_num_inference_steps": 40,
    }
    tags = ("qwen-image", "qwen-image-2.1", "qwen-image-diffusers")

    def check(self) -> None:
        index = read_index(self.model_path)
        if index["processor"][1] == "Qwen3VLProcessor" and importlib.util.find_spec("torchvision") is None:
            raise UserError(
                "Qwen-Image 2.1's text processor needs a package that is missing; run: pip install torchvision"
            )

    def make_traceable(self, transformer: Any) -> None:
        """Let a transformer run on fake tensors: where text and images are then depends on shapes."""
        forward = transformer.forward

        @functools.wraps(forward)
        def traceable(*args: Any, **kwargs: Any) -> Any:
            with LayoutByShape(transformer, kwargs):
                return forward(*args, **kwargs)

        transformer.forward = traceable

    def image_arguments(self, side: int) -> dict[str, Any]:
        # A condition image is scaled to as many pixels.
        return {**super().image_arguments(side), "output_resolution": side}

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        # One at a time, so that no prompt is padded to the length of another.
        encoded = (pipeline.encode_prompt(prompt)[0][0].cpu() for prompt in prompts)
        return [{"prompt_embeds": self._within_limit(tokens)} for tokens in encoded]

    def _within_limit(self, tokens: torch.Tensor) -> torch.Tensor:
        limit = self.flags["max_sequence_length"]
        if len(tokens) > limit:
            raise ValueError(f"it has {len(tokens)} tokens, limit {limit}; the model itself reads all of them")
        return tokens

    @torch.no_grad()
    def encode_pairs(
        self, pipeline: DiffusionPipeline, pairs: Sequence[tuple[str, Image.Image]]
    ) -> list[PromptEmbeds]:
        encoded = []
        for prompt, image in pairs:
            embeds, _, is_slot = pipeline.encode_prompt(prompt, [image])
            tokens, is_slot = embeds[0].cpu(), is_slot[0].cpu()
            slots, wanted = int(is_slot.sum()), image.width * image.height // self.latent_token_size**2
            if slots != wanted:
                raise ValueError(
                    f"its condition image of {image.width} x {image.height} px is scaled by the model's processor, to "
                    f"{slots} tokens and not {wanted}; choose another --resolution"
                )
            # The transformer reads latents in place of the tokens of the image.
            place = torch.tensor([int(is_slot.int().argmax()), slots])
            encoded.append({"prompt_embeds": self._within_limit(tokens[~is_slot]), "image_place": place})
        return encoded

    def shown_condition(self, image: Image.Image, pipeline_kwargs: Mapping[str, Any]) -> Image.Image:
        side = pipeline_kwargs.get("output_resolution", self.image_size)
        pipeline = sys.modules[self.pipeline_class.__module__]
        width, height, _ = pipeline.calculate_dimensions(side**2, image.width / image.height)
        return VaeImageProcessor().resize(image.convert("RGBA"), width=width, height=height)

    def align_embeds(self, embeds: Mapping[str, PromptEmbeds]) -> dict[str, PromptEmbeds]:
        lengths = {prompt: len(of["prompt_embeds"]) for prompt, of in embeds.items()}
        longest = max(lengths.values(), default=0)
        if min(lengths.values(), default=0) == longest:
            return dict(embeds)
        return {
            prompt: {
                **of,
                "prompt_embeds": pad(of["prompt_embeds"], (0, 0, 0, longest - lengths[prompt])),
                "prompt_embeds_mask": torch.arange(longest) < lengths[prompt],
            }
            for prompt, of in embeds.items()
        }

    def collate_embeds(self, embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
        tokens = [prompt["prompt_embeds"] for prompt in embeds]
        collated = {"prompt_embeds": pad_sequence(tokens, batch_first=True)}
        if len({len(of) for of in tokens}) > 1 or any("prompt_embeds_mask" in prompt for prompt in embeds):
            # Only if there is padding, as in the pipeline: attention without a mask is faster.
            masks = [prompt.get("prompt_embeds_mask", torch.ones(len(prompt["prompt_embeds"]))) for prompt in embeds]
            collated["prompt_embeds_mask"] = pad_sequence([mask.bool() for mask in masks], batch_first=True)
        if "image_place" in embeds[0]:
            collated["image_place"] = torch.stack([prompt["image_place"] for prompt in embeds])
        return collated

    def posterior(self, vae: ModelMixin, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Photos are on white, so they are opaque.
        return super().posterior(vae, pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0))

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        batch, _, height, width = noisy_latents.shape
        text = embeds["prompt_embeds"]
        is_image = torch.arange(text.shape[1] + height * width // SLOT, device=text.device) >= text.shape[1]
        if "image_place" in embeds:
            # A mark where the condition image comes in.
            start = int(embeds["image_place"][0, 0])
            is_image = torch.cat([is_image[:start], is_image.new_ones(1), is_image[start:]])
        return {
            "hidden_states": noisy_latents.flatten(2).transpose(1, 2),
            "timestep": timesteps / self.scheduler.config["num_train_timesteps"],
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": embeds.get("prompt_embeds_mask"),
            "img_shapes": [[(1, height, width)]] * batch,
            "img_mask": is_image.expand(batch, -1),
        }

    def with_condition(self, inputs: dict[str, Any], condition: torch.Tensor) -> dict[str, Any]:
        batch, _, height, width = condition.shape
        text, mask, is_image = (inputs[n] for n in ("encoder_hidden_states", "encoder_hidden_states_mask", "img_mask"))
        slots, shape = height * width // SLOT, inputs["img_shapes"][0][0]
        marked = is_image.shape[1] > text.shape[1] + math.prod(shape) // SLOT
        # Shapes of a plan say no place.
        start = int(is_image[0].int().argmax()) if marked else 0
        return {
            **inputs,
            "hidden_states": torch.cat([condition.flatten(2).transpose(1, 2), inputs["hidden_states"]], dim=1),
            "encoder_hidden_states": _opened(text, start, text.new_zeros(batch, slots, text.shape[2])),
            "encoder_hidden_states_mask": None if mask is None else _opened(mask, start, mask.new_ones(batch, slots)),
            "img_shapes": [[(1, height, width), shape]] * batch,
            "img_mask": _opened(is_image, start, is_image.new_ones(batch, slots - marked)),
        }

    def image_tokens(self, transformer_config: Config, inputs: Mapping[str, Any]) -> int:
        # Condition images are within the text, so they count as text.
        return math.prod(inputs["img_shapes"][0][-1])

    def text_positions(self, transformer_config: Config, inputs: Mapping[str, Any], length: int) -> torch.Tensor:
        # Text attends in calls of its own, which do not have the image.
        return (torch.arange(length) < inputs["encoder_hidden_states"].shape[1])[None]

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        # The prediction has the text's tokens, too.
        return prediction[:, -like[0, 0].numel() :].transpose(1, 2).reshape(like.shape)

    def prompt_inputs(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt}

    def image_pipeline(self, transformer: torch.nn.Module, vae: ModelMixin) -> DiffusionPipeline:
        # The pipeline cannot be made without its processor, which has no weights.
        with no_progress_bar():
            pipeline = self.pipeline_class.from_pretrained(
                self.model_path, transformer=transformer, vae=vae, text_encoder=None
            )
        pipeline.set_progress_bar_config(disable=True)
        encode = pipeline.encode_prompt

        def encode_prompt(*args: Any, prompt_embeds: Any = None, **kwargs: Any) -> Any:
            # Where the condition image is comes with the embeddings.
            mask = getattr(prompt_embeds, "image_pad_mask", None)
            return encode(*args, prompt_embeds=prompt_embeds, image_pad_mask=mask, **kwargs)

        pipeline.encode_prompt = encode_prompt
        return pipeline

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        inputs = {"num_inference_steps": self.flags["validation_num_inference_steps"]}
        for prefix, prompt in (("", embeds), ("negative_", negative)):
            if prompt is not None:
                mask, tokens = prompt.get("prompt_embeds_mask"), prompt["prompt_embeds"]
                tokens = tokens if mask is None else tokens[:, mask[0]]
                if "image_place" in prompt:
                    start, slots = prompt["image_place"][0].tolist()
                    tokens = _opened(tokens, start, tokens.new_zeros(1, slots, tokens.shape[-1]))
                    places = torch.arange(tokens.shape[1], device=tokens.device)
                    # A call of the pipeline takes no such mask; see image_pipeline.
                    mask = (places >= start) & (places < start + slots)
                    tokens.image_pad_mask = mask[None]  # type: ignore[attr-defined]
                inputs[f"{prefix}prompt_embeds"] = tokens
        return inputs


def _opened(rows: torch.Tensor, start: int, within: torch.Tensor) -> torch.Tensor:
    """``rows`` ``(B, S, ...)`` with ``within`` before row ``start`` of each sample."""
    return torch.cat([rows[:, :start], within, rows[:, start:]], dim=1)
