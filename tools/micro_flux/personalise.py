# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""A straightforward LoRA loop on the embedded pipeline, used only to check the embedded model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from PIL import Image
from settings import ASSETS, IMAGE_SIZE, to_signed


TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


@dataclass(frozen=True)
class Recipe:
    """Settings of one LoRA training."""

    rank: int = 16
    learning_rate: float = 3e-3
    steps: int = 200
    batch_size: int = 5
    targets: tuple[str, ...] = TARGETS


def load_photos(subject: str, folder: Path = ASSETS / "photos", side: int = IMAGE_SIZE) -> torch.Tensor:
    """The photos of a subject, signed (5, 3, side, side)."""
    pictures = [
        np.asarray(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
        for path in sorted((folder / subject).glob("*.png"))
    ]
    return to_signed(torch.from_numpy(np.stack(pictures)))


@torch.no_grad()
def _latents(pipeline: FluxPipeline, pictures: torch.Tensor) -> torch.Tensor:
    config = pipeline.vae.config
    latents = (pipeline.vae.encode(pictures).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    return pipeline._pack_latents(latents, *latents.shape)


@torch.no_grad()
def _conditions(pipeline: FluxPipeline, prompt: str, count: int) -> dict[str, torch.Tensor]:
    embeddings, pooled, text_ids = pipeline.encode_prompt(prompt, None, max_sequence_length=16)
    return {
        "encoder_hidden_states": embeddings.expand(count, -1, -1),
        "pooled_projections": pooled.expand(count, -1),
        "txt_ids": text_ids,
    }


def train_lora(
    pipeline: FluxPipeline,
    photos: torch.Tensor,
    instance_prompt: str,
    seed: int,
    recipe: Recipe = Recipe(),
    class_pictures: torch.Tensor | None = None,
    class_prompt: str | None = None,
) -> list[float]:
    """Adds a LoRA adapter to the pipeline's transformer and trains it; returns the losses.

    With `class_pictures` (signed, as `photos`) every step adds as many of them under `class_prompt`: prior
    preservation with weight 1.
    """
    torch.manual_seed(seed)
    transformer = pipeline.transformer
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=recipe.rank, lora_alpha=recipe.rank, target_modules=list(recipe.targets), init_lora_weights="gaussian"
        )
    )
    sets = [(_latents(pipeline, photos), _conditions(pipeline, instance_prompt, recipe.batch_size))]
    if class_pictures is not None:
        sets.append((_latents(pipeline, class_pictures), _conditions(pipeline, class_prompt, recipe.batch_size)))
    side = photos.shape[-1] // 8
    image_ids = pipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    shift = pipeline.scheduler.config.shift
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    losses = []
    for _ in range(recipe.steps):
        for latents, conditions in sets:
            clean = latents[torch.randint(len(latents), (recipe.batch_size,))]
            noise = torch.randn_like(clean)
            sigma = torch.sigmoid(torch.randn(recipe.batch_size))
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            noisy = torch.lerp(clean, noise, sigma[:, None, None])
            prediction = transformer(
                hidden_states=noisy, timestep=sigma, img_ids=image_ids, return_dict=False, **conditions
            )[0]
            loss = (prediction - (noise - clean)).square().mean()
            loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses
