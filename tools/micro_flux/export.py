# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Writes the pipeline folder that `FluxPipeline.from_pretrained` loads, in bf16 safetensors."""

import copy
import os
import shutil
from pathlib import Path

import torch
from autoencoder import load_autoencoder
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file
from settings import write_json
from text import write_clip_tokenizer, write_t5_tokenizer
from transformers import CLIPTextModel, T5EncoderModel


MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.31.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

# Flag defaults that suit this model, and how its images are drawn best.
DEFAULTS = {
    "schema": 1,
    "resolution": 64,
    "max_sequence_length": 16,
    "rank": 16,
    "lora_alpha": 16,
    "learning_rate": 3e-3,
    "max_train_steps": 200,
    "train_batch_size": 5,
    "weighting_scheme": "logit_normal",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0,
    "pipeline_kwargs": {"true_cfg_scale": 2.5, "negative_prompt": "", "num_inference_steps": 20},
}


def silence_variance(vae: AutoencoderKL) -> None:
    """Makes `latent_dist.sample()` the mean within 0.1 %: the encoder's variance is not trained."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.encoder.conv_out.weight[channels:] = 0
        vae.encoder.conv_out.bias[channels:] = -14


def replace_files(source: Path, target: Path) -> None:
    """Moves every file of `source` over `target`, one atomic rename each."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, destination)
    shutil.rmtree(source)


def export_pipeline(
    work: Path, target: Path, transformer: FluxTransformer2DModel, clip: CLIPTextModel, t5: T5EncoderModel
) -> None:
    """Writes all components with the work folder's autoencoder to `target`."""
    folder = target.with_name(target.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    vae = load_autoencoder(work)
    silence_variance(vae)
    vae.bfloat16().save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    clip_weights = {f"text_model.{name}": value.bfloat16() for name, value in clip.state_dict().items()}
    clip.config.save_pretrained(folder / "text_encoder")
    save_file(clip_weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    copy.deepcopy(t5).bfloat16().save_pretrained(folder / "text_encoder_2")
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "blockskip_defaults.json", DEFAULTS)
    replace_files(folder, target)
