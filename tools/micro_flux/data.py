# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Stage `data`: composes the training pictures, 128 px, and encodes them, shard by shard.

Half of the pictures show a class's icon (a third of these in another hue, which the caption names), a quarter any icon
of the training vendors ("an object"), a quarter an object of a few shapes (`shapes.py`).

`shards/NNN.safetensors`: `images` uint8 (P, 128, 128, 3); `class` (-1: none), `background` and `kind` (index of
`KINDS`) int64 (P,); normalised latents in bf16: `full` (P, 8, 32, 32), `middle` (P, 8, 24, 24) of the picture at
96 px, `half` (P, 8, 16, 16) at 64 px and `patch` (P, 2, 8, 16, 16) of two square crops of side 64..128 px at 64 px.
`shards/NNN.json`: four captions per picture. A shard that is there only gets latents that it lacks; `--vae` says
whose they are.
"""

import argparse
import colorsys
import io
import json
import os
import random
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from brush import COLOURS
from catalogue import BACKGROUND_NAMES, CLASS_NAMES, TRAINING_VENDORS, caption, is_thing, training_icons
from class_shapes import OF_CLASSES
from compose import Pose, compose, shift_hue
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from settings import ASSETS, IMAGE_SIZE, add_common_arguments, to_signed, write_json
from shapes import OTHERS, shape_svg
from sprites import load_icon_set, render_sprite


SHARD = 1000
SPRITE = 224
CAPTIONS = 4
KINDS = ("icon", "recoloured icon", "any icon", "shapes")
SHARES = (0.34, 0.16, 0.25, 0.25)


def colour_word(sprite: np.ndarray) -> str:
    """The word of `COLOURS` for the most common colour of a sprite uint8 RGBA (H, W, 4)."""
    pixels = sprite[::4, ::4].reshape(-1, 4)
    votes: dict[str, int] = {}
    for red, green, blue in (pixels[pixels[:, 3] > 160][:, :3] / 255.0).tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        if value < 0.24:
            word = "black"
        elif saturation < 0.14:
            word = "white" if value > 0.86 else "grey"
        else:
            degrees = 360 * hue
            word = min(
                (name for name in COLOURS if name not in ("black", "white", "grey", "brown")),
                key=lambda name: min(abs(degrees - COLOURS[name][0]), 360 - abs(degrees - COLOURS[name][0])),
            )
            if word in ("orange", "red", "yellow") and value < 0.62 and degrees > 12:
                word = "brown"
        votes[word] = votes.get(word, 0) + 1
    return max(votes, key=lambda word: (votes[word], word)) if votes else "grey"


def recoloured(rng: np.random.Generator, sprite: np.ndarray) -> np.ndarray:
    """The sprite with its hues turned by 50 to 310 degrees."""
    rgb = shift_hue(sprite[..., :3].astype(np.float32), rng.uniform(50, 310))
    return np.concatenate([np.clip(rgb, 0, 255).astype(np.uint8), sprite[..., 3:]], axis=2)


def shape_sprite(rng: np.random.Generator, noun: str) -> tuple[np.ndarray, str]:
    """A drawing of `shapes.py` as a sprite uint8 RGBA (224, 224, 4), and its colour's word."""
    svg, colour = shape_svg(rng, noun)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE, height=SPRITE)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA")), colour


class Painter:
    """Draws training pictures; keeps the class icons' sprites."""

    def __init__(self, icons: Path) -> None:
        self.icons = icons
        self.by_class: dict[str, list[np.ndarray]] = {name: [] for name in CLASS_NAMES}
        for icon in training_icons():
            self.by_class[icon.class_name].append(render_sprite(icons, icon.vendor, icon.name, SPRITE))
        self.any_icons = [
            (vendor, name)
            for vendor in TRAINING_VENDORS
            for name in sorted(load_icon_set(icons, vendor)["icons"])
            if is_thing(name)
        ]

    def sprite(self, rng: np.random.Generator) -> tuple[int, str | None, np.ndarray, str, str | None, Pose]:
        """Kind, class (or none), sprite, noun, colour word (or none) and pose of one picture."""
        kind = int(rng.choice(len(KINDS), p=SHARES))
        if kind < 2:
            noun = CLASS_NAMES[int(rng.integers(len(CLASS_NAMES)))]
            drawings = self.by_class[noun]
            sprite = drawings[int(rng.integers(len(drawings)))]
            if kind == 0:
                return kind, noun, sprite, noun, colour_word(sprite) if rng.random() < 0.15 else None, Pose()
            sprite = recoloured(rng, sprite)
            return kind, noun, sprite, noun, colour_word(sprite) if rng.random() < 0.9 else None, Pose()
        if kind == 2:
            while True:
                try:
                    vendor, name = self.any_icons[int(rng.integers(len(self.any_icons)))]
                    sprite = render_sprite.__wrapped__(self.icons, vendor, name, SPRITE)
                    break
                except ValueError:
                    continue
            sprite = recoloured(rng, sprite) if rng.random() < 0.4 else sprite
            return kind, None, sprite, "object", colour_word(sprite) if rng.random() < 0.3 else None, Pose()
        of_class = rng.random() < 0.5
        noun = str(rng.choice(list(OF_CLASSES if of_class else OTHERS)))
        sprite, colour = shape_sprite(rng, noun)
        spoken = noun if of_class or (noun != "pile" and rng.random() < 0.5) else "object"
        return kind, noun if of_class else None, sprite, spoken, colour if rng.random() < 0.7 else None, Pose()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Signed pictures (B, 3, H, W) to normalised latents bf16 (B, 8, H / 4, W / 4)."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(16)])
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).bfloat16().contiguous()


