"""Tiny PixArt-Sigma pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from blockskip_hooks.families.pixart_sigma import PixArtSigma

from .base import TinyFamily, randomise
from .text import t5_tokenizer


def save_tiny_pixart_sigma(folder: Path) -> None:
    """Write a whole PixArt-Sigma pipeline of the real classes: VAE factor 4, so latent tokens are 8 px."""
    torch.manual_seed(0)
    words = t5_tokenizer()
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=24, d_ff=32, d_kv=12, num_layers=2, num_heads=2))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    torch.manual_seed(0)
    transformer = randomise(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=5,
            cross_attention_dim=24,
            sample_size=32,
            caption_channels=24,
            interpolation_scale=1,
            use_additional_conditions=False,
        )
    )
    PixArtSigmaPipeline(
        tokenizer=words,
        text_encoder=t5.eval(),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2, "use_resolution_binning": False}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


TINY = [TinyFamily("pixart-sigma", PixArtSigma, save_tiny_pixart_sigma, num_blocks=5)]
