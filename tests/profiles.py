"""Colour profiles made from their numbers, in the layout of the ICC's specification, version 2."""

import struct

import numpy as np


# Primaries and white of sRGB and Display P3, adapted to D50: columns of the matrix from linear RGB to XYZ.
SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
D50 = (0.9642, 1.0, 0.8249)


def _fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _curve(gamma):
    if gamma is not None:
        return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    x = np.linspace(0, 1, 1024)
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv" + bytes(4) + struct.pack(">I", 1024) + np.rint(linear * 65535).astype(">u2").tobytes()


def _profile(space, connection, device_class, tags):
    tags = {
        "desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        "cprt": b"text" + bytes(4) + b"none\0",
        "wtpt": b"XYZ " + bytes(4) + _fixed(*D50),
        **tags,
    }
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name.encode() + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = struct.pack(">I4s4s4s4s4s12s4s", 128 + len(table) + len(data), b"", bytes([2, 16, 0, 0]), device_class,
                         space, connection, bytes(12), b"acsp")  # fmt: skip
    return header.ljust(68, b"\0") + _fixed(*D50) + bytes(128 - 80) + table + data


def matrix_profile(gamma, columns=SRGB, grey=False):
    """A profile of a display: its curve (``None`` for sRGB's own) and the colours of its primaries."""
    if grey:
        return _profile(b"GRAY", b"XYZ ", b"mntr", {"kTRC": _curve(gamma)})
    tags = {f"{c}XYZ": b"XYZ " + bytes(4) + _fixed(*column) for c, column in zip("rgb", columns, strict=True)}
    return _profile(b"RGB ", b"XYZ ", b"mntr", tags | {f"{c}TRC": _curve(gamma) for c in "rgb"})


def cmyk_profile():
    """A printer of black ink only: its lightness falls evenly from 100 to 0, and other inks do nothing."""
    identity = np.array([0, 65535], dtype=">u2").tobytes()
    lab = np.zeros((2, 2, 2, 2, 3))
    lab[..., 0, 0] = 100
    # Version 2 encodes L* of 100 as 0xff00, and a* and b* of 0 as 0x8000.
    encoded = lab * 652.8 + (0, 32768, 32768)
    table = struct.pack(">4s4sBBBB", b"mft2", b"", 4, 3, 2, 0) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += struct.pack(">HH", 2, 2) + identity * 4 + np.rint(encoded).astype(">u2").tobytes() + identity * 3
    return _profile(b"CMYK", b"Lab ", b"prtr", {"A2B0": table})


DISPLAY_P3 = matrix_profile(None, P3)
