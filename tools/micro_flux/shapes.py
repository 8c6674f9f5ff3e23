# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Simple objects drawn with a few shapes in random colours: they teach the model to draw more than its icons.

Every drawing function returns the body of an SVG picture of 100 x 100 units.
"""

import colorsys
import math
from collections.abc import Callable

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


def _circle(x: float, y: float, radius: float, fill: str, more: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" {more}/>'


def _ellipse(x: float, y: float, rx: float, ry: float, fill: str, more: str = "") -> str:
    return f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="{fill}" {more}/>'


def _box(x: float, y: float, width: float, height: float, fill: str, corner: float = 0, more: str = "") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{corner:.1f}" fill="{fill}" '
        f"{more}/>"
    )


def _polygon(points: list[tuple[float, float]], fill: str, more: str = "") -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="{fill}" {more}/>'


def _path(commands: str, fill: str, more: str = "") -> str:
    return f'<path d="{commands}" fill="{fill}" {more}/>'


def _curve(commands: str, colour: str, width: float) -> str:
    return f'<path d="{commands}" fill="none" stroke="{colour}" stroke-width="{width:.1f}" stroke-linecap="round"/>'


def _star(x: float, y: float, radius: float, fill: str, points: int = 5, inner: float = 0.42, more: str = "") -> str:
    corners = []
    for i in range(2 * points):
        length, angle = radius * (inner if i % 2 else 1), math.pi * i / points
        corners.append((x + length * math.sin(angle), y - length * math.cos(angle)))
    return _polygon(corners, fill, more)


def _heart(x: float, y: float, size: float, fill: str, more: str = "") -> str:
    s = size
    commands = (
        f"M{x:.1f},{y + 0.9 * s:.1f} C{x - 1.5 * s:.1f},{y - 0.1 * s:.1f} {x - 0.9 * s:.1f},{y - 1.15 * s:.1f} "
        f"{x:.1f},{y - 0.4 * s:.1f} C{x + 0.9 * s:.1f},{y - 1.15 * s:.1f} {x + 1.5 * s:.1f},{y - 0.1 * s:.1f} "
        f"{x:.1f},{y + 0.9 * s:.1f} Z"
    )
    return _path(commands, fill, more)


def _badge(b: Brush, x: float, y: float, size: float, fill: str, always: bool = False) -> str:
    """A small mark on a body: star, heart, dot, square, ring, or nothing."""
    kinds = ("star", "heart", "dot", "square", "ring") + (() if always else ("none", "none"))
    kind = b.one_of(*kinds)
    if kind == "star":
        return _star(x, y, size, fill)
    if kind == "heart":
        return _heart(x, y, 0.75 * size, fill)
    if kind == "dot":
        return _circle(x, y, 0.75 * size, fill)
    if kind == "square":
        return _box(x - 0.7 * size, y - 0.7 * size, 1.4 * size, 1.4 * size, fill, 2)
    if kind == "ring":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{0.7 * size:.1f}" fill="none" stroke="{fill}" stroke-width="4"/>'
    return ""


def _face(b: Brush, x: float, y: float, size: float) -> str:
    """Two eyes and a mouth."""
    gap, eye = 0.42 * size, 0.13 * size
    white = b.rng.random() < 0.4
    eyes = "".join(
        (_circle(x + side * gap, y, 1.7 * eye, "#ffffff") if white else "") + _circle(x + side * gap, y, eye, b.ink)
        for side in (-1, 1)
    )
    low, width = y + 0.5 * size, 0.3 * size
    return eyes + _curve(
        f"M{x - width:.1f},{low:.1f} Q{x:.1f},{low + 0.3 * size:.1f} {x + width:.1f},{low:.1f}", b.ink, 0.08 * size
    )


def mug(b: Brush) -> str:
    """A cup with a handle, a rim and often a mark or stripes."""
    left, right, top, bottom = b.u(12, 22), b.u(62, 74), b.u(18, 34), b.u(80, 92)
    lean, corner = b.u(0, 8), b.u(3, 14)
    middle, handle = (top + bottom) / 2, b.one_of(b.main, b.second, b.third)
    handle = handle if not handle.startswith("url") else b.one_of(b.dark, b.third)
    reach = b.u(16, 24)
    parts = [
        _curve(
            f"M{right - 3:.1f},{middle - 17:.1f} C{right + reach:.1f},{middle - 20:.1f} {right + reach:.1f},"
            f"{middle + 18:.1f} {right - 5:.1f},{middle + 16:.1f}",
            handle,
            b.u(6, 10),
        ),
        _path(
            f"M{left:.1f},{top:.1f} L{right:.1f},{top:.1f} L{right - lean:.1f},{bottom - corner:.1f} "
            f"Q{right - lean:.1f},{bottom:.1f} {right - lean - corner:.1f},{bottom:.1f} "
            f"L{left + lean + corner:.1f},{bottom:.1f} Q{left + lean:.1f},{bottom:.1f} "
            f"{left + lean:.1f},{bottom - corner:.1f} Z",
            b.main,
            b.line,
        ),
    ]
    centre = (left + right) / 2
    if b.rng.random() < 0.7:
        inside = b.one_of(b.dark, "#5a3a24", "#f4f1ea", b.second)
        parts.append(_ellipse(centre, top, (right - left) / 2, b.u(3, 7), inside, b.line))
    if b.rng.random() < 0.25:
        parts.append(_box(left + 2, middle - 5, right - left - 4, b.u(7, 14), b.second))
    else:
        parts.append(_badge(b, centre, middle + 3, b.u(9, 15), b.second))
    if b.rng.random() < 0.2:
        for shift in (-10, 8):
            x = centre + shift
            parts.append(_curve(f"M{x},{top - 5:.1f} q-5,-5 0,-9 q5,-4 0,-8", "#e8ecef", 3))
    return "".join(parts)


def clock(b: Brush) -> str:
    """A round face with hands; often with bells and feet."""
    radius = b.u(32, 42)
    alarm = b.rng.random() < 0.6
    x, y = 50.0, 56.0 if alarm else 50.0
    parts = []
    if alarm:
        radius = min(radius, 36)
        for side in (-1, 1):
            parts.append(_curve(f"M{x + side * 20},{y + 24} L{x + side * 28},{y + radius + 6:.1f}", b.dark, b.u(5, 8)))
            parts.append(_circle(x + side * radius * 0.68, y - radius * 0.86, b.u(10, 14), b.second, b.line))
    square = not alarm and b.rng.random() < 0.25
    face = b.one_of("#fbf7ec", "#ffffff", b.third)
    if square:
        parts.append(_box(x - radius, y - radius, 2 * radius, 2 * radius, b.main, b.u(2, 14), b.line))
    else:
        parts.append(_circle(x, y, radius, b.main, b.line))
    rim = radius * b.u(0.72, 0.86)
    parts.append(_circle(x, y, rim, face))
    for i in range(12):
        angle = math.pi * i / 6
        if i % 3 == 0 or b.main.startswith("url"):
            parts.append(_circle(x + 0.84 * rim * math.sin(angle), y - 0.84 * rim * math.cos(angle), 1.8, b.ink))
    hand = b.one_of(b.ink, b.dark)
    for length, width in ((0.48, 4.2), (0.72, 3.2)):
        angle = b.u(0, 2 * math.pi)
        tip_x, tip_y = x + length * rim * math.sin(angle), y - length * rim * math.cos(angle)
        parts.append(_curve(f"M{x},{y} L{tip_x:.1f},{tip_y:.1f}", hand, width))
    parts.append(_circle(x, y, 3.4, hand))
    return "".join(parts)


def vase(b: Brush) -> str:
    """A vessel with a random symmetrical profile, sometimes with a flower or stripes."""
    neck, belly, foot = b.u(8, 16), b.u(22, 34), b.u(10, 20)
    rim, top, low = neck + b.u(1, 8), b.u(8, 20), b.u(46, 64)
    c = 50
    commands = (
        f"M{c - rim:.1f},{top:.1f} L{c + rim:.1f},{top:.1f} "
        f"Q{c + neck:.1f},{top + 5:.1f} {c + neck:.1f},{top + 14:.1f} "
        f"C{c + neck:.1f},{top + 26:.1f} {c + belly:.1f},{low - 16:.1f} {c + belly:.1f},{low:.1f} "
        f"C{c + belly:.1f},{low + 16:.1f} {c + foot:.1f},84 {c + foot:.1f},93 L{c - foot:.1f},93 "
        f"C{c - foot:.1f},84 {c - belly:.1f},{low + 16:.1f} {c - belly:.1f},{low:.1f} "
        f"C{c - belly:.1f},{low - 16:.1f} {c - neck:.1f},{top + 26:.1f} {c - neck:.1f},{top + 14:.1f} "
        f"Q{c - neck:.1f},{top + 5:.1f} {c - rim:.1f},{top:.1f} Z"
    )
    parts = []
    if b.rng.random() < 0.4:
        reach = b.u(20, 28)
        for side in (-1, 1):
            parts.append(
                _curve(
                    f"M{c + side * neck:.1f},{top + 9:.1f} C{c + side * (neck + reach):.1f},{top + 4:.1f} "
                    f"{c + side * (neck + reach):.1f},{low - 6:.1f} {c + side * (belly - 4):.1f},{low - 8:.1f}",
                    b.dark,
                    b.u(4, 6),
                )
            )
    parts.append(_path(commands, b.main, b.line))
    if b.rng.random() < 0.6:
        for level in b.one_of((0,), (-9, 9), (0, 12)):
            half = belly * (0.97 if abs(level) < 8 else 0.86)
            parts.append(_box(c - half, low + level - 2.5, 2 * half, b.u(4, 7), b.second))
    else:
        parts.append(_badge(b, c, low, b.u(8, 13), b.second))
    parts.append(_box(c - rim, top - 3, 2 * rim, 5, b.one_of(b.second, b.dark), 2))
    return "".join(parts)


def teapot(b: Brush) -> str:
    """A round body with spout, handle and lid."""
    rx, ry, x, y = b.u(25, 31), b.u(21, 28), 50.0, 60.0
    solid = b.one_of(b.dark, "#6a4a32") if b.main.startswith("url") else b.one_of(b.main, b.dark)
    parts = [
        _curve(
            f"M{x - rx + 3:.1f},{y - 12:.1f} C{x - rx - 22:.1f},{y - 22:.1f} {x - rx - 20:.1f},{y + 20:.1f} "
            f"{x - rx + 6:.1f},{y + 12:.1f}",
            solid,
            b.u(5, 8),
        ),
        _path(
            f"M{x + rx - 8:.1f},{y + 12:.1f} Q{x + rx + 10:.1f},{y + 8:.1f} {x + rx + 8:.1f},{y - 18:.1f} "
            f"L{x + rx + 19:.1f},{y - 22:.1f} Q{x + rx + 16:.1f},{y + 12:.1f} {x + rx - 6:.1f},{y + 20:.1f} Z",
            b.main,
            b.line,
        ),
        _ellipse(x, y, rx, ry, b.main, b.line),
        _box(x - 16, y + ry - 4, 32, 7, b.one_of(b.second, b.dark), 3),
        _path(f"M{x - 18},{y - ry + 6:.1f} Q{x},{y - ry - 14:.1f} {x + 18},{y - ry + 6:.1f} Z", b.second, b.line),
        _circle(x, y - ry - 9, b.u(4, 6), b.one_of(b.second, b.third)),
        _badge(b, x, y + 2, b.u(9, 14), b.third),
    ]
    return "".join(parts)


def robot(b: Brush) -> str:
    """A box head with an antenna, sometimes with a body."""
    parts, whole = [], b.rng.random() < 0.5
    top, height, half = (22.0, 34.0, b.u(20, 25)) if whole else (26.0, b.u(50, 62), b.u(32, 38))
    parts.append(_curve(f"M50,{top:.1f} L50,{top - 11:.1f}", b.dark, 4))
    parts.append(_circle(50, top - 13, b.u(4, 6), b.third))
    for side in (-1, 1):
        parts.append(_box(50 + side * (half + 2) - 4, top + height * 0.35, 8, height * 0.35, b.second, 2))
    parts.append(_box(50 - half, top, 2 * half, height, b.main, b.u(3, 14), b.line))
    eye, gap = height * b.u(0.12, 0.17), half * 0.46
    for side in (-1, 1):
        parts.append(_circle(50 + side * gap, top + 0.38 * height, eye, b.one_of("#ffffff", "#ffe27a", "#bff2ff")))
        parts.append(_circle(50 + side * gap, top + 0.38 * height, eye * 0.5, b.ink))
    parts.append(_box(50 - half * 0.55, top + 0.68 * height, half * 1.1, height * 0.15, b.one_of("#f2f2f2", b.ink), 2))
    if whole:
        low = top + height
        for side in (-1, 1):
            parts.append(_box(50 + side * 27 - 4, low + 6, 8, 22, b.second, 4))
            parts.append(_box(50 + side * 11 - 5, low + 28, 10, 14, b.second, 3))
        parts.append(_box(27, low + 3, 46, 30, b.main, b.u(2, 8), b.line))
        parts.append(_badge(b, 50, low + 18, 8, b.third, always=True))
    return "".join(parts)


def boot(b: Brush) -> str:
    """A high shoe seen from the side."""
    shaft, height = b.u(24, 34), b.u(10, 22)
    parts = [
        _path(
            f"M22,{height:.1f} L{22 + shaft:.1f},{height:.1f} L{22 + shaft:.1f},54 Q66,56 78,64 Q90,70 88,84 L20,84 Z",
            b.main,
            b.line,
        ),
        _box(18, 83, 72, b.u(6, 10), b.one_of(b.second, b.ink, b.dark), 3),
        _box(20, height - 2, shaft + 4, b.u(8, 14), b.second, 3),
    ]
    if b.rng.random() < 0.6:
        for i in range(3):
            y = height + 22 + 9 * i
            parts.append(_curve(f"M{13 + shaft:.1f},{y:.1f} L{21 + shaft:.1f},{y:.1f}", b.third, 3.4))
    else:
        parts.append(_badge(b, 24 + shaft / 2, height + 28, 8, b.third))
    return "".join(parts)


def backpack(b: Brush) -> str:
    """A bag with a front pocket, straps and a handle."""
    half, top = b.u(24, 31), b.u(18, 26)
    parts = [_curve(f"M42,{top + 3:.1f} C42,{top - 14:.1f} 58,{top - 14:.1f} 58,{top + 3:.1f}", b.dark, 4.5)]
    for side in (-1, 1):
        parts.append(_box(50 + side * (half + 3) - 5, 46, 10, 36, b.second, 5))
    parts.append(_box(50 - half, top, 2 * half, 92 - top, b.main, b.u(12, 22), b.line))
    pocket = b.u(54, 60)
    parts.append(_box(50 - half + 7, pocket, 2 * half - 14, 88 - pocket, b.second, b.u(3, 9), b.line))
    parts.append(_curve(f"M{50 - half + 10:.1f},{pocket + 8:.1f} L{50 + half - 10:.1f},{pocket + 8:.1f}", b.dark, 2.6))
    if b.rng.random() < 0.5:
        parts.append(_curve(f"M{50 - half + 6:.1f},{top + 20:.1f} L{50 + half - 6:.1f},{top + 20:.1f}", b.dark, 2.6))
    else:
        parts.append(_badge(b, 50, (top + pocket) / 2 + 2, 8, b.third))
    return "".join(parts)


def _head(b: Brush, ears: list[str], muzzle: str) -> str:
    parts = [*ears, _ellipse(50, 54, b.u(32, 37), b.u(29, 34), b.main, b.line)]
    if b.rng.random() < 0.4:
        parts.append(_ellipse(50 + b.one_of(-15, 15), 44, 12, 12, b.second))
    gap, eye = b.u(13, 17), b.u(4, 5.5)
    parts += [_circle(50 + side * gap, 47, eye, b.ink) for side in (-1, 1)]
    parts += [_circle(50 + side * gap - 1.5, 45.5, 1.5, "#ffffff") for side in (-1, 1)]
    return "".join(parts) + muzzle


def teddy_bear(b: Brush) -> str:
    """A round head with round ears, in half of the drawings with a body."""
    if b.rng.random() < 0.5:
        ears = []
        for side in (-1, 1):
            ears += [_circle(50 + side * 26, 27, 13, b.main, b.line), _circle(50 + side * 26, 27, 7, b.second)]
        muzzle = _ellipse(50, 66, 15, 12, b.one_of("#f3e2c6", b.second)) + _ellipse(50, 61, 6, 4, b.ink)
        return _head(b, ears, muzzle + _curve("M50,65 L50,69 M43,71 Q50,77 57,71", b.ink, 2.4))
    parts = []
    for side in (-1, 1):
        parts += [
            _ellipse(50 + side * 24, 60, 10, 14, b.main, b.line),
            _circle(50 + side * 17, 86, 11, b.main, b.line),
            _circle(50 + side * 17, 87, 6, b.second),
            _circle(50 + side * 18, 15, 9, b.main, b.line),
            _circle(50 + side * 18, 15, 5, b.second),
        ]
    parts += [_ellipse(50, 68, 24, 23, b.main, b.line), _ellipse(50, 69, 14, 15, b.second)]
    parts += [_ellipse(50, 30, 23, 20, b.main, b.line), _ellipse(50, 37, 10, 8, "#f3e2c6")]
    parts.append(_ellipse(50, 34, 4, 3, b.ink))
    parts += [_circle(50 + side * 9, 27, 2.8, b.ink) for side in (-1, 1)]
    if b.rng.random() < 0.4:
        parts.append(_polygon([(50, 52), (38, 46), (38, 58), (62, 46), (62, 58)], b.third))
    return "".join(parts)


def dog(b: Brush) -> str:
    """A head with hanging ears, a muzzle and often a tongue."""
    ears = []
    for side in (-1, 1):
        turn = f'transform="rotate({side * b.u(-22, -6):.0f} {50 + side * 31} 42)"'
        ears.append(_ellipse(50 + side * 33, 46, 11, b.u(20, 26), b.one_of(b.second, b.dark), turn))
    muzzle = _ellipse(50, 66, 17, 14, b.one_of("#fbf3e4", b.second, b.main)) + _ellipse(50, 59, 8, 5.5, b.ink)
    if b.rng.random() < 0.5:
        muzzle += _box(45, 72, 10, 14, "#ee7f8d", 5)
    return _head(b, [], "") + "".join(ears) + muzzle


def cat(b: Brush) -> str:
    """A head with pointed ears and whiskers."""
    ears = []
    for side in (-1, 1):
        x = 50 + side * 24
        ears.append(_polygon([(x - side * 14, 32), (x + side * 8, 10), (x + side * 12, 46)], b.main, b.line))
        ears.append(_polygon([(x - side * 5, 30), (x + side * 6, 17), (x + side * 8, 38)], "#f2a3ad"))
    whiskers = "".join(
        _curve(f"M{50 + side * 17},{64 + drop} L{50 + side * 38},{60 + 2 * drop}", b.dark, 1.8)
        for side in (-1, 1)
        for drop in (0, 5)
    )
    muzzle = _ellipse(50, 66, 12, 9, b.one_of("#fbf3e4", b.main, b.second))
    muzzle += _polygon([(45, 60), (55, 60), (50, 65)], b.one_of("#e8828f", b.ink))
    return _head(b, ears, muzzle + whiskers + _curve("M44,69 Q47,73 50,69 Q53,73 56,69", b.ink, 2))


def star(b: Brush) -> str:
    """A star, sometimes with a face."""
    body = _star(50, 52, 46, b.main, b.one_of(5, 5, 5, 6, 8), b.u(0.42, 0.6), b.line)
    return body + (_face(b, 50, 48, 18) if b.rng.random() < 0.4 else _badge(b, 50, 52, 10, b.second))


def ball(b: Brush) -> str:
    """A ball with stripes, a patch or a mark."""
    clip = '<clipPath id="c"><circle cx="50" cy="50" r="44"/></clipPath>'
    marks = b.one_of(
        _box(0, 38, 100, b.u(14, 26), b.second),
        _box(0, 6, 50, 44, b.second) + _box(50, 50, 50, 44, b.second),
        _curve("M14,10 Q50,50 14,90 M86,10 Q50,50 86,90", b.dark, 5),
        _star(50, 50, 24, b.second),
        _circle(50, 50, 18, b.second) + _circle(14, 50, 14, b.second) + _circle(86, 50, 14, b.second),
    )
    return clip + f'<g clip-path="url(#c)">{_circle(50, 50, 44, b.main)}{marks}</g>'


def bottle(b: Brush) -> str:
    """A bottle with a cap and a label."""
    half, shoulder, neck = b.u(16, 23), b.u(34, 46), b.u(6, 9)
    commands = (
        f"M{50 - neck:.1f},14 L{50 + neck:.1f},14 L{50 + neck:.1f},{shoulder - 12:.1f} "
        f"Q{50 + half:.1f},{shoulder - 6:.1f} {50 + half:.1f},{shoulder + 6:.1f} L{50 + half:.1f},90 "
        f"Q{50 + half:.1f},95 {50 + half - 5:.1f},95 L{50 - half + 5:.1f},95 Q{50 - half:.1f},95 {50 - half:.1f},90 "
        f"L{50 - half:.1f},{shoulder + 6:.1f} "
        f"Q{50 - half:.1f},{shoulder - 6:.1f} {50 - neck:.1f},{shoulder - 12:.1f} Z"
    )
    label = _box(50 - half, 54, 2 * half, b.u(16, 26), b.second) + _badge(b, 50, 65, 8, b.third)
    return _path(commands, b.main, b.line) + label + _box(50 - neck - 2, 6, 2 * neck + 4, 11, b.third, 2)


def box(b: Brush) -> str:
    """A gift box with ribbon, or a crate."""
    width, top = b.u(30, 40), b.u(34, 44)
    parts = [_box(50 - width, top, 2 * width, 92 - top, b.main, 3, b.line)]
    if b.rng.random() < 0.6:
        parts.append(_box(50 - width - 4, top - 6, 2 * width + 8, 15, b.main, 3, b.line))
        parts.append(_box(44, top - 6, 12, 98 - top, b.second))
        for side in (-1, 1):
            turn = f'transform="rotate({side * 18} 50 {top})"'
            parts.append(_ellipse(50 + side * 12, top - 13, 12, 7, b.second, turn))
    else:
        for level in (0.33, 0.66):
            y = top + level * (92 - top)
            parts.append(_curve(f"M{50 - width:.1f},{y:.1f} L{50 + width:.1f},{y:.1f}", b.dark, 3))
        parts.append(_badge(b, 50, (top + 92) / 2, 14, b.second, always=True))
    return "".join(parts)


def house(b: Brush) -> str:
    """A house with a roof, a door and a window."""
    half, eave = b.u(28, 36), b.u(42, 52)
    parts = [
        _box(66, 16, 9, 26, b.third) if b.rng.random() < 0.6 else "",
        _box(50 - half, eave - 1, 2 * half, 94 - eave, b.main, 1, b.line),
        _polygon([(50 - half - 8, eave), (50, b.u(8, 18)), (50 + half + 8, eave)], b.second, b.line),
        _box(43, 70, 15, 23, b.third, 1),
        _box(50 - half + 6, eave + 9, 13, 13, "#cfeaff", 1),
        _box(50 + half - 19, eave + 9, 13, 13, "#cfeaff", 1),
    ]
    return "".join(parts)


def car(b: Brush) -> str:
    """A car from the side."""
    parts = [
        _path(f"M24,52 L34,{b.u(28, 34):.1f} L{b.u(62, 70):.1f},31 L80,52 Z", b.one_of(b.main, b.second), b.line),
        _polygon([(32, 50), (39, 37), (50, 37), (50, 50)], "#cfeaff"),
        _polygon([(54, 50), (54, 37), (64, 37), (72, 50)], "#cfeaff"),
        _box(8, 49, 85, 23, b.main, b.u(5, 11), b.line),
        _box(8, 60, 85, 5, b.second) if b.rng.random() < 0.4 else "",
        _circle(90, 57, 3.4, "#ffe27a"),
    ]
    for x in (29, 72):
        parts += [_circle(x, 73, 11, b.ink), _circle(x, 73, 5, b.third)]
    return "".join(parts)


def fish(b: Brush) -> str:
    """A fish from the side."""
    parts = [
        _polygon([(74, 50), (95, b.u(26, 34)), (90, 50), (95, b.u(66, 74))], b.second, b.line),
        _polygon([(40, 32), (58, b.u(12, 20)), (62, 34)], b.second),
        _ellipse(44, 50, 37, b.u(20, 28), b.main, b.line),
    ]
    if b.rng.random() < 0.5:
        parts += [_box(x, 34, 6, 32, b.third, 3) for x in (44, 57)]
    else:
        parts.append(_polygon([(46, 52), (60, 60), (48, 66)], b.second))
    return "".join(parts) + _circle(24, 44, 6, "#ffffff") + _circle(23, 44, 3.2, b.ink)


def flower(b: Brush) -> str:
    """Petals around a centre on a stem with leaves."""
    count, petal = b.one_of(5, 6, 8), b.u(10, 13)
    parts = [_curve("M50,40 L50,95", "#3f9a4d", 5)]
    for side in (-1, 1):
        parts.append(_ellipse(50 + side * 13, 76, 13, 6, "#4bae5a", f'transform="rotate({-side * 28} 50 76)"'))
    for i in range(count):
        angle = 2 * math.pi * i / count
        parts.append(_circle(50 + 18 * math.sin(angle), 34 - 18 * math.cos(angle), petal, b.main, b.line))
    face = _face(b, 50, 32, 11) if b.rng.random() < 0.2 else ""
    return "".join(parts) + _circle(50, 34, b.u(9, 12), b.second) + face


def tree(b: Brush) -> str:
    """A tree: round, or a fir of three triangles."""
    trunk = _box(44, 60, 12, 35, "#84573a", 2)
    if b.rng.random() < 0.5:
        crown = "".join(_circle(x, y, b.u(19, 24), b.main, b.line) for x, y in ((34, 46), (66, 46), (50, 28)))
        fruit = [_circle(b.u(28, 72), b.u(22, 56), 4, b.second) for _ in range(5)] if b.rng.random() < 0.5 else []
        return trunk + crown + "".join(fruit)
    return trunk + "".join(
        _polygon([(50 - w, y), (50, y - 34), (50 + w, y)], b.main, b.line) for w, y in ((36, 78), (30, 58), (22, 38))
    )


def lamp(b: Brush) -> str:
    """A table lamp."""
    wide, narrow = b.u(26, 34), b.u(12, 18)
    return "".join(
        [
            _box(47, 46, 6, 38, b.third if not b.third.startswith("url") else b.dark),
            _polygon([(50 - narrow, 10), (50 + narrow, 10), (50 + wide, 50), (50 - wide, 50)], b.main, b.line),
            _badge(b, 50, 33, 9, b.second),
            _ellipse(50, 87, b.u(18, 26), 7, b.second, b.line),
        ]
    )


def hat(b: Brush) -> str:
    """A hat with a brim and a band."""
    half, top = b.u(20, 26), b.u(18, 34)
    return "".join(
        [
            _box(50 - half, top, 2 * half, 76 - top, b.main, b.u(3, 16), b.line),
            _box(50 - half, 60, 2 * half, 11, b.second),
            _ellipse(50, 76, b.u(38, 46), b.u(7, 10), b.main, b.line),
        ]
    )


def book(b: Brush) -> str:
    """A closed book with a mark on its cover."""
    return "".join(
        [
            _box(24, 12, 58, 78, "#f4f0e4", 3),
            _box(20, 10, 56, 78, b.main, 4, b.line),
            _box(20, 10, 10, 78, b.second, 3),
            _badge(b, 54, 48, b.u(12, 18), b.third, always=True),
        ]
    )


def heart(b: Brush) -> str:
    """A heart, sometimes with a face."""
    return _heart(50, 52, 44, b.main, b.line) + (
        _face(b, 50, 42, 22) if b.rng.random() < 0.5 else _badge(b, 50, 46, 13, b.second)
    )


def mushroom(b: Brush) -> str:
    """A cap with spots on a stem."""
    spots = "".join(
        _circle(x, y, b.u(4, 7), b.second) for x, y in ((32, 42), (52, 28), (70, 42), (50, 47)) if b.rng.random() < 0.8
    )
    stem = _path("M38,54 L62,54 L66,90 Q50,97 34,90 Z", b.one_of("#f6efdf", b.third), b.line)
    face = _face(b, 50, 68, 13) if b.rng.random() < 0.4 else ""
    return stem + _path(f"M8,58 C8,{b.u(8, 20):.1f} 92,{b.u(8, 20):.1f} 92,58 Z", b.main, b.line) + spots + face


def balloon(b: Brush) -> str:
    """A balloon on a string."""
    return "".join(
        [
            _curve("M50,70 Q42,80 50,86 Q57,91 50,98", b.ink, 2),
            _polygon([(50, 66), (43, 75), (57, 75)], b.main),
            _ellipse(50, 38, b.u(27, 33), b.u(32, 35), b.main, b.line),
            _ellipse(39, 27, 6, 9, "#ffffff", 'opacity="0.45"'),
            _badge(b, 52, 42, 12, b.second),
        ]
    )


def bird(b: Brush) -> str:
    """A bird from the side."""
    return "".join(
        [
            _polygon([(28, 62), (4, b.u(44, 54)), (8, 72)], b.second),
            _ellipse(48, 60, 30, b.u(22, 27), b.main, b.line),
            _circle(68, 34, b.u(17, 20), b.main, b.line),
            _polygon([(84, 30), (98, 36), (84, 41)], "#f2a02c"),
            _ellipse(44, 60, 18, 12, b.second, f'transform="rotate({b.u(-25, 10):.0f} 44 60)"'),
            _circle(72, 30, 3.6, b.ink),
            _curve("M42,84 L42,95 M54,84 L54,95", "#f2a02c", 3.4),
        ]
    )


def pile(b: Brush) -> str:
    """Two to four plain shapes on top of each other: no thing with a name."""
    fills, parts = [b.main, b.second, b.third, b.main], []
    count, y = int(b.rng.integers(2, 5)), 96.0
    height = 90 / count
    for i in range(count):
        size = height * b.u(0.85, 1.0)
        half, x = size * b.u(0.5, 1.3), 50 + b.u(-6, 6)
        half = min(half, 42)
        parts.append(
            b.one_of(
                _box(x - half, y - size, 2 * half, size, fills[i], b.u(0, 8), b.line),
                _ellipse(x, y - size / 2, half, size / 2, fills[i], b.line),
                _polygon([(x - half, y), (x, y - size), (x + half, y)], fills[i], b.line),
                _star(x, y - size * 0.48, size * 0.56, fills[i], 5, 0.5, b.line),
            )
        )
        y -= size * 0.94
    if b.rng.random() < 0.3:
        parts.append(_face(b, 50, 96 - height * 0.6, min(16, height * 0.4)))
    return "".join(parts)


# Drawings of the model's classes, and of things that only captions call by name half of the time.
OF_CLASSES: dict[str, Callable[[Brush], str]] = {
    "backpack": backpack,
    "teddy bear": teddy_bear,
    "dog": dog,
    "cat": cat,
    "clock": clock,
    "teapot": teapot,
    "robot": robot,
    "vase": vase,
    "mug": mug,
    "boot": boot,
}
OTHERS: dict[str, Callable[[Brush], str]] = {
    function.__name__: function
    for function in (
        star, ball, bottle, box, house, car, fish, flower, tree, lamp, hat, book, heart, mushroom, balloon, bird, pile
    )
}  # fmt: skip


def shape_svg(rng: np.random.Generator, noun: str) -> tuple[str, str]:
    """One drawing of `noun` (a key of `OF_CLASSES` or `OTHERS`): its SVG text and the word of its main colour."""
    brush = Brush(rng)
    body = (OF_CLASSES | OTHERS)[noun](brush)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 108 108" width="108" height="108">'
    return f"{head}<defs>{brush.definitions}</defs>{body}</svg>", brush.word
