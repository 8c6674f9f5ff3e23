# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Simple objects drawn with a few shapes in random colours: they teach the model to draw more than its icons.

Those of the model's classes are in `class_shapes.py`. Every drawing function returns the body of an SVG picture of
100 x 100 units.
"""

import math
from collections.abc import Callable

import numpy as np
from brush import Brush, badge_at, circle, curve, ellipse, face_at, heart_at, path, polygon, rectangle, star_at
from class_shapes import OF_CLASSES


def star(b: Brush) -> str:
    """A star, sometimes with a face."""
    body = star_at(50, 52, 46, b.main, b.one_of(5, 5, 5, 6, 8), b.u(0.42, 0.6), b.line)
    return body + (face_at(b, 50, 48, 18) if b.rng.random() < 0.4 else badge_at(b, 50, 52, 10, b.second))


def ball(b: Brush) -> str:
    """A ball with stripes, a patch or a mark."""
    clip = '<clipPath id="c"><circle cx="50" cy="50" r="44"/></clipPath>'
    marks = b.one_of(
        rectangle(0, 38, 100, b.u(14, 26), b.second),
        rectangle(0, 6, 50, 44, b.second) + rectangle(50, 50, 50, 44, b.second),
        curve("M14,10 Q50,50 14,90 M86,10 Q50,50 86,90", b.dark, 5),
        star_at(50, 50, 24, b.second),
        circle(50, 50, 18, b.second) + circle(14, 50, 14, b.second) + circle(86, 50, 14, b.second),
    )
    return clip + f'<g clip-path="url(#c)">{circle(50, 50, 44, b.main)}{marks}</g>'


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
    label = rectangle(50 - half, 54, 2 * half, b.u(16, 26), b.second) + badge_at(b, 50, 65, 8, b.third)
    return path(commands, b.main, b.line) + label + rectangle(50 - neck - 2, 6, 2 * neck + 4, 11, b.third, 2)


def box(b: Brush) -> str:
    """A gift box with ribbon, or a crate."""
    width, top = b.u(30, 40), b.u(34, 44)
    parts = [rectangle(50 - width, top, 2 * width, 92 - top, b.main, 3, b.line)]
    if b.rng.random() < 0.6:
        parts.append(rectangle(50 - width - 4, top - 6, 2 * width + 8, 15, b.main, 3, b.line))
        parts.append(rectangle(44, top - 6, 12, 98 - top, b.second))
        for side in (-1, 1):
            turn = f'transform="rotate({side * 18} 50 {top})"'
            parts.append(ellipse(50 + side * 12, top - 13, 12, 7, b.second, turn))
    else:
        for level in (0.33, 0.66):
            y = top + level * (92 - top)
            parts.append(curve(f"M{50 - width:.1f},{y:.1f} L{50 + width:.1f},{y:.1f}", b.dark, 3))
        parts.append(badge_at(b, 50, (top + 92) / 2, 14, b.second, always=True))
    return "".join(parts)


def house(b: Brush) -> str:
    """A house with a roof, a door and a window."""
    half, eave = b.u(28, 36), b.u(42, 52)
    parts = [
        rectangle(66, 16, 9, 26, b.third) if b.rng.random() < 0.6 else "",
        rectangle(50 - half, eave - 1, 2 * half, 94 - eave, b.main, 1, b.line),
        polygon([(50 - half - 8, eave), (50, b.u(8, 18)), (50 + half + 8, eave)], b.second, b.line),
        rectangle(43, 70, 15, 23, b.third, 1),
        rectangle(50 - half + 6, eave + 9, 13, 13, "#cfeaff", 1),
        rectangle(50 + half - 19, eave + 9, 13, 13, "#cfeaff", 1),
    ]
    return "".join(parts)


def car(b: Brush) -> str:
    """A car from the side."""
    parts = [
        path(f"M24,52 L34,{b.u(28, 34):.1f} L{b.u(62, 70):.1f},31 L80,52 Z", b.one_of(b.main, b.second), b.line),
        polygon([(32, 50), (39, 37), (50, 37), (50, 50)], "#cfeaff"),
        polygon([(54, 50), (54, 37), (64, 37), (72, 50)], "#cfeaff"),
        rectangle(8, 49, 85, 23, b.main, b.u(5, 11), b.line),
        rectangle(8, 60, 85, 5, b.second) if b.rng.random() < 0.4 else "",
        circle(90, 57, 3.4, "#ffe27a"),
    ]
    for x in (29, 72):
        parts += [circle(x, 73, 11, b.ink), circle(x, 73, 5, b.third)]
    return "".join(parts)


def fish(b: Brush) -> str:
    """A fish from the side."""
    parts = [
        polygon([(74, 50), (95, b.u(26, 34)), (90, 50), (95, b.u(66, 74))], b.second, b.line),
        polygon([(40, 32), (58, b.u(12, 20)), (62, 34)], b.second),
        ellipse(44, 50, 37, b.u(20, 28), b.main, b.line),
    ]
    if b.rng.random() < 0.5:
        parts += [rectangle(x, 34, 6, 32, b.third, 3) for x in (44, 57)]
    else:
        parts.append(polygon([(46, 52), (60, 60), (48, 66)], b.second))
    return "".join(parts) + circle(24, 44, 6, "#ffffff") + circle(23, 44, 3.2, b.ink)


def flower(b: Brush) -> str:
    """Petals around a centre on a stem with leaves."""
    count, petal = b.one_of(5, 6, 8), b.u(10, 13)
    parts = [curve("M50,40 L50,95", "#3f9a4d", 5)]
    for side in (-1, 1):
        parts.append(ellipse(50 + side * 13, 76, 13, 6, "#4bae5a", f'transform="rotate({-side * 28} 50 76)"'))
    for i in range(count):
        angle = 2 * math.pi * i / count
        parts.append(circle(50 + 18 * math.sin(angle), 34 - 18 * math.cos(angle), petal, b.main, b.line))
    face = face_at(b, 50, 32, 11) if b.rng.random() < 0.2 else ""
    return "".join(parts) + circle(50, 34, b.u(9, 12), b.second) + face


def tree(b: Brush) -> str:
    """A tree: round, or a fir of three triangles."""
    trunk = rectangle(44, 60, 12, 35, "#84573a", 2)
    if b.rng.random() < 0.5:
        crown = "".join(circle(x, y, b.u(19, 24), b.main, b.line) for x, y in ((34, 46), (66, 46), (50, 28)))
        fruit = [circle(b.u(28, 72), b.u(22, 56), 4, b.second) for _ in range(5)] if b.rng.random() < 0.5 else []
        return trunk + crown + "".join(fruit)
    return trunk + "".join(
        polygon([(50 - w, y), (50, y - 34), (50 + w, y)], b.main, b.line) for w, y in ((36, 78), (30, 58), (22, 38))
    )


def lamp(b: Brush) -> str:
    """A table lamp."""
    wide, narrow = b.u(26, 34), b.u(12, 18)
    return "".join(
        [
            rectangle(47, 46, 6, 38, b.third if not b.third.startswith("url") else b.dark),
            polygon([(50 - narrow, 10), (50 + narrow, 10), (50 + wide, 50), (50 - wide, 50)], b.main, b.line),
            badge_at(b, 50, 33, 9, b.second),
            ellipse(50, 87, b.u(18, 26), 7, b.second, b.line),
        ]
    )


def hat(b: Brush) -> str:
    """A hat with a brim and a band."""
    half, top = b.u(20, 26), b.u(18, 34)
    return "".join(
        [
            rectangle(50 - half, top, 2 * half, 76 - top, b.main, b.u(3, 16), b.line),
            rectangle(50 - half, 60, 2 * half, 11, b.second),
            ellipse(50, 76, b.u(38, 46), b.u(7, 10), b.main, b.line),
        ]
    )


def book(b: Brush) -> str:
    """A closed book with a mark on its cover."""
    return "".join(
        [
            rectangle(24, 12, 58, 78, "#f4f0e4", 3),
            rectangle(20, 10, 56, 78, b.main, 4, b.line),
            rectangle(20, 10, 10, 78, b.second, 3),
            badge_at(b, 54, 48, b.u(12, 18), b.third, always=True),
        ]
    )


def heart(b: Brush) -> str:
    """A heart, sometimes with a face."""
    return heart_at(50, 52, 44, b.main, b.line) + (
        face_at(b, 50, 42, 22) if b.rng.random() < 0.5 else badge_at(b, 50, 46, 13, b.second)
    )


def mushroom(b: Brush) -> str:
    """A cap with spots on a stem."""
    spots = "".join(
        circle(x, y, b.u(4, 7), b.second) for x, y in ((32, 42), (52, 28), (70, 42), (50, 47)) if b.rng.random() < 0.8
    )
    stem = path("M38,54 L62,54 L66,90 Q50,97 34,90 Z", b.one_of("#f6efdf", b.third), b.line)
    face = face_at(b, 50, 68, 13) if b.rng.random() < 0.4 else ""
    return stem + path(f"M8,58 C8,{b.u(8, 20):.1f} 92,{b.u(8, 20):.1f} 92,58 Z", b.main, b.line) + spots + face


def balloon(b: Brush) -> str:
    """A balloon on a string."""
    return "".join(
        [
            curve("M50,70 Q42,80 50,86 Q57,91 50,98", b.ink, 2),
            polygon([(50, 66), (43, 75), (57, 75)], b.main),
            ellipse(50, 38, b.u(27, 33), b.u(32, 35), b.main, b.line),
            ellipse(39, 27, 6, 9, "#ffffff", 'opacity="0.45"'),
            badge_at(b, 52, 42, 12, b.second),
        ]
    )


def bird(b: Brush) -> str:
    """A bird from the side."""
    return "".join(
        [
            polygon([(28, 62), (4, b.u(44, 54)), (8, 72)], b.second),
            ellipse(48, 60, 30, b.u(22, 27), b.main, b.line),
            circle(68, 34, b.u(17, 20), b.main, b.line),
            polygon([(84, 30), (98, 36), (84, 41)], "#f2a02c"),
            ellipse(44, 60, 18, 12, b.second, f'transform="rotate({b.u(-25, 10):.0f} 44 60)"'),
            circle(72, 30, 3.6, b.ink),
            curve("M42,84 L42,95 M54,84 L54,95", "#f2a02c", 3.4),
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
                rectangle(x - half, y - size, 2 * half, size, fills[i], b.u(0, 8), b.line),
                ellipse(x, y - size / 2, half, size / 2, fills[i], b.line),
                polygon([(x - half, y), (x, y - size), (x + half, y)], fills[i], b.line),
                star_at(x, y - size * 0.48, size * 0.56, fills[i], 5, 0.5, b.line),
            )
        )
        y -= size * 0.94
    if b.rng.random() < 0.3:
        parts.append(face_at(b, 50, 96 - height * 0.6, min(16, height * 0.4)))
    return "".join(parts)


# Drawings of other things, which captions call by name half of the time.
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
