"""Tiny Stable Diffusion 3 and 3.5 pipelines."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from blockskip_hooks.families.sd3 import StableDiffusion3

from .base import TinyFamily, randomise, tiny_vae
from .text_sd3 import clip_t5_components


def _transformer(version: str) -> SD3Transformer2DModel:
    newer = {"dual_attention_layers": (0, 1, 2), "qk_norm": "rms_norm"} if version == "3.5" else {}
    torch.manual_seed(0)
    return randomise(
        SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            pos_embed_max_size=32,
            **newer,
        )
    )


def save_tiny_sd3(folder: Path, version: str = "3") -> Path:
    """Write a whole pipeline of the real classes: VAE factor 4, so latent tokens are 8 px; CLIP sees 16 tokens."""
    torch.manual_seed(0)
    vae = tiny_vae(3, scaling_factor=1.5, shift_factor=0.06)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        transformer=_transformer(version),
        **clip_t5_components((12, 16), clip_positions=16, t5_width=32),
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))
    return folder


TINY = [
    TinyFamily("sd3", StableDiffusion3, save_tiny_sd3, num_blocks=5, trains_text=True),
    TinyFamily(
        "sd3.5", StableDiffusion3, functools.partial(save_tiny_sd3, version="3.5"), num_blocks=5, trains_text=True
    ),
]
