"""Tiny FLUX.2 pipelines."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from blockskip_hooks.families.flux2 import Flux2, Flux2Klein

from .base import TinyFamily, randomise
from .text_bpe import mistral_tokenizer, pixtral_processor, qwen_tokenizer


# Deep enough for the default --text_encoder_out_layers, and narrow.
TEXT_MODEL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 31,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


def _transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return randomise(
        Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )


def packed_vae() -> AutoencoderKLFlux2:
    """Factor 4, and running statistics that are not those of a new layer."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean = torch.linspace(-0.5, 0.5, 16)
    vae.bn.running_var = torch.linspace(0.5, 2.0, 16)
    return vae.eval()


def _write_images_config(folder: Path) -> None:
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))


def save_tiny_flux2(folder: Path) -> None:
    """Write a whole FLUX.2-dev pipeline of the real classes."""
    torch.manual_seed(0)
    words = mistral_tokenizer()
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"model_type": "mistral", "vocab_size": len(words), **TEXT_MODEL}
    config = Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=1,
    )
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=packed_vae(),
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=pixtral_processor(),
        transformer=_transformer(guidance_embeds=True),
    ).save_pretrained(folder)
    _write_images_config(folder)


def save_tiny_flux2_klein(folder: Path, is_distilled: bool) -> None:
    """Write a whole FLUX.2-klein pipeline of the real classes."""
    torch.manual_seed(0)
    words = qwen_tokenizer()
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=packed_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), **TEXT_MODEL)).eval(),
        tokenizer=words,
        transformer=_transformer(guidance_embeds=False),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    _write_images_config(folder)


TINY = [
    TinyFamily("flux2-dev", Flux2, save_tiny_flux2, num_blocks=5),
    TinyFamily("flux2-klein", Flux2Klein, functools.partial(save_tiny_flux2_klein, is_distilled=False), num_blocks=5),
]
