"""Tiny pipelines of every family. A new family's tests are one module here and its name in this list."""

from __future__ import annotations

from . import flux, flux2, hidream, ideogram4, krea2, lumina2, pixart_sigma, qwen_image, sana, sd3, z_image
from .base import TinyFamily, randomise
from .flux import save_tiny_flux


TINY_FAMILIES: list[TinyFamily] = [
    tiny
    for module in (flux, flux2, hidream, ideogram4, krea2, lumina2, pixart_sigma, qwen_image, sana, sd3, z_image)
    for tiny in module.TINY
]

__all__ = ["TINY_FAMILIES", "TinyFamily", "randomise", "save_tiny_flux"]
