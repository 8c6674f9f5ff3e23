# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Procedural backgrounds: each call draws one variation as float32 RGB (size, size, 3) in 0..255."""

import numpy as np


FLAT_COLOURS = {
    "red": (205, 45, 45),
    "blue": (50, 100, 215),
    "green": (55, 160, 75),
    "yellow": (245, 210, 65),
    "purple": (135, 70, 180),
}


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return axis[None, :, None], axis[:, None, None]


def _mix(first: np.ndarray, second: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return first * (1 - amount) + second * amount


def _colour(rng: np.random.Generator, red: float, green: float, blue: float, spread: float = 10) -> np.ndarray:
    return (np.array([red, green, blue]) + rng.uniform(-spread, spread, 3)).astype(np.float32)


def _vertical(size: int, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.broadcast_to(_mix(top, bottom, _grid(size)[1]), (size, size, 3)).copy()


def _spots(
    image: np.ndarray, rng: np.random.Generator, count: int, radius: tuple[float, float], colour: np.ndarray
) -> None:
    x, y = _grid(image.shape[0])
    for _ in range(count):
        centre_x, centre_y, spot = rng.random(), rng.random(), rng.uniform(*radius)
        distance = np.sqrt((x - centre_x) ** 2 + (y - centre_y) ** 2)
        cover = np.clip((spot - distance) * image.shape[0] + 0.5, 0, 1)
        image[:] = _mix(image, colour, cover)


def flat(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """One colour with a slight gradient in a random direction."""
    x, y = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    return _colour(rng, *FLAT_COLOURS[name], spread=14) * (1 + rng.uniform(0, 0.22) * slope)


def beach(rng: np.random.Generator, size: int) -> np.ndarray:
    """Pale sky, a band of sea and sand."""
    _, y = _grid(size)
    image = _vertical(size, _colour(rng, 140, 200, 240), _colour(rng, 215, 238, 250))
    horizon = rng.uniform(0.3, 0.42)
    shore = horizon + rng.uniform(0.12, 0.2)
    image = _mix(image, _colour(rng, 40, 140, 190), np.clip((y - horizon) * size, 0, 1))
    image = _mix(image, _colour(rng, 235, 210, 150), np.clip((y - shore) * size, 0, 1))
    return image


def snow(rng: np.random.Generator, size: int) -> np.ndarray:
    """Grey-blue air, a white hill and flakes."""
    x, y = _grid(size)
    image = _vertical(size, _colour(rng, 150, 170, 195), _colour(rng, 195, 210, 228))
    hill = rng.uniform(0.5, 0.65) + 0.05 * np.sin(2 * np.pi * (x * rng.uniform(0.5, 1.2) + rng.random()))
    image = _mix(image, _colour(rng, 243, 246, 252, 3), np.clip((y - hill) * size, 0, 1))
    _spots(image, rng, int(rng.integers(14, 24)), (0.012, 0.024), np.array([252, 253, 255], np.float32))
    return image


def night(rng: np.random.Generator, size: int) -> np.ndarray:
    """Dark blue sky with stars and a moon."""
    image = _vertical(size, _colour(rng, 12, 14, 42, 6), _colour(rng, 32, 36, 84, 8))
    _spots(image, rng, int(rng.integers(10, 20)), (0.008, 0.016), np.array([235, 235, 215], np.float32))
    if rng.random() < 0.6:
        _spots(image, rng, 1, (0.07, 0.1), np.array([245, 240, 200], np.float32))
    return image


def mountains(rng: np.random.Generator, size: int) -> np.ndarray:
    """Sky, grey peaks with white tops, a green meadow."""
    x, y = _grid(size)
    image = _vertical(size, _colour(rng, 150, 195, 235), _colour(rng, 225, 235, 245))
    for centre in (rng.uniform(0.05, 0.35), rng.uniform(0.65, 0.95), rng.uniform(0.35, 0.65)):
        peak = rng.uniform(0.1, 0.28)
        height = y - peak - np.abs(x - centre) * rng.uniform(1.0, 1.5)
        image = _mix(image, _colour(rng, 105, 112, 130, 9), np.clip(height * size, 0, 1))
        cap = np.clip(height * size, 0, 1) * np.clip((peak + 0.11 - y) * size, 0, 1)
        image = _mix(image, np.array([245, 247, 250], np.float32), cap)
    meadow = rng.uniform(0.68, 0.78)
    return _mix(image, _colour(rng, 95, 150, 75), np.clip((y - meadow) * size, 0, 1))


def bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Rows of brown-red bricks with pale mortar."""
    x, y = _grid(size)
    rows = int(rng.integers(6, 9))
    row = y * rows + rng.random()
    column = x * rows / 2 + 0.5 * (np.floor(row) % 2) + rng.random()
    tone = np.sin(np.floor(row) * 12.9 + np.floor(column) * 78.2) * 16
    brick = _colour(rng, 165, 92, 70) + tone
    mortar = np.clip(np.maximum(0.14 - row % 1, (0.07 - column % 1) * 2) * size / rows, 0, 1)
    return _mix(brick, _colour(rng, 205, 195, 185), mortar)


_SCENES = {"beach": beach, "snow": snow, "night": night, "mountains": mountains, "bricks": bricks}


def draw_background(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """One variation of the named background, float32 (size, size, 3) in 0..255."""
    image = flat(rng, size, name) if name in FLAT_COLOURS else _SCENES[name](rng, size)
    return np.clip(image, 0, 255).astype(np.float32)
