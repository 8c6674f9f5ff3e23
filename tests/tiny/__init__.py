"""Tiny pipelines of every family. A new family's tests are one module here and its name in this list."""

from __future__ import annotations

from importlib import import_module

from .base import TinyFamily, forward, randomise
from .flux import save_tiny_flux


MODULES = (
    *("flux", "flux2", "flux3", "hidream", "ideogram4", "krea2", "lumina2", "pixart_sigma", "qwen_image"),
    *("qwen_image_21", "sana", "sd3", "z_image"),
)

TINY_FAMILIES: list[TinyFamily] = []
UNAVAILABLE: dict[str, str] = {}
"""Modules of families that the installed diffusers lacks a class of, and what it said; the others are tested."""

for _name in MODULES:
    try:
        TINY_FAMILIES += import_module(f".{_name}", __name__).TINY
    except ImportError as error:
        UNAVAILABLE[_name] = str(error)

__all__ = ["MODULES", "TINY_FAMILIES", "UNAVAILABLE", "TinyFamily", "forward", "randomise", "save_tiny_flux"]
