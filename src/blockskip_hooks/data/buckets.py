"""Aspect-ratio buckets: the shapes that photos are cropped to when a square would cut too much away."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ..utils.errors import UserError


# As wide and as high as cameras and screens are, between the widest (21:9) and the highest.
ASPECT_RATIOS = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (21, 9))


def parse_buckets(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``--aspect_ratio_buckets``: heights and widths in pixels, ``"1024,1024;768,1360"``.

    Raises:
        UserError: if the text has another form.
    """
    parts = [part.strip() for part in text.split(";") if part.strip()]
    matches = [re.fullmatch(r"([0-9]{1,6})\s*,\s*([0-9]{1,6})", part, re.ASCII) for part in parts]
    if not parts or not all(matches):
        raise UserError(f"--aspect_ratio_buckets is '{text}'; write height,width pairs like 1024,1024;768,1360.")
    return tuple(dict.fromkeys((int(match[1]), int(match[2])) for match in matches if match))


def standard_buckets(resolution: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Buckets of common aspect ratios, upright and lying, with about the area of the square of ``resolution``.

    Args:
        resolution: Side of the square in pixels.
        multiple: Heights and widths are rounded to multiples of it.
    """
    shapes = []
    for long, short in ASPECT_RATIOS:
        scale = resolution / (long * short) ** 0.5
        larger, smaller = (max(multiple, round(side * scale / multiple) * multiple) for side in (long, short))
        shapes += [(larger, smaller), (smaller, larger)]
    return tuple(dict.fromkeys(shapes))


def nearest_bucket(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> int:
    """Number of the shape whose aspect ratio is nearest to that of ``size``, both (height, width)."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(shapes)), key=lambda number: abs(math.log(shapes[number][0] / shapes[number][1]) - ratio))
