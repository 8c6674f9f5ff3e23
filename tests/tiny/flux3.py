"""A tiny FLUX.3 pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import Flux3AutoBlocks, Flux3ModularPipeline, Flux3Transformer2DModel
from transformers import Qwen3VLForConditionalGeneration

from blockskip_hooks.families.flux3 import Flux3

from .base import TinyFamily, randomise
from .flux2 import packed_vae
from .text_chat import qwen2_tokenizer, qwen3_vl_config


def save_tiny_flux3(folder: Path) -> None:
    """Write a whole FLUX.3 pipeline of the real classes: VAE factor 4, so latent tokens are 8 px.

    Deep enough a text encoder for the hidden layers that the pipeline reads.
    """
    torch.manual_seed(0)
    words = qwen2_tokenizer()
    text_encoder = Qwen3VLForConditionalGeneration(qwen3_vl_config(len(words), num_layers=32)).eval()
    torch.manual_seed(0)
    transformer = Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    pipeline = Flux3ModularPipeline(blocks=Flux3AutoBlocks())
    pipeline.update_components(
        vae=packed_vae(), text_encoder=text_encoder, tokenizer=words, transformer=randomise(transformer)
    )
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


TINY = [TinyFamily("flux3", Flux3, save_tiny_flux3, num_blocks=7)]
