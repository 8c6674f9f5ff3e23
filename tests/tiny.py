"""Tiny models of every family: real classes, random weights, small enough for seconds on one core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny transformer and the inputs of one forward.

    Attributes:
        name: Family and variant.
        make_transformer: Builds the transformer with weights from a fixed seed.
        make_inputs: Builds keyword inputs for a batch size.
        num_blocks: N.
    """

    name: str
    make_transformer: Callable[[], torch.nn.Module]
    make_inputs: Callable[[int], dict[str, Any]]
    num_blocks: int


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter weight enough that each block changes its input: zero-initialised gates would hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.7 / fan_in**0.5) if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def _flux(guidance_embeds: bool) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return randomise(
            FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=24,
                pooled_projection_dim=20,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            )
        )

    return make


def _flux_inputs(guidance_embeds: bool) -> Callable[[int], dict[str, Any]]:
    def make(batch_size: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        side, text = 4, 5
        img_ids = torch.zeros(side, side, 3)
        img_ids[..., 1] += torch.arange(side)[:, None]
        img_ids[..., 2] += torch.arange(side)[None]
        return {
            "hidden_states": torch.randn(batch_size, side * side, 16, generator=generator),
            "encoder_hidden_states": torch.randn(batch_size, text, 24, generator=generator),
            "pooled_projections": torch.randn(batch_size, 20, generator=generator),
            "timestep": torch.rand(batch_size, generator=generator),
            "guidance": torch.full((batch_size,), 3.5) if guidance_embeds else None,
            "img_ids": img_ids.reshape(-1, 3),
            "txt_ids": torch.zeros(text, 3),
        }

    return make


TINY_FAMILIES = [
    TinyFamily("flux-dev", _flux(True), _flux_inputs(True), 5),
    TinyFamily("flux-schnell", _flux(False), _flux_inputs(False), 5),
]
