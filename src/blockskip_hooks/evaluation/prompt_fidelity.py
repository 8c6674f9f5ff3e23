"""Whether images of the embedded model show what their prompts ask for: the right thing on the right background."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..embedded import BACKGROUND_PHRASES
from ..inference.image_encoders import SubjectImageEncoder


def named_background(prompt: str) -> str | None:
    """Name of the background that a prompt asks for; ``None`` if it asks for none that the embedded model knows."""
    found = [name for name, phrase in BACKGROUND_PHRASES.items() if phrase in " ".join(prompt.lower().split())]
    return found[0] if len(found) == 1 else None


def named_class(prompt: str, classes: Sequence[str]) -> str | None:
    """The class whose name is in a prompt; ``None`` without one, or with several."""
    words = f" {' '.join(prompt.lower().split())} "
    found = [name for name in classes if f" {name} " in words]
    return found[0] if len(found) == 1 else None


def prompt_fidelity(
    images: Sequence[Image.Image], prompts: Sequence[str], encoder: SubjectImageEncoder
) -> dict[str, list[float | None]]:
    """Whether the embedded classifier sees what each prompt names, as ``tools/micro_flux/quality.py`` measures it.

    Args:
        images: N images, at least one.
        prompts: The prompt of each.
        encoder: The embedded encoder.

    Returns:
        ``background_right`` and ``class_right``: 1.0 or 0.0 for each image, ``None`` where the prompt names none.
    """
    seen = encoder.classify(images)
    wanted = {
        "background": [named_background(prompt) for prompt in prompts],
        "class": [named_class(prompt, encoder.classes) for prompt in prompts],
    }
    return {
        f"{kind}_right": [
            None if name is None else float(name == guess) for name, guess in zip(names, seen[kind], strict=True)
        ]
        for kind, names in wanted.items()
    }
