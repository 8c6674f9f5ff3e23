"""Tiny Lumina 2 pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from blockskip_hooks.families.lumina2 import Lumina2

from .base import TinyFamily, randomise, tiny_vae
from .text_gemma import gemma_encoder, gemma_tokenizer


def save_tiny_lumina2(folder: Path) -> None:
    """Write a whole Lumina 2 pipeline of the real classes: VAE factor 8, so latent tokens are 16 px."""
    words = gemma_tokenizer()
    torch.manual_seed(0)
    # The pipeline takes a VAE factor of 8 for granted.
    vae = tiny_vae(4, scaling_factor=0.8, shift_factor=0.1)
    torch.manual_seed(0)
    transformer = randomise(
        Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=24,
            num_layers=5,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(64, 16, 16),
            cap_feat_dim=24,
        )
    )
    Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae.eval(),
        text_encoder=gemma_encoder(len(words)),
        tokenizer=words,
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


# The pipeline's own system prompt would fill these few tokens and leave none for the prompt.
TINY = [
    TinyFamily(
        "lumina2", Lumina2, save_tiny_lumina2, num_blocks=5, text_tokens=20, flags={"system_prompt": "the object"}
    )
]
