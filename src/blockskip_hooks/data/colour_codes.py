"""The colour space that a picture states by numbers in place of a profile, as phones write HEIC, AVIF and PNG."""

from __future__ import annotations

import functools
import re
import struct

from PIL import Image, ImageCms


HEAD_BYTES = 2**17
"""How much of a file is looked at: both boxes stand before the pixels."""

# Numbers of ITU-T H.273: colour primaries and transfer characteristics.
_UNSPECIFIED_OR_SRGB = {1, 2, 5, 6}
_DISPLAY_P3 = 12
# The curves of video are close to that of sRGB, and programs take them for it.
_LIKE_SRGB = {1, 2, 6, 13, 14, 15}
_CHUNK = re.compile(rb"\x00\x00\x00\x04cICP(..)", re.DOTALL)
_BOX = re.compile(rb"colrnclx(....)", re.DOTALL)
# Columns of the matrix from linear Display P3 to XYZ, adapted to D50 as profiles have it.
_P3_TO_XYZ = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}


def stated_profile(image: Image.Image, head: bytes) -> bytes | None:
    """A profile of the colour space that the file states by numbers.

    Args:
        image: The opened file.
        head: How the file begins.

    Returns:
        A profile of Display P3; ``None`` for sRGB, or where nothing is stated; empty for a space that pictures cannot
        be converted from here, such as those of high dynamic range.
    """
    codes = None
    if image.format == "PNG" and (chunk := _CHUNK.search(head.partition(b"IDAT")[0])):
        codes = struct.unpack("2B", chunk[1])
    elif head[4:8] == b"ftyp" and (box := _BOX.search(head)):
        codes = struct.unpack(">2H", box[1])
    if codes is None:
        return None
    primaries, curve = codes
    if curve in _LIKE_SRGB and primaries in _UNSPECIFIED_OR_SRGB:
        return None
    return _display_p3() if curve in _LIKE_SRGB and primaries == _DISPLAY_P3 else b""


@functools.cache
def _display_p3() -> bytes:
    """The profile of sRGB, which has the same curve and white, with other primaries."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12):
        name, offset = struct.unpack_from(">4sI", data, entry)
        if name in _P3_TO_XYZ:
            struct.pack_into(">3i", data, offset + 8, *(round(value * 2**16) for value in _P3_TO_XYZ[name]))
    return bytes(data)