def resized(pictures: torch.Tensor, factor: float) -> torch.Tensor:
    """Signed pictures (B, 3, S, S) at another size."""
    return F.interpolate(pictures, scale_factor=factor, mode="bicubic", antialias=True).clamp(-1, 1)


def replace(tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Writes a shard so that a reader never sees half of it."""
    save_file(tensors, target.with_suffix(".part"))
    os.replace(target.with_suffix(".part"), target)


def random_patch(rng: np.random.Generator, picture: torch.Tensor) -> torch.Tensor:
    """A random square crop of a signed picture (3, S, S), of side S / 2 to S, resized to (3, S / 2, S / 2)."""
    full = picture.shape[-1]
    side = int(rng.integers(full // 2, full + 1))
    y, x = rng.integers(0, full - side + 1, 2)
    crop = picture[None, :, y : y + side, x : x + side]
    return F.interpolate(crop, (full // 2, full // 2), mode="bicubic", antialias=True).clamp(-1, 1)[0]


def make_shard(icons: Path, vae_folder: Path, folder: Path, seed: int, number: int) -> None:
    """Writes one shard of `SHARD` pictures."""
    target = folder / f"{number:03d}.safetensors"
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(vae_folder).float().eval()
    if target.exists():
        tensors = load_file(target)
        if "middle" not in tensors:
            tensors["middle"] = encode(vae, resized(to_signed(tensors["images"]), 0.75))
            replace(tensors, target)
        return
    rng, words, painter = np.random.default_rng((seed, number)), random.Random(seed * 100003 + number), Painter(icons)
    images, classes, backgrounds, kinds, captions = [], [], [], [], []
    for _ in range(SHARD):
        kind, class_name, sprite, noun, colour, pose = painter.sprite(rng)
        background = int(rng.integers(len(BACKGROUND_NAMES)))
        images.append(compose(rng, [sprite], BACKGROUND_NAMES[background], IMAGE_SIZE, pose))
        kinds.append(kind)
        classes.append(-1 if class_name is None else CLASS_NAMES.index(class_name))
        backgrounds.append(background)
        captions.append([caption(words, noun, BACKGROUND_NAMES[background], colour) for _ in range(CAPTIONS)])
    tensor = torch.from_numpy(np.stack(images))
    pictures = to_signed(tensor).contiguous()
    patches = torch.stack([random_patch(rng, picture) for picture in pictures for _ in range(2)])
    tensors = {
        "images": tensor,
        "class": torch.tensor(classes),
        "background": torch.tensor(backgrounds),
        "kind": torch.tensor(kinds),
        "full": encode(vae, pictures),
        "middle": encode(vae, resized(pictures, 0.75)),
        "half": encode(vae, resized(pictures, 0.5)),
        "patch": encode(vae, patches).unflatten(0, (-1, 2)),
    }
    write_json(folder / f"{number:03d}.json", captions)
    replace(tensors, target)
    print(f"shard {number}: {json.dumps(captions[0])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--shards", type=int, default=24, help="of 1,000 pictures")
    parser.add_argument("--vae", type=Path, default=ASSETS / "micro_flux" / "vae")
    args = parser.parse_args()
    folder = args.work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(args.threads) as pool:
        pool.map(partial(make_shard, args.icons, args.vae, folder, args.seed), range(args.shards), chunksize=1)


if __name__ == "__main__":
    main()
