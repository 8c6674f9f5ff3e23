"""The prompts of a run, embedded once: text encoders are gone before the transformer is loaded."""

from __future__ import annotations

from typing import Any

from ..families import PromptEmbeds
from ..families.prompts import TrainedText, check_embeds, encode_prompts
from ..residuals.batches import SampleMaker
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
    pairs, image_prompts, image_embeds = maker.pairs(), run.image_prompts, None
    trained = list(pairs) or run.trained_prompts(maker.sources)
    prompts = list(dict.fromkeys([*trained, *(image_prompts if other is None else [])]))
    photos = maker.sources["instance"].prompts()
    options: dict[str, Any] = {"keep_trainable": run.settings.train_text_encoder, "photos": photos}
    placed: dict[str, Any] = {"dtype": maker.dtype, "device": maker.device, "streamed": streamed}
    placed["pairs"] = pairs | run.image_pairs
    number = len(prompts) + (len(image_prompts) if other else 0)
    with context.monitor.stage("encode"), context.progress.stage("encode", prompts=number) as progress:
        embeds, text = encode_prompts(family, prompts, progress=progress, **placed, **options)
        if other is not None:
            image_embeds, _ = encode_prompts(other, image_prompts, progress=progress, **placed)
    check_embeds(family, run.transformer_config, embeds, maker.dtype, trained if run.batches else [])
    maker.embeds = run.align(embeds, trained)
    return text, image_embeds
