"""Tiny Z-Image pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from blockskip_hooks.families.z_image import ZImage

from .base import TinyFamily, randomise, tiny_vae
from .text_chat import qwen2_tokenizer


def save_tiny_z_image(folder: Path) -> None:
    """Write a whole Z-Image pipeline of the real classes: VAE factor 4, so latent tokens are 8 px."""
    torch.manual_seed(0)
    words = qwen2_tokenizer()
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
        )
    )
    vae = tiny_vae(3, scaling_factor=0.4, shift_factor=0.1)
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=words,
        transformer=randomise(transformer),
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


TINY = [TinyFamily("z-image", ZImage, save_tiny_z_image, num_blocks=5, text_tokens=48)]
