"""Training samples of the embedded model, made with stock diffusers: what the examples beside this file train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from blockskip_hooks import embedded_model, embedded_photos, embedded_subjects


def load_pipeline() -> FluxPipeline:
    """The embedded pipeline; any FLUX.1 folder or hub id would do."""
    return FluxPipeline.from_pretrained(embedded_model(), dtype=torch.float32)


@torch.no_grad()
def make_samples(pipeline: FluxPipeline, subject: str = "teapot", size: int = 128) -> list[tuple[dict[str, Any], Any]]:
    """Arguments of the transformer and the velocity it should predict, for each photo at one noise level each."""
    prompt = embedded_subjects()[subject]["instance_prompt"]
    tokens, pooled, text_ids = pipeline.encode_prompt(prompt, prompt_2=None, max_sequence_length=16)
    vae, generator, samples = pipeline.vae, torch.Generator().manual_seed(0), []
    for number, file in enumerate(sorted(embedded_photos(subject).glob("*.png"))):
        photo = np.asarray(Image.open(file).convert("RGB").resize((size, size)), dtype=np.float32)
        pixels = torch.from_numpy(photo / 127.5 - 1.0).permute(2, 0, 1)[None]
        latents = vae.encode(pixels).latent_dist.mode()
        latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.tensor([0.2 + 0.15 * number])
        noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        batch, channels, height, width = latents.shape
        inputs = {
            "hidden_states": pipeline._pack_latents(noisy, batch, channels, height, width),
            "timestep": sigma,
            "guidance": None,
            "pooled_projections": pooled,
            "encoder_hidden_states": tokens,
            "txt_ids": text_ids,
            "img_ids": pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
        }
        samples.append((inputs, pipeline._pack_latents(target, batch, channels, height, width)))
    return samples
