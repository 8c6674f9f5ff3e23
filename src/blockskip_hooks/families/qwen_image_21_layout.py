"""Qwen-Image 2.1 on fake tensors, for plans: its forward reads from a mask where text and images are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


SLOT = 4
"""Latents, 2 x 2 of them, that stand for one image slot of the vision-language model's sequence."""


class LayoutByShape(TorchFunctionMode):
    """Within this context the forward of an empty transformer takes from shapes where text and images are.

    Fake tensors have no values, and the forward reads the layout from those of the image mask.

    Args:
        transformer: The transformer.
        inputs: Arguments of its forward.
    """

    def __init__(self, transformer: Any, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        image_tokens = inputs["hidden_states"].shape[1]
        self._text_tokens = inputs["img_mask"].shape[1] - image_tokens // SLOT
        self._length = self._text_tokens + image_tokens
        self._condition_tokens = image_tokens - math.prod(inputs["img_shapes"][0][-1])
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
            return self._text_tokens + self._condition_tokens
        if func is torch.Tensor.tolist:
            # Image by image; text has no number.
            return [0] * self._condition_tokens + [-1] * self._text_tokens
        return func(*args, **kwargs)
