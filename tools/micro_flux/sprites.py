# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Icons of the `@iconify-json` npm packages, rendered to RGBA sprites."""

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image


SPRITE_SIZE = 160


@cache
def load_icon_set(icons: Path, vendor: str) -> dict:
    """Reads `<icons>/<vendor>/icons.json` (`icons` is the `node_modules/@iconify-json` folder)."""
    with open(icons / vendor / "icons.json", encoding="utf-8") as file:
        return json.load(file)


def vendor_licence(icons: Path, vendor: str) -> str:
    """SPDX name of a vendor's licence as its package states it."""
    with open(icons / vendor / "info.json", encoding="utf-8") as file:
        return json.load(file)["license"]["spdx"]


def icon_svg(icons: Path, vendor: str, name: str) -> str:
    """The SVG text of one icon; an alias without a transformation of its own is followed."""
    data = load_icon_set(icons, vendor)
    name = data.get("aliases", {}).get(name, {}).get("parent", name)
    icon = data["icons"][name]
    left, top = icon.get("left", data.get("left", 0)), icon.get("top", data.get("top", 0))
    width = icon.get("width", data.get("width", 16))
    height = icon.get("height", data.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


@cache
def render_sprite(icons: Path, vendor: str, name: str, size: int = SPRITE_SIZE) -> np.ndarray:
    """One icon as uint8 RGBA (size, size, 4), cropped to its opaque box and centred, its longer side full."""
    png = resvg_py.svg_to_bytes(svg_string=icon_svg(icons, vendor, name), width=2 * size, height=2 * size)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox()
    if box is None:
        raise ValueError(f"{vendor}:{name} renders to nothing")
    image = image.crop(box)
    scale = size / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(canvas)
