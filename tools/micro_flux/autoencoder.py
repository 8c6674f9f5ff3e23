# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Stage `vae`: trains the autoencoder (f = 4, 8 latent channels), mostly on 32 px crops, then on 64 px ones.

It writes the folder `vae` of --work, as diffusers loads it. The package's autoencoder came from an earlier version of
this script, on 64 px pictures; it does better at 128 px than there (`psnr`), so it was kept.
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from catalogue import BACKGROUND_NAMES
from compose import compose
from data import Painter
from diffusers import AutoencoderKL
from settings import IMAGE_SIZE, add_common_arguments, to_signed


def build_autoencoder() -> AutoencoderKL:
    """An untrained f = 4 autoencoder with 8 latent channels and no attention."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def draw_pictures(painter: Painter, count: int, seed: int) -> torch.Tensor:
    """Training pictures uint8 (count, 128, 128, 3), as `data.py` draws them."""
    rng, pictures = np.random.default_rng((seed, 23)), []
    for _ in range(count):
        _, _, sprite, _, _, pose = painter.sprite(rng)
        background = BACKGROUND_NAMES[int(rng.integers(len(BACKGROUND_NAMES)))]
        pictures.append(compose(rng, [sprite], background, IMAGE_SIZE, pose))
    return torch.from_numpy(np.stack(pictures))


def batch_of(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Signed float pictures (B, 3, H, W)."""
    return to_signed(images[indices]).contiguous()


def random_crops(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Crops (B, 3, side, side) of signed pictures, or, one time in four, the whole pictures shrunk to that size."""
    if torch.rand(()) < 0.25:
        return F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    room = pictures.shape[-1] - side + 1
    corners = torch.randint(room, (len(pictures), 2)).tolist()
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(pictures, corners)])


def gradient_difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of horizontal and vertical edges: keeps outlines sharp."""
    difference = first - second
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean PSNR in dB of pictures uint8 (B, H, W, 3) after encoding and decoding."""
    values = []
    for part in images.split(64):
        target = batch_of(part, torch.arange(len(part)))
        restored = vae.decode(vae.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((restored - target) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
        values.append(-10 * torch.log10(error))
    return torch.cat(values).mean().item()


def latent_statistics(vae: AutoencoderKL, images: torch.Tensor) -> tuple[float, float]:
    """`(shift, scale)` that bring latents to mean 0 and standard deviation 1."""
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(batch_of(part, torch.arange(len(part)))).latent_dist.mode() for part in images.split(64)]
        )
    return latents.mean().item(), 1 / latents.std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--crop_share", type=float, default=0.7, help="share of the time spent on 32 px crops")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pictures = draw_pictures(Painter(args.icons), args.pictures, args.seed)
    held_back, images = pictures[:100], pictures[100:]
    vae = build_autoencoder()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    start, step, running, last_print = time.monotonic(), 0, 0.0, 0.0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        rate = args.learning_rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        small = done < args.crop_share
        target = batch_of(images, torch.randint(len(images), (args.batch_size * (2 if small else 1),)))
        target = random_crops(target, 32 if small else 64)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(target).latent_dist.mean
            latents = mean + 0.02 * mean.std().detach() * torch.randn_like(mean)
            restored = vae.decode(latents).sample
        restored = restored.float()
        loss = F.mse_loss(restored, target) * 4 + F.l1_loss(restored, target) * 0.2
        loss = loss + 0.2 * gradient_difference(restored, target)
        loss = loss + 1e-5 * mean.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, running = step + 1, 0.98 * running + 0.02 * loss.item()
        if time.monotonic() - last_print > 60:
            last_print = time.monotonic()
            print(
                f"step {step} minutes {done * args.minutes:.1f} loss {running:.4f} psnr {psnr(vae, held_back):.2f}",
                flush=True,
            )
    shift, scale = latent_statistics(vae, pictures[:1000])
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    vae.save_pretrained(args.work / "vae")
    print({"psnr": psnr(vae.eval(), held_back), "steps": step, "shift": shift, "scale": scale})


if __name__ == "__main__":
    main()
