"""Tiny Krea 2 pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

from blockskip_hooks.families.krea2 import Krea2

from .base import TinyFamily, randomise
from .text_chat import qwen2_tokenizer, qwen3_vl


def save_tiny_krea2(folder: Path) -> None:
    """Write a whole Krea 2 pipeline of the real classes: VAE factor 4, so latent tokens are 8 px."""
    torch.manual_seed(0)
    words = qwen2_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.2, 0.1, 0.3, -0.4],
        latents_std=[1.2, 0.9, 1.5, 0.7],
    )
    text_encoder = qwen3_vl(len(words), num_layers=3)
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        transformer=randomise(transformer),
        text_encoder_select_layers=(1, 3),
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


TINY = [TinyFamily("krea2", Krea2, save_tiny_krea2, num_blocks=5)]
