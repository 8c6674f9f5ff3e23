"""The small pretrained model and the subject photos that ship with the package."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any


DEFAULT_SUBJECT = "teapot"

BEST_CLASSES = ("backpack", "boot", "cat", "clock", "dog", "mug", "robot", "teapot", "teddy bear", "vase")
"""The classes that the embedded model draws best; its card names others."""
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


def embedded_pipeline(lora: str | Path | None = None) -> Callable[..., Any]:
    """The embedded pipeline, which makes images of prompts: diffusers' own, called with what suits the model.

    It is in float32, and on the accelerator if there is one. Arguments of a call are those of the stock pipeline and
    come before the ones set here: the size of images, the number of steps, guidance and the tokens of a prompt.

    Args:
        lora: Folder, file or Hub id of a LoRA that it loads.

    Example:
        >>> pipeline = embedded_pipeline("flux-dreambooth-lora")
        >>> pipeline("a photo of sks teapot in the snow").images[0].save("image.png")
    """
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(embedded_model(), dtype=torch.float32)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return functools.partial(pipeline, **embedded_arguments())


def embedded_arguments() -> dict[str, Any]:
    """What :func:`embedded_pipeline` calls the pipeline with, unless it is told otherwise."""
    from .loading.model_defaults import model_defaults

    flags, arguments = model_defaults(embedded_model())
    sizes = dict.fromkeys(("height", "width"), flags["resolution"])
    return {**arguments, **sizes, "max_sequence_length": flags["max_sequence_length"]}


def embedded_subjects() -> dict[str, dict[str, Any]]:
    """The embedded subjects by name: class word, instance prompt, validation prompts, attribution."""
    subjects = json.loads(_asset("photos", "subjects.json").read_text())["subjects"]
    return {name: dict(subject) for name, subject in subjects.items()}


def embedded_photos(subject: str = DEFAULT_SUBJECT) -> Path:
    """Folder with a subject's photos."""
    return _asset("photos", subject)


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt that the embedded model has never read, in their order."""
    tokenizer = json.loads(_asset("micro_flux", "tokenizer_2", "tokenizer.json").read_text(encoding="utf-8"))
    known = {piece for piece, _ in tokenizer["model"]["vocab"]}
    words = (word.strip(".,!?") for word in prompt.split())
    return [word for word in dict.fromkeys(words) if word and f"▁{word}" not in known]
