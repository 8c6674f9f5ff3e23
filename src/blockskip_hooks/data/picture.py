"""One picture, whatever its file is called: upright, in sRGB, 8 bits a colour, on white, and bounded in memory."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..utils.errors import UserError
from ..utils.pictures import flattened
from .colour_codes import HEAD_BYTES, stated_profile


MAX_PIXELS = 500_000_000
"""Pictures with more pixels are refused: decoded, they would take more than 2 GB."""

HEIC_ADVICE = "HEIC: run pip install pillow-heif, or convert to jpg or png"

# Up to here Pillow reads pictures as they are; it refuses those with more pixels, which are read at a smaller scale.
_LARGE_PIXELS = 178_956_970
# The shorter side that is left of them, in pixels.
_LARGE_SIDE = 2048
# Rounding moves colours by this much, out of 255, when nothing is converted.
_ROUNDING = 2
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        image: Upright, mode RGB, in sRGB, transparency on white.
        ignored_profile: Whether it came with a colour profile that cannot be applied.
    """

    image: Image.Image
    ignored_profile: bool


def open_picture(source: Path | BinaryIO) -> Image.Image:
    """Open a file, or the bytes of one, by its content; nothing is decoded yet.

    Raises:
        UserError: if it is a HEIC and the package that reads them is not installed.
        UnidentifiedImageError: if it is no picture.
    """
    head = _head(source)
    try:
        image = Image.open(source)
    except UnidentifiedImageError:
        if not (head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS):
            raise
        try:
            import pillow_heif  # optional, and needed for these only
        except ImportError as error:
            raise UserError(HEIC_ADVICE) from error
        pillow_heif.register_heif_opener()
        image = Image.open(source)
    if not image.info.get("icc_profile") and (stated := stated_profile(image, head)) is not None:
        image.info["icc_profile"] = stated
    return image


def _head(source: Path | BinaryIO) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(HEAD_BYTES)
    source.seek(0)
    head = source.read(HEAD_BYTES)
    source.seek(0)
    return head


def read_picture(opener: Callable[[], Image.Image]) -> Picture:
    """Decode a picture; only the first frame of an animation.

    Args:
        opener: Returns a fresh, possibly lazy image of any mode.

    Raises:
        UserError: if it has more than `MAX_PIXELS`.
        Exception: whatever Pillow raises for damaged files: OSError, SyntaxError, ValueError, ...
    """
    with _large_pictures(), opener() as image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{image.width * image.height / 1e6:.0f} megapixels; scale it down to {MAX_PIXELS / 1e6:.0f} at most"
            )
        white, inverted = _grey_scale(image)
        factor, full_size = _reduction(image.size), image.size
        if factor > 1:
            # JPEG decodes to a half, a quarter or an eighth at once, in as much less memory.
            image.draft(image.mode, (image.width // factor, image.height // factor))
            factor = factor if image.size == full_size else 1
        image.load()
        profile = image.info.get("icc_profile")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":
            image = _grey_from_wide(_reduced(np.asarray(image), factor), white, inverted)
        else:
            image = _direct(image)
            image = image if factor == 1 else image.reduce(factor)
        return _to_rgb(image, profile)


@contextlib.contextmanager
def _large_pictures() -> Iterator[None]:
    """Pillow warns of pictures from 90 megapixels on and refuses them from 180: phones make larger ones."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _reduction(size: tuple[int, int]) -> int:
    """How many times smaller a picture is read: 1 unless it is large."""
    if size[0] * size[1] <= _LARGE_PIXELS:
        return 1
    return next((factor for factor in (8, 4, 2) if min(size) >= factor * _LARGE_SIDE), 1)


def _reduced(values: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of ``factor`` pixels; Pillow cannot reduce 16-bit grey."""
    if factor == 1:
        return values
    height, width = (length // factor for length in values.shape)
    squares = values[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return squares.mean(axis=(1, 3)).astype(values.dtype)


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """The value that stands for white in a grey picture of more than 8 bits, and whether white is zero."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    # The largest value of a TIFF says how many bits are in use only where it is that of a number of bits.
    largest = tags.get(281, (0,))[0]
    white = largest if 255 < largest < 65535 and (largest + 1).bit_count() == 1 else 2 ** min(bits, 16) - 1
    return white, tags.get(262) == 0


def _grey_from_wide(values: np.ndarray, white: int, inverted: bool) -> Image.Image:
    """Scale a 12-bit, 16-bit, 32-bit or float grey picture to 8 bits; Pillow's own conversion clips it to white."""
    pixels = np.nan_to_num(values.astype(np.float64))
    peak = float(pixels.max())
    if values.dtype.kind == "f":
        scale = 1.0 if peak <= 1 else 255.0 if peak <= 255 else peak
    else:
        scale = max(float(white), peak)
    shares = np.clip(pixels / scale, 0, 1)
    return Image.fromarray(np.rint((1 - shares if inverted else shares) * 255).astype(np.uint8))


def _direct(image: Image.Image) -> Image.Image:
    """The picture with colours in place of a palette, and with an alpha channel if anything is transparent."""
    if image.getbands()[-1] in ("A", "a") or "transparency" in image.info:
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    return image if image.mode in ("L", "CMYK", "LAB", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _to_rgb(image: Image.Image, profile: bytes | None) -> Picture:
    """Convert to sRGB by the profile, or plainly where there is none or it does not fit; then lay it on white."""
    ignored, rgb = False, None
    if image.mode == "LAB":
        rgb = _transform(None, "LAB").apply(image)
    elif profile is not None:
        try:
            rgb = _by_profile(image, profile)
        except (ImageCms.PyCMSError, ImportError, OSError, ValueError):
            ignored = True
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if rgb is None:
        rgb = image.convert("RGB")
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = flattened(rgb)
    return Picture(rgb, ignored)


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The colours in sRGB; ``None`` if they are in sRGB, so that they stay as they are to the bit."""
    space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space)
    has_one_channel = image.mode in ("L", "LA")
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or mode == "L" and not has_one_channel:
        raise UserError(f"a profile of {space} for {image.mode}")
    return None if _changes_nothing(profile, mode) else _transform(profile, mode).apply(image.convert(mode))


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.createProfile("LAB") if profile is None else ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


@functools.lru_cache(maxsize=8)
def _changes_nothing(profile: bytes, mode: str) -> bool:
    """Whether a profile is sRGB, up to rounding: most are, under many names and in many versions."""
    if mode == "CMYK":
        return False
    if mode == "RGB":
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        colours = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3))
    else:
        colours = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    before, after = (
        np.asarray(c, dtype=int) for c in (colours.convert("RGB"), _transform(profile, mode).apply(colours))
    )
    return int(np.abs(after - before).max()) <= _ROUNDING
