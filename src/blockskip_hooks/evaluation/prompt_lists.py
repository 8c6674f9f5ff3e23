"""Prompts of an evaluation: templates that ship with the package, a user's own, and the embedded subjects'."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..embedded import BACKGROUND_PHRASES, embedded_subjects
from ..utils.errors import UserError


PLACEHOLDER = "{}"
CLASS_KINDS = ("object", "live")
"""Things, and people or animals: each has 25 templates."""


@dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt.

    Attributes:
        text: What the model is given.
        description: What an encoder that reads text is given: the same with ordinary words for the subject, since no
            encoder knows the rare token.
        kind: What it changes: recontextualisation, accessory or property; ``None`` if that is not said.
    """

    text: str
    description: str
    kind: str | None = None


def template_file(class_kind: str) -> Path:
    """The shipped templates of things (``"object"``) or of people and animals (``"live"``)."""
    return Path(str(resources.files(__package__))) / "prompts" / f"{class_kind}.txt"


def read_prompts(file: Path, phrase: str, class_phrase: str) -> tuple[EvaluationPrompt, ...]:
    """Fill the templates of a file: one on a line, ``{}`` for the subject; a line of ``# kind`` comes before its kind.

    Args:
        file: The file, UTF-8.
        phrase: What the model knows the subject by, ``"sks dog"`` say.
        class_phrase: Ordinary words for it, ``"a dog"`` say.

    Raises:
        UserError: naming the file and the line.
    """
    if not file.is_file():
        raise UserError(f"--prompts {file} is not a file; correct the name.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file} cannot be read as UTF-8 text; correct the file.") from error
    prompts: dict[str, EvaluationPrompt] = {}
    kind = None
    for number, line in enumerate(lines, 1):
        template = line.strip()
        if template.startswith("#"):
            kind = template.strip("# ") or None
        elif template:
            if PLACEHOLDER not in template:
                raise UserError(f"--prompts {file}, line {number} has no {PLACEHOLDER} for the subject; add it.")
            text, description = (template.replace(PLACEHOLDER, words) for words in (phrase, class_phrase))
            if text in prompts:
                raise UserError(f"--prompts {file}, line {number} repeats a prompt; remove it.")
            prompts[text] = EvaluationPrompt(text, description, kind)
    if not prompts:
        raise UserError(f"--prompts {file} holds no prompt; write one on each line, with {PLACEHOLDER}.")
    return tuple(prompts.values())


def embedded_prompts(subject: str) -> tuple[EvaluationPrompt, ...]:
    """The validation prompts of an embedded subject: the embedded model knows few words beside them."""
    described = embedded_subjects()[subject]
    phrase, words = subject_phrase(described["instance_prompt"]), f"a {described['class']}"
    return tuple(
        EvaluationPrompt(text, text.replace(phrase, words), "recontextualisation")
        for text in described["validation_prompts"]
    )


def background_prompts(phrase: str, class_phrase: str) -> tuple[EvaluationPrompt, ...]:
    """A subject of one's own on each background that the embedded model knows.

    Args:
        phrase: What the model knows the subject by, ``"sks mug"`` say.
        class_phrase: Ordinary words for it, ``"a mug"`` say.
    """
    return tuple(
        EvaluationPrompt(f"a photo of {phrase} {place}", f"a photo of {class_phrase} {place}", "recontextualisation")
        for place in BACKGROUND_PHRASES.values()
    )


def subject_phrase(instance_prompt: str) -> str:
    """What an instance prompt calls the subject: ``"sks dog"`` of ``"a photo of sks dog"``."""
    _, opening, rest = instance_prompt.partition("photo of ")
    return rest if opening and rest else instance_prompt
