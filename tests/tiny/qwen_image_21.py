"""Tiny Qwen-Image 2.1 pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)

from blockskip_hooks.families.qwen_image_21 import QwenImage21

from .base import TinyFamily, randomise
from .text_chat import qwen3_vl_processor, qwen3_vl_with_head


def save_tiny_qwen_image_21(folder: Path) -> None:
    """Write a whole Qwen-Image 2.1 pipeline of the real classes; the VAE has factor 16, as the pipeline insists."""
    torch.manual_seed(0)
    processor = qwen3_vl_processor()
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.2, 0.1, 0.3, -0.4],
        latents_std=[1.2, 0.9, 1.5, 0.7],
    )
    text_encoder = qwen3_vl_with_head(processor.tokenizer, num_layers=2)
    torch.manual_seed(0)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=vae.eval(),
        text_encoder=text_encoder,
        processor=processor,
        transformer=randomise(transformer),
    ).save_pretrained(folder)
    images = {"height": 64, "width": 64, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


TINY = [
    TinyFamily("qwen-image-2.1", QwenImage21, save_tiny_qwen_image_21, num_blocks=4, resolution=128, text_tokens=24)
]
