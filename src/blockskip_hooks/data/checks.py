"""Every photo decoded once before a run, so that what is wrong with one is said before anything is loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..utils.errors import UserError, first_line, one_line
from .photo import Photo, names, with_progress


logger = logging.getLogger(__name__)

# Of 255: no pixel of a picture that looks black is brighter.
_BLACK = 16
# Of an aspect ratio: what nobody sees.
_SAME_SHAPE = 0.02


def check_photos(photos: Sequence[Photo], where: str) -> list[Photo]:
    """Decode every photo and add its size and digest; warn of what is likely a mistake, in one line of each kind.

    Args:
        photos: Photos that have not been decoded.
        where: What names them in messages.

    Raises:
        UserError: naming every photo that cannot be decoded.
    """
    broken, checked, plain, black, stretched = list[str](), list[Photo](), list[str](), list[str](), list[str]()
    copies: dict[str, list[str]] = {}

    def check(photo: Photo) -> Photo | None:
        try:
            image, ignored_profile = photo.read()
            # Web pages are full of them, and a download of photos brings them along.
            if image.size == (1, 1):
                raise UserError("a single pixel")
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...: all mean the same here
            broken.append(f"{one_line(photo.name)} ({_reason(photo, error)})")
            return None
        if ignored_profile:
            plain.append(photo.name)
        if np.asarray(image).max() <= _BLACK:
            black.append(photo.name)
        return replace(photo, size=(image.height, image.width), digest=_digest(image))

    for unchecked in with_progress(photos, "Checking photos"):
        photo, condition = check(unchecked), unchecked.condition and check(unchecked.condition)
        if photo is None or (unchecked.condition and condition is None):
            continue
        if condition:
            digest = hashlib.sha256(f"{photo.digest} {condition.digest}".encode()).hexdigest()
            photo = replace(photo, condition=condition, digest=digest)
            if _other_shape(photo, condition):
                stretched.append(condition.name)
        checked.append(photo)
        copies.setdefault(photo.digest or "", []).append(photo.name)
    if broken:
        count = "1 image" if len(broken) == 1 else f"{len(broken)} images"
        raise UserError(f"{where}: {count} cannot be read: {', '.join(broken)}; replace or remove.")
    same = [" = ".join(group) for group in copies.values() if len(group) > 1]
    for found, problem in (
        (plain, "taken as sRGB, because their colour profile cannot be applied"),
        (black, "all but black"),
        (same, "the same picture more than once, which counts more than the others"),
        (stretched, "of another shape than their photos, to which they are stretched"),
    ):
        if found:
            logger.warning("%s: %s: %d (%s).", where, problem, len(found), names(found))
    return checked


def _other_shape(photo: Photo, condition: Photo) -> bool:
    """Whether two pictures differ in their aspect ratio by more than rounding their sizes explains."""
    assert photo.size is not None and condition.size is not None
    (height, width), (other_height, other_width) = photo.size, condition.size
    return abs(height * other_width / (width * other_height) - 1) > _SAME_SHAPE


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def _reason(photo: Photo, error: Exception) -> str:
    if photo.path is not None and photo.path.is_file() and photo.path.stat().st_size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"  # Pillow's text repeats the whole path
    return one_line(first_line(error))
