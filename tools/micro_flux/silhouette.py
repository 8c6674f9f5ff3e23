# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""A shape measure that no colour can pass: the object's silhouette against the drawings of every class.

A small network, trained here on any icon of the training vendors, cuts the object out of a 64 px picture. The
silhouette is moved and scaled to fill a square and compared (intersection over union) with the silhouettes of the
training drawings of all classes. A picture's shape is right if a drawing of its own class agrees best.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from catalogue import CLASS_NAMES, TRAINING_VENDORS, training_icons
from data import shape_sprite
from encoder import background_bank, load_sprites, place
from PIL import Image
from safetensors.torch import load_file, save_file
from settings import add_common_arguments
from sprites import render_sprite
from torch import nn


SIDE = 64
SQUARE = 40
ANGLES = (-8, -4, 0, 4, 8)


class Cutter(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] to logits (B, 1, 64, 64) of the object."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width, 4 * width)
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1),
                nn.ReLU(),
            )
            for i, (a, b) in enumerate(zip((3, *widths), widths))
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a + b, b, 3, padding=1), nn.ReLU()) for a, b in zip(widths[:0:-1], widths[-2::-1])
        )
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = []
        for stage in self.down:
            x = stage(x)
            features.append(x)
        x = x + x.mean((2, 3), keepdim=True)
        for stage, skip in zip(self.up, features[-2::-1]):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1))
        return self.head(x)


