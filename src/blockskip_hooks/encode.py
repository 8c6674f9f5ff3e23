"""Stage encode: every prompt once, then the text encoders are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .families import Family, PromptEmbeds


PROMPTS_AT_ONCE = 8


@dataclass
class TrainedText:
    """The text encoder that trains along, and its tokens of every prompt."""

    encoder: PreTrainedModel
    tokens: dict[str, torch.Tensor]


def encode_prompts(
    family: Family,
    prompts: Sequence[str],
    *,
    max_sequence_length: int,
    dtype: torch.dtype,
    device: torch.device,
    keep_trainable: bool = False,
    show_progress: bool = True,
) -> tuple[dict[str, PromptEmbeds], TrainedText | None]:
    """Embed prompts and free the text encoders.

    Args:
        family: The model's family.
        prompts: Prompts; repeated ones are encoded once.
        max_sequence_length: Tokens of the long text encoder.
        dtype: Dtype of the encoders.
        device: Where they run.
        keep_trainable: Return the encoder that ``--train_text_encoder`` adapts instead of freeing it.
        show_progress: Show a bar when there are many prompts.

    Returns:
        Embeddings by prompt, on the CPU, and the kept encoder.
    """
    prompts = list(dict.fromkeys(prompts))
    pipeline = family.load_text_pipeline(dtype, device)
    embeds: dict[str, PromptEmbeds] = {}
    progress = tqdm(
        total=len(prompts), desc="Encoding prompts", disable=not show_progress or len(prompts) <= 4 * PROMPTS_AT_ONCE
    )
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        embeds.update(zip(part, family.encode_prompts(pipeline, part, max_sequence_length), strict=True))
        progress.update(len(part))
    progress.close()
    trained = None
    if keep_trainable:
        tokens = dict(zip(prompts, family.prompt_tokens(pipeline, prompts), strict=True))
        trained = TrainedText(family.trainable_text_encoder(pipeline), tokens)
    # The pipeline holds the last references to the encoders.
    del pipeline
    free_memory()
    return embeds, trained
