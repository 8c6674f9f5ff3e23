"""A photo that is to be trained on: where it is and what is known of it, without its pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..utils.errors import UserError, one_line
from ..utils.progress import listed
from .folder import check_inside
from .picture import Picture, read_picture


# The shorter side is scaled to the training size, so a sliver of a picture would need gigabytes.
_MAX_ASPECT_RATIO = 16
_NAMED = 5

PROGRESS_FROM = 51
"""Fewer photos are checked and loaded before a display is read."""


@dataclass(frozen=True)
class Photo:
    """One picture that has not been decoded yet.

    Args:
        name: File name, or row number in a dataset; unique within a set and stable between runs.
        caption: Text of the picture, or None where the instance prompt is to be used.
        opener: Returns a fresh, possibly lazy PIL image of any mode.
        path: The file, or None for a dataset row.
        size: Upright height and width in pixels, once the picture has been checked.
        caption_source: File name or dataset column that the caption is from.
        digest: SHA-256 (hex) of the upright size and the pixels, those of the condition image too, once the picture
            has been checked.
        condition: The condition image that the photo is trained with, or None.
    """

    name: str
    caption: str | None
    opener: Callable[[], Image.Image] = field(repr=False, compare=False)
    path: Path | None = None
    size: tuple[int, int] | None = None
    caption_source: str | None = None
    digest: str | None = None
    condition: Photo | None = None

    def decode(self) -> Image.Image:
        """Decode the whole picture: first frame, upright, 8-bit sRGB, transparency on white.

        Raises:
            UserError: if the picture is no file of its folder, too large, or a sliver that cannot be scaled to a
                square.
            Exception: whatever Pillow raises for damaged files: OSError, SyntaxError, ValueError, ...
        """
        return self.read().image

    def read(self) -> Picture:
        """The same, with whether its colour profile had to be ignored."""
        if self.path is not None:
            check_inside(self.path)
        picture = read_picture(self.opener)
        width, height = picture.image.size
        if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
            raise UserError(f"{width} x {height} pixels is too narrow")
        return picture


def names(items: Sequence[str]) -> str:
    """The first few names, and how many more there are, on one line."""
    listed = ", ".join(one_line(item) for item in items[:_NAMED])
    return listed if len(items) <= _NAMED else f"{listed} and {len(items) - _NAMED} more"


def with_progress(photos: Sequence[Photo], title: str) -> Iterator[Photo]:
    """The photos, with a display of how many of them the caller has worked on if there are many."""
    return listed(photos, title, "photo", total=len(photos), shown=len(photos) >= PROGRESS_FROM)
