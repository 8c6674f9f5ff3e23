"""Images side by side: contact sheets with labelled rows, written as PNG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .errors import UserError
from .files import replacing


GAP, LINE, FONT_SIZE = 8, 20, 15
"""Pixels between two cells, of a line of text, and of its letters."""
CAPTION_COLOUR = "#59646b"


@dataclass(frozen=True)
class SheetRow:
    """A row of a contact sheet.

    Attributes:
        label: Text above the images.
        images: The images; rows may differ in their number.
        captions: Text below each image, if any.
    """

    label: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


def contact_sheet(rows: Sequence[SheetRow], file: Path, *, side: int, panels: int = 1) -> None:
    """Write images as a grid on white.

    Args:
        rows: The rows from top to bottom.
        file: The PNG.
        side: Side in pixels of the square that each image is fitted into.
        panels: Number of columns that the rows are dealt into, one after the other.

    Raises:
        UserError: if there are no images.
    """
    if not any(row.images for row in rows):
        raise UserError(f"The contact sheet {file} has no images.")
    font = ImageFont.load_default(size=FONT_SIZE)
    width = max(len(row.images) for row in rows) * (side + GAP) + GAP
    letters = max(int((width - 2 * GAP) / font.getlength("n")), 1)
    labels = [textwrap.wrap(row.label, letters) for row in rows]
    heights = [LINE * (len(lines) + bool(row.captions)) + side + 2 * GAP for row, lines in zip(rows, labels)]
    size = math.ceil(len(rows) / panels)
    columns = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    height = max(sum(heights[row] for row in column) for column in columns) + GAP
    sheet = Image.new("RGB", (len(columns) * width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for panel, column in enumerate(columns):
        for row in column:
            left, top = panel * width + GAP, GAP + sum(heights[column.start : row])
            draw.multiline_text((left, top), "\n".join(labels[row]), fill="black", font=font)
            top += LINE * len(labels[row])
            for number, image in enumerate(rows[row].images):
                sheet.paste(_fitted(image, side), (left + number * (side + GAP), top))
            for number, caption in enumerate(rows[row].captions):
                place = left + number * (side + GAP), top + side + 2
                draw.text(place, caption, fill=CAPTION_COLOUR, font=font)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def flattened(image: Image.Image) -> Image.Image:
    """``image`` upright and as RGB, transparency on white: plain conversion would turn it black."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def within(image: Image.Image, pixels: int) -> Image.Image:
    """``image``, scaled down if it has more pixels than this."""
    scale = math.sqrt(pixels / (image.width * image.height))
    if scale >= 1:
        return image
    width, height = (max(1, math.floor(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """A square of this side with the whole image: small ones are enlarged with hard pixel edges, others reduced."""
    image = flattened(image)
    if factor := side // max(image.size) if max(image.size) < side else 0:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color="white", centering=(0, 0))
