"""Qwen-Image 2.1: single-stream blocks over text and image, block-causal; a VAE of four channels."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from ..layouts import BlockLayout
from ..utils.errors import UserError
from .base import VALIDATION_FLAGS, Config, PromptEmbeds, no_progress_bar
from .qwen_image import VideoLatents


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


SLOT = 4
"""Latents, 2 x 2 of them, that stand for one image slot of the vision-language model's sequence."""


class QwenImage21(VideoLatents):
    """Qwen-Image 2.1.

    The image is behind the text in the blocks' sequence, and its rotary position on the first axis is the number of
    text tokens before it, padding included. So prompts that share batches have one length in the whole run: that of
    the longest.
    """

    name = "qwen-image-2.1"
    pipeline_name = "QwenImage21Pipeline"
    block_layouts = {"QwenImage21TransformerBlock": BlockLayout()}
    text_components = ("text_encoder", "processor")
    text_width = "context_in_dim"
    image_size = 1024
    aligns_prompts = True
    lora_layers = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")
    # The number of steps, as upstream.
    own_flags = VALIDATION_FLAGS[1:]
    flag_defaults = {
        "max_sequence_length": 512,
        "output_dir": "hidream-dreambooth-lora",
        "rank": 16,
        "lora_alpha": 16,
        "validation_num_inference_steps": 40,
    }
    tags = ("qwen-image", "qwen-image-2.1", "qwen-image-diffusers")

    def check(self) -> None:
        index = json.loads((self.model_path / "model_index.json").read_text())
        if index["processor"][1] == "Qwen3VLProcessor" and importlib.util.find_spec("torchvision") is None:
            raise UserError(
                "Qwen-Image 2.1's text processor needs a package that is missing; run: pip install torchvision"
            )

    def make_traceable(self, transformer: Any) -> None:
        """Let a transformer run on fake tensors: where text and images are then depends on shapes."""
        forward = transformer.forward

        @functools.wraps(forward)
        def traceable(*args: Any, **kwargs: Any) -> Any:
            with _LayoutByShape(transformer, kwargs["hidden_states"].shape[1], kwargs["img_mask"].shape[1]):
                return forward(*args, **kwargs)

        transformer.forward = traceable

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        encoded = []
        # One at a time, so that no prompt is padded to the length of another.
        for prompt in prompts:
            embeds, _, _ = pipeline.encode_prompt(prompt)
            tokens, limit = embeds[0].cpu(), self.flags["max_sequence_length"]
            if len(tokens) > limit:
                raise ValueError(f"it has {len(tokens)} tokens, limit {limit}; the model itself reads all of them")
            encoded.append({"prompt_embeds": tokens})
        return encoded

    def align_embeds(self, embeds: Mapping[str, PromptEmbeds]) -> dict[str, PromptEmbeds]:
        lengths = {prompt: len(of["prompt_embeds"]) for prompt, of in embeds.items()}
        longest = max(lengths.values(), default=0)
        if min(lengths.values(), default=0) == longest:
            return dict(embeds)
        return {
            prompt: {
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
        return {
            "hidden_states": noisy_latents.flatten(2).transpose(1, 2),
            "timestep": timesteps / self.scheduler.config["num_train_timesteps"],
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": embeds.get("prompt_embeds_mask"),
            "img_shapes": [[(1, height, width)]] * batch,
            "img_mask": is_image.expand(batch, -1),
        }

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
        return pipeline

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        inputs = {"num_inference_steps": self.flags["validation_num_inference_steps"]}
        for prefix, prompt in (("", embeds), ("negative_", negative)):
            if prompt is not None:
                mask = prompt.get("prompt_embeds_mask")
                tokens = prompt["prompt_embeds"]
                inputs[f"{prefix}prompt_embeds"] = tokens if mask is None else tokens[:, mask[0]]
        return inputs


class _LayoutByShape(TorchFunctionMode):
    """Within this context the forward of an empty transformer takes from shapes where text and images are.

    Fake tensors have no values, and the forward reads the layout from those of the image mask.

    Args:
        transformer: The transformer.
        image_tokens: Tokens of the images.
        slots: Tokens of the text, and of the images a quarter.
    """

    def __init__(self, transformer: Any, image_tokens: int, slots: int) -> None:
        super().__init__()
        self._text_tokens = slots - image_tokens // SLOT
        self._length = self._text_tokens + image_tokens
        self._rope = transformer.pos_embed
        transformer.pos_embed.forward = self._positions
        transformer.build_token_metadata = self._metadata

    def _positions(self, img_shapes: Any, image_pad_mask: torch.Tensor, device: torch.device) -> torch.Tensor:
        index = torch.zeros(self._length, dtype=torch.long)
        return torch.cat([frequencies[index] for frequencies in self._rope.freqs], dim=-1)

    def _metadata(self, image_pad_mask: torch.Tensor, img_shapes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return image_pad_mask.long(), image_pad_mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.repeat_interleave, torch.Tensor.repeat_interleave):
            return args[0].index_select(kwargs.get("dim", 0), torch.zeros(self._length, dtype=torch.long))
        if func is torch.Tensor.__setitem__:
            images = torch.arange(self._text_tokens, self._length)
            return func(args[0], (slice(None), images), args[2])
        if func is torch.Tensor.__int__:
            return self._text_tokens
        if func is torch.Tensor.tolist:
            return [-1] * len(args[0])
        return func(*args, **kwargs)
