"""Tiny FLUX pipelines."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from blockskip_hooks.families.flux import Flux, FluxKontext

from .base import TinyFamily, randomise, tiny_vae
from .text import clip_tokenizer, t5_tokenizer


def _transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
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


def save_tiny_flux(folder: Path, guidance_embeds: bool = True, pipeline_class: type = FluxPipeline) -> Path:
    """Write a whole FLUX pipeline of the real classes: VAE factor 4, so latent tokens are 8 px."""
    torch.manual_seed(0)
    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_words),
            hidden_size=20,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=20,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_words), d_model=24, d_ff=32, d_kv=12, num_layers=2, num_heads=2))
    vae = tiny_vae(3, scaling_factor=0.8, shift_factor=0.1)
    pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip.eval(),
        tokenizer=clip_words,
        text_encoder_2=t5.eval(),
        tokenizer_2=t5_words,
        transformer=_transformer(guidance_embeds),
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    if pipeline_class is FluxKontextPipeline:
        images |= {"max_area": 32 * 32, "_auto_resize": False}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))
    return folder


TINY = [
    TinyFamily("flux-dev", Flux, save_tiny_flux, num_blocks=5, trains_text=True),
    TinyFamily(
        "flux-schnell",
        Flux,
        functools.partial(save_tiny_flux, guidance_embeds=False),
        num_blocks=5,
        trains_text=True,
    ),
    TinyFamily(
        "flux-kontext",
        FluxKontext,
        functools.partial(save_tiny_flux, pipeline_class=FluxKontextPipeline),
        num_blocks=5,
        trains_text=True,
    ),
]
