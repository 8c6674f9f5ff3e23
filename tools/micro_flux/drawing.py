# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Drawing with the embedded pipeline, and pictures of pictures."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from settings import ASSETS, IMAGE_SIZE, to_signed


def load_pipeline(folder: Path = ASSETS / "micro_flux") -> FluxPipeline:
    """The pipeline in float32."""
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def defaults(folder: Path = ASSETS / "micro_flux") -> dict:
    """The pipeline folder's `blockskip_defaults.json`."""
    return json.loads((folder / "blockskip_defaults.json").read_text(encoding="utf-8"))


@torch.no_grad()
def draw(
    pipeline: FluxPipeline,
    prompts: list[str],
    seed: int,
    side: int = IMAGE_SIZE,
    folder: Path = ASSETS / "micro_flux",
    batch_size: int = 10,
    **kwargs,
) -> torch.Tensor:
    """One picture per prompt, uint8 (B, side, side, 3), with the pipeline folder's keyword arguments."""
    settings = defaults(folder)["pipeline_kwargs"] | kwargs
    generator, images = torch.Generator().manual_seed(seed), []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        negative = settings.get("negative_prompt")
        output = pipeline(
            batch,
            height=side,
            width=side,
            max_sequence_length=16,
            generator=generator,
            output_type="np",
            **settings | ({} if negative is None else {"negative_prompt": [negative] * len(batch)}),
        ).images
        images.append(torch.from_numpy((output * 255).round().astype(np.uint8)))
    return torch.cat(images)


def signed(images: torch.Tensor, side: int | None = None) -> torch.Tensor:
    """uint8 (B, H, W, 3) to (B, 3, side, side) in [-1, 1]; without `side` the size stays."""
    pictures = to_signed(images)
    if side is None or side == pictures.shape[-1]:
        return pictures
    return F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def grid(images: torch.Tensor, columns: int, zoom: int = 1) -> Image.Image:
    """Pictures uint8 (B, H, W, 3) side by side, row by row."""
    rows = [torch.cat(list(row), dim=1) for row in images.split(columns)]
    picture = Image.fromarray(torch.cat(rows).numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
