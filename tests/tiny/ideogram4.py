"""Tiny Ideogram 4 pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)

from blockskip_hooks.families.ideogram4 import Ideogram4

from .base import TinyFamily, randomise
from .text_chat import qwen2_tokenizer, qwen3_vl


def _transformer(seed: int) -> Ideogram4Transformer2DModel:
    torch.manual_seed(0)
    return randomise(
        Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=48,
            adaln_dim=16,
            llm_features_dim=13 * 16,
            mrope_section=(4, 2, 2),
        ),
        seed,
    )


def save_tiny_ideogram4(folder: Path) -> None:
    """Write a whole Ideogram 4 pipeline of the real classes: VAE factor 4, so latent tokens are 8 px."""
    torch.manual_seed(0)
    words = qwen2_tokenizer()
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.uniform_(-0.3, 0.3)
    vae.bn.running_var.uniform_(0.5, 1.5)
    Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        # The pipeline reads the last of 36 layers.
        text_encoder=qwen3_vl(len(words), num_layers=36),
        tokenizer=words,
        transformer=_transformer(seed=0),
        unconditional_transformer=_transformer(seed=1),
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0, "guidance_schedule": None}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


TINY = [TinyFamily("ideogram4", Ideogram4, save_tiny_ideogram4, num_blocks=5, text_tokens=48)]
