# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Pictures: an icon in a random pose on a random variation of a named background."""

from dataclasses import dataclass

import numpy as np
from backgrounds import draw_background
from PIL import Image, ImageFilter


@dataclass(frozen=True)
class Pose:
    """Ranges of one picture's draw. `scale` is the share of the picture's side that the object fills."""

    scale: tuple[float, float] = (0.74, 0.95)
    rotation: float = 8.0
    flip: float = 0.5
    hue: float = 8.0
    brightness: float = 0.1


STILL = Pose(scale=(0.7, 0.86), rotation=6.0, flip=0.5, hue=0.0, brightness=0.0)
MINIMUM_CONTRAST = 80.0


def shift_hue(rgb: np.ndarray, degrees: float) -> np.ndarray:
    """Turns RGB float (..., 3) around the grey axis."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    matrix = cos * np.eye(3) + (1 - cos) / 3 + sin * cross
    return rgb @ matrix.T.astype(np.float32)


def _posed(rng: np.random.Generator, sprite: np.ndarray, size: int, pose: Pose) -> Image.Image:
    """The sprite scaled, flipped, turned and tinted, pasted on a clear canvas (RGBA, size x size)."""
    image = Image.fromarray(sprite)
    if rng.random() < pose.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = max(8, round(size * rng.uniform(*pose.scale)))
    image = image.convert("RGBa").resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    image = image.rotate(rng.uniform(-pose.rotation, pose.rotation), Image.Resampling.BICUBIC, expand=True)
    image = image.convert("RGBA")
    pixels = np.asarray(image).astype(np.float32)
    rgb = shift_hue(pixels[..., :3], rng.uniform(-pose.hue, pose.hue)) if pose.hue else pixels[..., :3]
    rgb = rgb * (1 + rng.uniform(-pose.brightness, pose.brightness))
    pixels = np.concatenate([np.clip(rgb, 0, 255), pixels[..., 3:]], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels)
    left, top, right, bottom = image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox()
    image = image.crop((left, top, right, bottom))
    if max(image.size) > size:
        image.thumbnail((size, size), Image.Resampling.BICUBIC)
    room_x, room_y = size - image.width, size - image.height
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, (int(rng.integers(0, room_x + 1)), int(rng.integers(0, room_y + 1))))
    return canvas


def _edge_contrast(canvas: Image.Image, background: np.ndarray) -> float:
    """How far the object's rim differs from the background under it: the 35th percentile of RGB distances."""
    small = canvas.resize((32, 32), Image.Resampling.BOX)
    alpha = small.getchannel("A").point(lambda value: 255 * (value > 160))
    rim = (np.asarray(alpha) > 0) & ~(np.asarray(alpha.filter(ImageFilter.MinFilter(3))) > 0)
    if not rim.any():
        return 0.0
    step = background.shape[0] // 32
    below = background[step // 2 :: step, step // 2 :: step][:32, :32]
    distance = np.linalg.norm(np.asarray(small)[..., :3].astype(np.float32) - below, axis=2)
    return float(np.percentile(distance[rim], 35))


def compose(
    rng: np.random.Generator,
    sprites: list[np.ndarray],
    background: str,
    size: int = 128,
    pose: Pose = Pose(),
    tries: int = 8,
    supersample: int = 1,
) -> np.ndarray:
    """One uint8 RGB picture (size, size, 3) of one of `sprites`, drawn `supersample` times as large and averaged down.

    Where object and background nearly share a colour along the object's rim, sprite, pose and background variation
    are drawn again (at most `tries` times, keeping the best).
    """
    best, best_contrast = None, -1.0
    for _ in range(tries):
        scene = draw_background(rng, supersample * size, background)
        canvas = _posed(rng, sprites[int(rng.integers(len(sprites)))], supersample * size, pose)
        contrast = _edge_contrast(canvas, scene)
        if contrast > best_contrast:
            best, best_contrast = (scene, canvas), contrast
        if contrast >= MINIMUM_CONTRAST:
            break
    scene, canvas = best
    pixels = np.asarray(canvas).astype(np.float32)
    cover = pixels[..., 3:] / 255
    picture = scene * (1 - cover) + pixels[..., :3] * cover
    picture = picture.reshape(size, supersample, size, supersample, 3).mean((1, 3))
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)
