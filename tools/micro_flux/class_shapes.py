# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Drawings of the model's classes.

Every function returns the body of an SVG picture of 100 x 100 units.
"""

import math
from collections.abc import Callable

from brush import Brush, badge_at, circle, curve, ellipse, path, polygon, rectangle


def mug(b: Brush) -> str:
    """A cup with a handle, a rim and often a mark or stripes."""
    left, right, top, bottom = b.u(12, 22), b.u(62, 74), b.u(18, 34), b.u(80, 92)
    lean, corner = b.u(0, 8), b.u(3, 14)
    middle, handle = (top + bottom) / 2, b.one_of(b.main, b.second, b.third)
    handle = handle if not handle.startswith("url") else b.one_of(b.dark, b.third)
    reach = b.u(16, 24)
    parts = [
        curve(
            f"M{right - 3:.1f},{middle - 17:.1f} C{right + reach:.1f},{middle - 20:.1f} {right + reach:.1f},"
            f"{middle + 18:.1f} {right - 5:.1f},{middle + 16:.1f}",
            handle,
            b.u(6, 10),
        ),
        path(
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
        parts.append(ellipse(centre, top, (right - left) / 2, b.u(3, 7), inside, b.line))
    if b.rng.random() < 0.25:
        parts.append(rectangle(left + 2, middle - 5, right - left - 4, b.u(7, 14), b.second))
    else:
        parts.append(badge_at(b, centre, middle + 3, b.u(9, 15), b.second))
    if b.rng.random() < 0.2:
        for shift in (-10, 8):
            x = centre + shift
            parts.append(curve(f"M{x},{top - 5:.1f} q-5,-5 0,-9 q5,-4 0,-8", "#e8ecef", 3))
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
            parts.append(curve(f"M{x + side * 20},{y + 24} L{x + side * 28},{y + radius + 6:.1f}", b.dark, b.u(5, 8)))
            parts.append(circle(x + side * radius * 0.68, y - radius * 0.86, b.u(10, 14), b.second, b.line))
    square = not alarm and b.rng.random() < 0.25
    face = b.one_of("#fbf7ec", "#ffffff", b.third)
    if square:
        parts.append(rectangle(x - radius, y - radius, 2 * radius, 2 * radius, b.main, b.u(2, 14), b.line))
    else:
        parts.append(circle(x, y, radius, b.main, b.line))
    rim = radius * b.u(0.72, 0.86)
    parts.append(circle(x, y, rim, face))
    for i in range(12):
        angle = math.pi * i / 6
        if i % 3 == 0 or b.main.startswith("url"):
            parts.append(circle(x + 0.84 * rim * math.sin(angle), y - 0.84 * rim * math.cos(angle), 1.8, b.ink))
    hand = b.one_of(b.ink, b.dark)
    for length, width in ((0.48, 4.2), (0.72, 3.2)):
        angle = b.u(0, 2 * math.pi)
        tip_x, tip_y = x + length * rim * math.sin(angle), y - length * rim * math.cos(angle)
        parts.append(curve(f"M{x},{y} L{tip_x:.1f},{tip_y:.1f}", hand, width))
    parts.append(circle(x, y, 3.4, hand))
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
                curve(
                    f"M{c + side * neck:.1f},{top + 9:.1f} C{c + side * (neck + reach):.1f},{top + 4:.1f} "
                    f"{c + side * (neck + reach):.1f},{low - 6:.1f} {c + side * (belly - 4):.1f},{low - 8:.1f}",
                    b.dark,
                    b.u(4, 6),
                )
            )
    parts.append(path(commands, b.main, b.line))
    if b.rng.random() < 0.6:
        for level in b.one_of((0,), (-9, 9), (0, 12)):
            half = belly * (0.97 if abs(level) < 8 else 0.86)
            parts.append(rectangle(c - half, low + level - 2.5, 2 * half, b.u(4, 7), b.second))
    else:
        parts.append(badge_at(b, c, low, b.u(8, 13), b.second))
    parts.append(rectangle(c - rim, top - 3, 2 * rim, 5, b.one_of(b.second, b.dark), 2))
    return "".join(parts)


def teapot(b: Brush) -> str:
    """A round body with spout, handle and lid."""
    rx, ry, x, y = b.u(25, 31), b.u(21, 28), 50.0, 60.0
    solid = b.one_of(b.dark, "#6a4a32") if b.main.startswith("url") else b.one_of(b.main, b.dark)
    parts = [
        curve(
            f"M{x - rx + 3:.1f},{y - 12:.1f} C{x - rx - 22:.1f},{y - 22:.1f} {x - rx - 20:.1f},{y + 20:.1f} "
            f"{x - rx + 6:.1f},{y + 12:.1f}",
            solid,
            b.u(5, 8),
        ),
        path(
            f"M{x + rx - 8:.1f},{y + 12:.1f} Q{x + rx + 10:.1f},{y + 8:.1f} {x + rx + 8:.1f},{y - 18:.1f} "
            f"L{x + rx + 19:.1f},{y - 22:.1f} Q{x + rx + 16:.1f},{y + 12:.1f} {x + rx - 6:.1f},{y + 20:.1f} Z",
            b.main,
            b.line,
        ),
        ellipse(x, y, rx, ry, b.main, b.line),
        rectangle(x - 16, y + ry - 4, 32, 7, b.one_of(b.second, b.dark), 3),
        path(f"M{x - 18},{y - ry + 6:.1f} Q{x},{y - ry - 14:.1f} {x + 18},{y - ry + 6:.1f} Z", b.second, b.line),
        circle(x, y - ry - 9, b.u(4, 6), b.one_of(b.second, b.third)),
        badge_at(b, x, y + 2, b.u(9, 14), b.third),
    ]
    return "".join(parts)


def robot(b: Brush) -> str:
    """A box head with an antenna, sometimes with a body."""
    parts, whole = [], b.rng.random() < 0.5
    top, height, half = (22.0, 34.0, b.u(20, 25)) if whole else (26.0, b.u(50, 62), b.u(32, 38))
    parts.append(curve(f"M50,{top:.1f} L50,{top - 11:.1f}", b.dark, 4))
    parts.append(circle(50, top - 13, b.u(4, 6), b.third))
    for side in (-1, 1):
        parts.append(rectangle(50 + side * (half + 2) - 4, top + height * 0.35, 8, height * 0.35, b.second, 2))
    parts.append(rectangle(50 - half, top, 2 * half, height, b.main, b.u(3, 14), b.line))
    eye, gap = height * b.u(0.12, 0.17), half * 0.46
    for side in (-1, 1):
        parts.append(circle(50 + side * gap, top + 0.38 * height, eye, b.one_of("#ffffff", "#ffe27a", "#bff2ff")))
        parts.append(circle(50 + side * gap, top + 0.38 * height, eye * 0.5, b.ink))
    parts.append(
        rectangle(50 - half * 0.55, top + 0.68 * height, half * 1.1, height * 0.15, b.one_of("#f2f2f2", b.ink), 2)
    )
    if whole:
        low = top + height
        for side in (-1, 1):
            parts.append(rectangle(50 + side * 27 - 4, low + 6, 8, 22, b.second, 4))
            parts.append(rectangle(50 + side * 11 - 5, low + 28, 10, 14, b.second, 3))
        parts.append(rectangle(27, low + 3, 46, 30, b.main, b.u(2, 8), b.line))
        parts.append(badge_at(b, 50, low + 18, 8, b.third, always=True))
    return "".join(parts)


def boot(b: Brush) -> str:
    """A high shoe seen from the side."""
    shaft, height = b.u(24, 34), b.u(10, 22)
    parts = [
        path(
            f"M22,{height:.1f} L{22 + shaft:.1f},{height:.1f} L{22 + shaft:.1f},54 Q66,56 78,64 Q90,70 88,84 L20,84 Z",
            b.main,
            b.line,
        ),
        rectangle(18, 83, 72, b.u(6, 10), b.one_of(b.second, b.ink, b.dark), 3),
        rectangle(20, height - 2, shaft + 4, b.u(8, 14), b.second, 3),
    ]
    if b.rng.random() < 0.6:
        for i in range(3):
            y = height + 22 + 9 * i
            parts.append(curve(f"M{13 + shaft:.1f},{y:.1f} L{21 + shaft:.1f},{y:.1f}", b.third, 3.4))
    else:
        parts.append(badge_at(b, 24 + shaft / 2, height + 28, 8, b.third))
    return "".join(parts)


def backpack(b: Brush) -> str:
    """A bag with a front pocket, straps and a handle."""
    half, top = b.u(24, 31), b.u(18, 26)
    parts = [curve(f"M42,{top + 3:.1f} C42,{top - 14:.1f} 58,{top - 14:.1f} 58,{top + 3:.1f}", b.dark, 4.5)]
    for side in (-1, 1):
        parts.append(rectangle(50 + side * (half + 3) - 5, 46, 10, 36, b.second, 5))
    parts.append(rectangle(50 - half, top, 2 * half, 92 - top, b.main, b.u(12, 22), b.line))
    pocket = b.u(54, 60)
    parts.append(rectangle(50 - half + 7, pocket, 2 * half - 14, 88 - pocket, b.second, b.u(3, 9), b.line))
    parts.append(curve(f"M{50 - half + 10:.1f},{pocket + 8:.1f} L{50 + half - 10:.1f},{pocket + 8:.1f}", b.dark, 2.6))
    if b.rng.random() < 0.5:
        parts.append(curve(f"M{50 - half + 6:.1f},{top + 20:.1f} L{50 + half - 6:.1f},{top + 20:.1f}", b.dark, 2.6))
    else:
        parts.append(badge_at(b, 50, (top + pocket) / 2 + 2, 8, b.third))
    return "".join(parts)


def _head(b: Brush, ears: list[str], muzzle: str) -> str:
    parts = [*ears, ellipse(50, 54, b.u(32, 37), b.u(29, 34), b.main, b.line)]
    if b.rng.random() < 0.4:
        parts.append(ellipse(50 + b.one_of(-15, 15), 44, 12, 12, b.second))
    gap, eye = b.u(13, 17), b.u(4, 5.5)
    parts += [circle(50 + side * gap, 47, eye, b.ink) for side in (-1, 1)]
    parts += [circle(50 + side * gap - 1.5, 45.5, 1.5, "#ffffff") for side in (-1, 1)]
    return "".join(parts) + muzzle


def teddy_bear(b: Brush) -> str:
    """A round head with round ears, in half of the drawings with a body."""
    if b.rng.random() < 0.5:
        ears = []
        for side in (-1, 1):
            ears += [circle(50 + side * 26, 27, 13, b.main, b.line), circle(50 + side * 26, 27, 7, b.second)]
        muzzle = ellipse(50, 66, 15, 12, b.one_of("#f3e2c6", b.second)) + ellipse(50, 61, 6, 4, b.ink)
        return _head(b, ears, muzzle + curve("M50,65 L50,69 M43,71 Q50,77 57,71", b.ink, 2.4))
    parts = []
    for side in (-1, 1):
        parts += [
            ellipse(50 + side * 24, 60, 10, 14, b.main, b.line),
            circle(50 + side * 17, 86, 11, b.main, b.line),
            circle(50 + side * 17, 87, 6, b.second),
            circle(50 + side * 18, 15, 9, b.main, b.line),
            circle(50 + side * 18, 15, 5, b.second),
        ]
    parts += [ellipse(50, 68, 24, 23, b.main, b.line), ellipse(50, 69, 14, 15, b.second)]
    parts += [ellipse(50, 30, 23, 20, b.main, b.line), ellipse(50, 37, 10, 8, "#f3e2c6")]
    parts.append(ellipse(50, 34, 4, 3, b.ink))
    parts += [circle(50 + side * 9, 27, 2.8, b.ink) for side in (-1, 1)]
    if b.rng.random() < 0.4:
        parts.append(polygon([(50, 52), (38, 46), (38, 58), (62, 46), (62, 58)], b.third))
    return "".join(parts)


def dog(b: Brush) -> str:
    """A head with hanging ears, a muzzle and often a tongue."""
    ears = []
    for side in (-1, 1):
        turn = f'transform="rotate({side * b.u(-22, -6):.0f} {50 + side * 31} 42)"'
        ears.append(ellipse(50 + side * 33, 46, 11, b.u(20, 26), b.one_of(b.second, b.dark), turn))
    muzzle = ellipse(50, 66, 17, 14, b.one_of("#fbf3e4", b.second, b.main)) + ellipse(50, 59, 8, 5.5, b.ink)
    if b.rng.random() < 0.5:
        muzzle += rectangle(45, 72, 10, 14, "#ee7f8d", 5)
    return _head(b, [], "") + "".join(ears) + muzzle


def cat(b: Brush) -> str:
    """A head with pointed ears and whiskers."""
    ears = []
    for side in (-1, 1):
        x = 50 + side * 24
        ears.append(polygon([(x - side * 14, 32), (x + side * 8, 10), (x + side * 12, 46)], b.main, b.line))
        ears.append(polygon([(x - side * 5, 30), (x + side * 6, 17), (x + side * 8, 38)], "#f2a3ad"))
    whiskers = "".join(
        curve(f"M{50 + side * 17},{64 + drop} L{50 + side * 38},{60 + 2 * drop}", b.dark, 1.8)
        for side in (-1, 1)
        for drop in (0, 5)
    )
    muzzle = ellipse(50, 66, 12, 9, b.one_of("#fbf3e4", b.main, b.second))
    muzzle += polygon([(45, 60), (55, 60), (50, 65)], b.one_of("#e8828f", b.ink))
    return _head(b, ears, muzzle + whiskers + curve("M44,69 Q47,73 50,69 Q53,73 56,69", b.ink, 2))


# The name of a class in captions -> its drawing.
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
