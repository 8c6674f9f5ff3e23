# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Writes a run's averaged weights as the pipeline folder that `FluxPipeline.from_pretrained` loads, in bf16.

The folder is `pipeline` of --work; the package's own copy is replaced only by
`--target ../../src/blockskip_hooks/assets/micro_flux`.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from optimizer import HybridOptimizer
from safetensors.torch import load_file, save_file
from settings import ASSETS, IMAGE_SIZE, add_common_arguments, write_json
from text import share_spellings, write_clip_tokenizer, write_t5_tokenizer
from transformer import TextToLatent, add_size_arguments, build_model, is_hidden_matrix


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

# Noise levels of 256 tokens are shifted upwards, as in training.
SHIFT = 2.0

# Flag defaults that suit this model, and how its images are drawn best.
DEFAULTS = {
    "schema": 1,
    "resolution": 128,
    "max_sequence_length": 16,
    "rank": 16,
    "lora_alpha": 16,
    "learning_rate": 3e-3,
    "max_train_steps": 200,
    "train_batch_size": 5,
    "weighting_scheme": "logit_normal",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0,
    "patch_positions": "photo",
    "pipeline_kwargs": {"true_cfg_scale": 3.0, "negative_prompt": "", "num_inference_steps": 20},
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


def trained_model(args: argparse.Namespace) -> TextToLatent:
    """The averaged weights of a run's last checkpoint, in bf16."""
    model, _, t5_tokenizer = build_model(args)
    optimizer = HybridOptimizer(model, is_hidden_matrix)
    model.bfloat16()
    stored = load_file(args.work / args.name / "checkpoint.safetensors")
    optimizer.write_to_model({key: stored[f"ema.{key}"] for key in optimizer.ema})
    share_spellings(model.t5, t5_tokenizer)
    return model.eval()


def export_pipeline(target: Path, model: TextToLatent, vae_folder: Path) -> None:
    """Writes all components to `target`."""
    folder = target.with_name(target.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    # Not the folder of this machine that it came from.
    vae.register_to_config(sample_size=IMAGE_SIZE, _name_or_path="")
    silence_variance(vae)
    vae.bfloat16().save_pretrained(folder / "vae")
    model.transformer.save_pretrained(folder / "transformer")
    clip_weights = {f"text_model.{name}": value.bfloat16() for name, value in model.clip.state_dict().items()}
    model.clip.config.save_pretrained(folder / "text_encoder")
    save_file(clip_weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    model.t5.save_pretrained(folder / "text_encoder_2")
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "blockskip_defaults.json", DEFAULTS)
    replace_files(folder, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    add_size_arguments(parser)
    parser.add_argument("--vae", type=Path, default=ASSETS / "micro_flux" / "vae")
    parser.add_argument("--target", type=Path, help="default: the folder `pipeline` of --work")
    args = parser.parse_args()
    target = args.target or args.work / "pipeline"
    export_pipeline(target, trained_model(args), args.vae)
    shutil.copy(args.work / args.name / "progress.json", args.work / "pipeline_progress.json")
    print(f"{target}: {(args.work / 'pipeline_progress.json').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