def train_cutter(sprites: torch.Tensor, scenes: torch.Tensor, minutes: float, seed: int = 0) -> Cutter:
    """Trains a cutter on sprites uint8 (I, 80, 80, 4) in random poses on backgrounds, for a processor time."""
    torch.manual_seed(seed)
    cutter = Cutter()
    optimizer = torch.optim.AdamW(cutter.parameters(), lr=3e-3, weight_decay=1e-4)
    start, step, last_print = time.process_time(), 0, 0.0
    while (done := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-5
        chosen = sprites[torch.randint(len(sprites), (48,))]
        images, cover = place(chosen, scenes[torch.randint(len(scenes), (48,))], with_cover=True)
        loss = F.binary_cross_entropy_with_logits(cutter(images), cover)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if time.process_time() - last_print > 30:
            last_print = time.process_time()
            print(f"cutter minutes {done * minutes:.1f} step {step} loss {loss.item():.4f}", flush=True)
    return cutter.eval()


def load_cutter(args: argparse.Namespace) -> Cutter:
    """The cutter of a work folder, trained if it is not there."""
    file = args.work / "cutter.safetensors"
    if not file.exists():
        sprites = load_sprites(args.icons, args.work, "sprites_training", TRAINING_VENDORS, args.threads)
        cutter = train_cutter(sprites, background_bank(args.seed, 1000), args.cutter_minutes, args.seed)
        save_file(cutter.state_dict(), file)
    cutter = Cutter()
    cutter.load_state_dict(load_file(file))
    return cutter.eval()


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a boolean mask (H, W)."""
    labels, best, count = np.zeros(mask.shape, int), 0, 0
    for y, x in zip(*np.nonzero(mask)):
        if labels[y, x]:
            continue
        count += 1
        labels[y, x], stack, size = count, [(y, x)], 0
        while stack:
            row, column = stack.pop()
            size += 1
            for next_y, next_x in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                inside = 0 <= next_y < mask.shape[0] and 0 <= next_x < mask.shape[1]
                if inside and mask[next_y, next_x] and not labels[next_y, next_x]:
                    labels[next_y, next_x] = count
                    stack.append((next_y, next_x))
        if size > best:
            best, keep = size, count
    return labels == keep if count else mask


def normalised(mask: np.ndarray) -> np.ndarray:
    """A boolean mask (H, W) whose box fills (40, 40) along its longer side, centred."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    canvas = Image.new("L", (SQUARE, SQUARE))
    if len(rows):
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        scale = SQUARE / max(box.shape)
        size = (max(1, round(box.shape[1] * scale)), max(1, round(box.shape[0] * scale)))
        image = Image.fromarray((255 * box).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
        canvas.paste(image, ((SQUARE - size[0]) // 2, (SQUARE - size[1]) // 2))
    return np.asarray(canvas) > 127


@torch.no_grad()
def silhouettes(cutter: Cutter, images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) in [-1, 1] to normalised silhouettes of their largest object, float (B, 1600)."""
    masks = torch.cat([cutter(part) for part in images.split(64)])[:, 0] > 0
    return torch.stack([torch.from_numpy(normalised(largest_part(mask.numpy()))).flatten().float() for mask in masks])


class Shapes:
    """The silhouettes of the training drawings: every icon of a class and `per_class` drawings of `shapes.py`.

    Each is there in both flips and turned by a few degrees, as training shows it.
    """

    def __init__(self, icons: Path, per_class: int = 12) -> None:
        rng = np.random.default_rng(3)
        sprites = [(icon.class_name, render_sprite(icons, icon.vendor, icon.name)) for icon in training_icons()]
        sprites += [(name, shape_sprite(rng, name)[0]) for name in CLASS_NAMES for _ in range(per_class)]
        rows, self.classes = [], []
        for name, sprite in sprites:
            alpha = Image.fromarray(sprite).getchannel("A").resize((96, 96), Image.Resampling.BOX)
            for flip in (False, True):
                view = alpha.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else alpha
                for angle in ANGLES:
                    turned = view.rotate(angle, Image.Resampling.BILINEAR, expand=True)
                    mask = largest_part(np.asarray(turned) > 127)
                    rows.append(torch.from_numpy(normalised(mask)).flatten().float())
                    self.classes.append(name)
        self.table = torch.stack(rows)

    def agreement(self, shapes: torch.Tensor) -> torch.Tensor:
        """Best intersection over union (B, C) of silhouettes (B, 1600) with the drawings of each class."""
        common = shapes @ self.table.T
        union = shapes.sum(1, keepdim=True) + self.table.sum(1) - common
        values = common / union.clamp_min(1)
        columns = [[i for i, own in enumerate(self.classes) if own == name] for name in CLASS_NAMES]
        return torch.stack([values[:, column].amax(1) for column in columns], dim=1)

    def measure(self, cutter: Cutter, images: torch.Tensor, classes: list[str]) -> dict:
        """Share of pictures (B, 3, 64, 64) whose class agrees best, and the mean agreement with the own class."""
        agreement = self.agreement(silhouettes(cutter, images))
        rows = torch.tensor([CLASS_NAMES.index(name) for name in classes])
        own = agreement[torch.arange(len(rows)), rows]
        right = agreement.argmax(1) == rows
        return {
            "shape_right": round(right.float().mean().item(), 3),
            "agreement": round(own.mean().item(), 3),
            "agreement_below_0.7": round((own < 0.7).float().mean().item(), 3),
            "shape_right_by_class": {
                name: round(right[rows == i].float().mean().item(), 3)
                for i, name in enumerate(CLASS_NAMES)
                if (rows == i).any()
            },
        }


def blobs(images: torch.Tensor, cutter: Cutter) -> torch.Tensor:
    """The control: every object's own pixels, mixed at random inside a disc of the same area.

    The histogram of the picture stays nearly what it was, the shape goes.
    """
    with torch.no_grad():
        masks = torch.cat([cutter(part) for part in images.split(64)])[:, 0] > 0
    generator, result = torch.Generator().manual_seed(0), []
    axis = torch.arange(SIDE, dtype=torch.float32)
    for image, mask in zip(images, masks):
        count = int(mask.sum())
        y, x = (axis[:, None] * mask).sum() / max(1, count), (axis[None] * mask).sum() / max(1, count)
        distance = (axis[:, None] - y).square() + (axis[None] - x).square()
        disc = torch.zeros(SIDE * SIDE, dtype=torch.bool)
        disc[distance.flatten().argsort()[:count]] = True
        pixels, picture = image.flatten(1)[:, mask.flatten()], image.flatten(1).clone()
        around = image.flatten(1)[:, ~(mask.flatten() | disc)]
        picture[:, mask.flatten()] = around[:, torch.randint(around.shape[1], (count,), generator=generator)]
        order = pixels.sum(0).argsort()
        picture[:, disc.nonzero()[:, 0]] = pixels[:, order]
        result.append(picture.view_as(image))
    return torch.stack(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--cutter_minutes", type=float, default=4.0, help="processor time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cutter, shapes = load_cutter(args), Shapes(args.icons)
    shard = load_file(sorted((args.work / "shards").glob("*.safetensors"))[0])
    rows = ((shard["kind"] == 0) | (shard["kind"] == 3)) & (shard["class"] >= 0)
    images = shard["images"][rows][:300].permute(0, 3, 1, 2).float() / 127.5 - 1
    images = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
    classes = [CLASS_NAMES[i] for i in shard["class"][rows][:300].tolist()]
    print("training pictures:", shapes.measure(cutter, images, classes))
    print("the same as blobs:", shapes.measure(cutter, blobs(images, cutter), classes))


if __name__ == "__main__":
    main()
