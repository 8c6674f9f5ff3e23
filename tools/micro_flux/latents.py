# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Stage `encode`: pictures and zoomed crops of them to normalised latents.

`latents.safetensors`: `full` bf16 (P, 8, 16, 16) of the 64 px pictures and `patch` bf16 (Q, 8, 8, 8) of square crops
of side 32..64 px resized to 32 px; `patch_source` int64 (Q,) names the picture of each crop.
"""

import argparse

import torch
import torch.nn.functional as F
from autoencoder import load_autoencoder
from safetensors.torch import load_file, save_file
from settings import add_common_arguments, to_signed


CROP_SIDES = (32, 40, 48, 56, 64)


@torch.no_grad()
def encode(vae, pictures: torch.Tensor) -> torch.Tensor:
    """Signed pictures (B, 3, H, W) to normalised latents (B, 8, H / 4, W / 4)."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(pictures).latent_dist.mode().float()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def random_patch(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random square crop of a signed picture (3, 64, 64), resized to (3, 32, 32)."""
    side = CROP_SIDES[int(torch.randint(len(CROP_SIDES), (), generator=generator))]
    y, x = torch.randint(64 - side + 1, (2,), generator=generator).tolist()
    crop = picture[None, :, y : y + side, x : x + side]
    return F.interpolate(crop, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    images = load_file(args.work / "pictures.safetensors")["images"]
    vae = load_autoencoder(args.work)
    full, patch = [], []
    for part in images.split(64):
        pictures = to_signed(part).contiguous()
        full.append(encode(vae, pictures).bfloat16())
        patch.append(encode(vae, torch.stack([random_patch(p, generator) for p in pictures])).bfloat16())
    latents = {"full": torch.cat(full), "patch": torch.cat(patch), "patch_source": torch.arange(len(images))}
    save_file(latents, args.work / "latents.safetensors")
    full = latents["full"].float()
    print(
        f"{len(full)} latents: mean {full.mean():.3f}, std {full.std():.3f}, channels {full.std((0, 2, 3)).tolist()}"
    )


if __name__ == "__main__":
    main()
