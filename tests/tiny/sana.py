"""Tiny SANA and SANA-Sprint pipelines."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from blockskip_hooks.families.sana import Sana, SanaSprint

from .base import TinyFamily, randomise
from .text_gemma import gemma_encoder, gemma_tokenizer


def _transformer(qk_norm: str | None, guidance_embeds: bool) -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return randomise(
        SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=5,
            num_attention_heads=2,
            attention_head_dim=12,
            num_cross_attention_heads=3,
            cross_attention_head_dim=8,
            cross_attention_dim=24,
            caption_channels=24,
            sample_size=32,
            guidance_embeds=guidance_embeds,
            qk_norm=qk_norm,
        )
    )


def save_tiny_sana(folder: Path, qk_norm: str | None = None, sprint: bool = False) -> None:
    """Write a whole SANA pipeline of the real classes: VAE factor 4 and patches of one, so latent tokens are 4 px."""
    words = gemma_tokenizer()
    torch.manual_seed(0)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )
    scheduler = (
        SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
        if sprint
        else DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )
    pipeline_class = SanaSprintPipeline if sprint else SanaPipeline
    pipeline_class(
        tokenizer=words,
        text_encoder=gemma_encoder(len(words)),
        vae=vae.eval(),
        transformer=_transformer(qk_norm, guidance_embeds=sprint),
        scheduler=scheduler,
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2, "use_resolution_binning": False}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


_QK_NORM = "rms_norm_across_heads"

TINY = [
    TinyFamily("sana", Sana, save_tiny_sana, num_blocks=5),
    TinyFamily("sana-1.5", Sana, functools.partial(save_tiny_sana, qk_norm=_QK_NORM), num_blocks=5),
    TinyFamily(
        "sana-sprint", SanaSprint, functools.partial(save_tiny_sana, qk_norm=_QK_NORM, sprint=True), num_blocks=5
    ),
]
