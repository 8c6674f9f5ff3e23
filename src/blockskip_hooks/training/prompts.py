"""The prompts of a run: what they are trained and drawn with, and what text encoders see beside them."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image

from ..data.sample_plan import SampleKind
from ..families import PromptEmbeds
from ..residuals.batches import PhotoSource
from .run import Run


def trained_prompts(run: Run, sources: dict[SampleKind, PhotoSource]) -> list[str]:
    """Every prompt that is trained with."""
    prompts = [prompt for source in sources.values() for prompt in source.prompts()]
    return list(dict.fromkeys([*prompts, *[""] * (run.settings.caption_dropout > 0)]))


def image_prompts(run: Run) -> list[str]:
    """Every prompt that validation images need embeddings of."""
    if not run.makes_images:
        return []
    return [*run.prompts, *run.final_prompts, *([] if run.negative_prompt is None else [run.negative_prompt])]


def image_pairs(run: Run) -> dict[str, tuple[str, Image.Image]]:
    """The prompts of validation images with the condition image, where text encoders see both."""
    prompts = image_prompts(run)
    if not run.encodes_pairs or not prompts:
        return {}
    kwargs = run.image_kwargs
    shown = run.family.shown_condition(kwargs["image"], kwargs)
    return {prompt: (prompt, shown) for prompt in prompts}


def align_prompts(run: Run, embeds: dict[str, PromptEmbeds], trained: Iterable[str]) -> dict[str, PromptEmbeds]:
    """Embeddings by prompt, the trained ones of one length where the family's batches need it."""
    if not run.aligns_prompts:
        return embeds
    return embeds | run.family.align_embeds({prompt: embeds[prompt] for prompt in trained})
