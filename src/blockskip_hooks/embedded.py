"""The small pretrained model and the subject photos that ship with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any


DEFAULT_SUBJECT = "dog"

BACKGROUND_PHRASES = {
    "red": "on a red background",
    "blue": "on a blue background",
    "green": "on a green background",
    "yellow": "on a yellow background",
    "purple": "on a purple background",
    "beach": "on the beach",
    "snow": "in the snow",
    "night": "at night",
    "mountains": "in the mountains",
    "bricks": "by a brick wall",
}
"""The backgrounds that the embedded model knows, and how a prompt says them."""


def _asset(*parts: str) -> Path:
    # A real folder, because diffusers and transformers read paths: the package is never imported from a zip file.
    return Path(str(resources.files("blockskip_hooks"))).joinpath("assets", *parts)


def embedded_model() -> Path:
    """Folder of the embedded pipeline."""
    return _asset("micro_flux")


def embedded_subjects() -> dict[str, dict[str, Any]]:
    """The embedded subjects by name: class word, instance prompt, validation prompts, attribution."""
    subjects = json.loads(_asset("photos", "subjects.json").read_text())["subjects"]
    return {name: dict(subject) for name, subject in subjects.items()}


def embedded_photos(subject: str = DEFAULT_SUBJECT) -> Path:
    """Folder with a subject's photos."""
    return _asset("photos", subject)


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt that the embedded model has never read, in their order; its words are lower case."""
    tokenizer = json.loads(_asset("micro_flux", "tokenizer_2", "tokenizer.json").read_text(encoding="utf-8"))
    known = {piece for piece, _ in tokenizer["model"]["vocab"]}
    return [word for word in dict.fromkeys(prompt.split()) if f"▁{word}" not in known]
