# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Colours and style of a drawing, and the marks that it is made of: each is the text of SVG elements."""

import colorsys
import math

import numpy as np


# Word of a caption -> (hue in degrees, its spread, saturation range, value range).
COLOURS = {
    "red": (0, 8, (0.7, 0.95), (0.7, 0.95)),
    "orange": (26, 7, (0.8, 1.0), (0.85, 1.0)),
    "yellow": (48, 6, (0.7, 0.95), (0.88, 1.0)),
    "green": (120, 25, (0.5, 0.85), (0.5, 0.8)),
    "teal": (178, 8, (0.6, 0.95), (0.5, 0.8)),
    "blue": (215, 14, (0.6, 0.95), (0.65, 0.95)),
    "purple": (276, 14, (0.45, 0.8), (0.5, 0.85)),
    "pink": (335, 10, (0.35, 0.6), (0.88, 1.0)),
    "brown": (24, 6, (0.55, 0.75), (0.35, 0.58)),
    "black": (220, 30, (0.1, 0.3), (0.12, 0.22)),
    "white": (50, 30, (0.0, 0.06), (0.93, 1.0)),
    "grey": (210, 30, (0.03, 0.12), (0.5, 0.72)),
}


def rgb_of(rng: np.random.Generator, word: str) -> tuple[int, int, int]:
    """A random shade of a named colour, 0..255."""
    hue, spread, saturation, value = COLOURS[word]
    angle = (hue + rng.uniform(-spread, spread)) % 360 / 360
    red, green, blue = colorsys.hsv_to_rgb(angle, rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * red), round(255 * green), round(255 * blue)


def _hex(rgb: tuple[int, ...], light: float = 1.0) -> str:
    return "#" + "".join(f"{max(0, min(255, round(value * light))):02x}" for value in rgb)


class Brush:
    """Colours and style of one drawing: `word` names the colour of the main part.

    `main`, `second` and `third` are fills (shaded in half of the drawings), `line` is the outline's attributes (empty
    in most), `dark` a darker shade of the main colour and `ink` nearly black.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        words = [str(word) for word in rng.permutation(list(COLOURS))[:3]]
        colours = [rgb_of(rng, word) for word in words]
        shaded = rng.random() < 0.5
        self.word = words[0]
        self.main, self.second, self.third = (
            f"url(#g{i})" if shaded else _hex(colour) for i, colour in enumerate(colours)
        )
        self.dark, self.ink = _hex(colours[0], 0.6), "#23242b"
        self.line = f'stroke="{self.dark}" stroke-width="2.6" stroke-linejoin="round"' if rng.random() < 0.35 else ""
        self.definitions = "".join(
            f'<radialGradient id="g{i}" cx="0.36" cy="0.3" r="0.85"><stop offset="0" stop-color="{_hex(colour, 1.25)}"'
            f'/><stop offset="0.55" stop-color="{_hex(colour)}"/><stop offset="1" stop-color="{_hex(colour, 0.66)}"/>'
            "</radialGradient>"
            for i, colour in enumerate(colours)
        )

    def u(self, low: float, high: float) -> float:
        """A uniform number."""
        return float(self.rng.uniform(low, high))

    def one_of(self, *choices):
        """One of the choices."""
        return choices[int(self.rng.integers(len(choices)))]


def circle(x: float, y: float, radius: float, fill: str, more: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" {more}/>'


def ellipse(x: float, y: float, rx: float, ry: float, fill: str, more: str = "") -> str:
    return f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="{fill}" {more}/>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, corner: float = 0, more: str = "") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{corner:.1f}" fill="{fill}" '
        f"{more}/>"
    )


def polygon(points: list[tuple[float, float]], fill: str, more: str = "") -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="{fill}" {more}/>'


def path(commands: str, fill: str, more: str = "") -> str:
    return f'<path d="{commands}" fill="{fill}" {more}/>'


def curve(commands: str, colour: str, width: float) -> str:
    return f'<path d="{commands}" fill="none" stroke="{colour}" stroke-width="{width:.1f}" stroke-linecap="round"/>'


def star_at(x: float, y: float, radius: float, fill: str, points: int = 5, inner: float = 0.42, more: str = "") -> str:
    corners = []
    for i in range(2 * points):
        length, angle = radius * (inner if i % 2 else 1), math.pi * i / points
        corners.append((x + length * math.sin(angle), y - length * math.cos(angle)))
    return polygon(corners, fill, more)


def heart_at(x: float, y: float, size: float, fill: str, more: str = "") -> str:
    s = size
    commands = (
        f"M{x:.1f},{y + 0.9 * s:.1f} C{x - 1.5 * s:.1f},{y - 0.1 * s:.1f} {x - 0.9 * s:.1f},{y - 1.15 * s:.1f} "
        f"{x:.1f},{y - 0.4 * s:.1f} C{x + 0.9 * s:.1f},{y - 1.15 * s:.1f} {x + 1.5 * s:.1f},{y - 0.1 * s:.1f} "
        f"{x:.1f},{y + 0.9 * s:.1f} Z"
    )
    return path(commands, fill, more)


def badge_at(b: Brush, x: float, y: float, size: float, fill: str, always: bool = False) -> str:
    """A small mark on a body: star, heart, dot, square, ring, or nothing."""
    kinds = ("star", "heart", "dot", "square", "ring") + (() if always else ("none", "none"))
    kind = b.one_of(*kinds)
    if kind == "star":
        return star_at(x, y, size, fill)
    if kind == "heart":
        return heart_at(x, y, 0.75 * size, fill)
    if kind == "dot":
        return circle(x, y, 0.75 * size, fill)
    if kind == "square":
        return rectangle(x - 0.7 * size, y - 0.7 * size, 1.4 * size, 1.4 * size, fill, 2)
    if kind == "ring":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{0.7 * size:.1f}" fill="none" stroke="{fill}" stroke-width="4"/>'
    return ""


def face_at(b: Brush, x: float, y: float, size: float) -> str:
    """Two eyes and a mouth."""
    gap, eye = 0.42 * size, 0.13 * size
    white = b.rng.random() < 0.4
    eyes = "".join(
        (circle(x + side * gap, y, 1.7 * eye, "#ffffff") if white else "") + circle(x + side * gap, y, eye, b.ink)
        for side in (-1, 1)
    )
    low, width = y + 0.5 * size, 0.3 * size
    return eyes + curve(
        f"M{x - width:.1f},{low:.1f} Q{x:.1f},{low + 0.3 * size:.1f} {x + width:.1f},{low:.1f}", b.ink, 0.08 * size
    )
