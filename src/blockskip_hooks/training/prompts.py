"""The prompts of a run, embedded once: text encoders are gone before the transformer is loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

from PIL import Image

from ..data.sample_plan import SampleKind
from ..families import PromptEmbeds
from ..families.prompts import Pair, TrainedText, check_embeds, encode_prompts
from ..residuals.batches import PhotoSource, SampleMaker
from .context import Context
from .run import Run


def embed_prompts(
    run: Run, context: Context, maker: SampleMaker, streamed: bool
) -> tuple[TrainedText | None, dict[str, PromptEmbeds] | None]:
    """Give ``maker`` the embeddings of every prompt.

    Args:
        run: The run.
        context: Where it runs.
        maker: What builds batches, with the photos and their prompts.
        streamed: Whether layers of large text encoders are read from the checkpoint while they run.

    Returns:
        The text encoders that train along, and prompts' embeddings by another model that makes the images if there is
        one.

    Raises:
        UserError: see :func:`~blockskip_hooks.families.prompts.encode_prompts` and
            :func:`~blockskip_hooks.families.prompts.check_embeds`.
    """
    family, other = run.family, run.validation_family
    pairs, wanted, image_embeds = maker.pairs(), image_prompts(run), None
    trained = list(pairs) or trained_prompts(run, maker.sources)
    prompts = list(dict.fromkeys([*trained, *(wanted if other is None else [])]))
    photos = maker.sources["instance"].prompts()
    options: dict[str, Any] = {"keep_trainable": run.settings.train_text_encoder, "photos": photos}
    placed: dict[str, Any] = {"dtype": maker.dtype, "device": maker.device, "streamed": streamed}
    placed["pairs"] = pairs | image_pairs(run)
    number = len(prompts) + (len(wanted) if other else 0)
    with context.monitor.stage("encode"), context.progress.stage("encode", prompts=number) as progress:
        embeds, text = encode_prompts(family, prompts, progress=progress, **placed, **options)
        if other is not None:
            image_embeds, _ = encode_prompts(other, wanted, progress=progress, **placed)
    check_embeds(family, run.transformer_config, embeds, maker.dtype, trained if run.batches else [])
    # The trained ones are of one length where the family's batches need it.
    aligned = family.align_embeds({prompt: embeds[prompt] for prompt in trained}) if run.aligns_prompts else {}
    maker.embeds = embeds | aligned
    return text, image_embeds


def trained_prompts(run: Run, sources: dict[SampleKind, PhotoSource]) -> list[str]:
    """Every prompt that is trained with."""
    prompts = [prompt for source in sources.values() for prompt in source.prompts()]
    return list(dict.fromkeys([*prompts, *[""] * (run.settings.caption_dropout > 0)]))


def image_prompts(run: Run) -> list[str]:
    """Every prompt that validation images need embeddings of, the negative one among them."""
    if not run.makes_images:
        return []
    negative = run.image_negative_prompt
    return list(dict.fromkeys([*run.prompts, *run.final_prompts, *([] if negative is None else [negative])]))


def image_pairs(run: Run) -> dict[str, Pair]:
    """The prompts of validation images with the condition image, where text encoders see both."""
    kwargs = run.image_kwargs
    if not run.image_family.reads_condition or "image" not in kwargs:
        return {}
    shown = run.image_family.shown_condition(kwargs["image"], kwargs)
    return {prompt: partial(_shown_with, prompt, shown) for prompt in image_prompts(run)}


def _shown_with(prompt: str, image: Image.Image) -> tuple[str, Image.Image]:
    return prompt, image
