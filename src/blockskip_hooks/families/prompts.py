"""Stage encode: every prompt once, then the text encoders are gone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import free_memory
from PIL import Image

from ..loading.text_encoders import large_encoders
from ..utils.errors import UserError, first_line
from ..utils.progress import StageProgress, listed
from . import Family, PromptEmbeds
from .base import no_progress_bar
from .token_limits import describe_cut, measured_prompt


logger = logging.getLogger(__name__)

PROGRESS_FROM = 32

Pair = Callable[[], tuple[str, Image.Image]]
"""Makes a prompt and the condition image that text encoders see with it."""


@dataclass
class TrainedText:
    """The text encoders that train along, by pipeline component, and the tokens of every prompt for each of them."""

    encoders: dict[str, torch.nn.Module]
    tokens: dict[str, dict[str, torch.Tensor]]

    def batch_tokens(self, prompts: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Token ids ``(B, S)`` of some of the prompts, by component."""
        return {
            name: torch.stack([self.tokens[prompt][name] for prompt in prompts]).to(device) for name in self.encoders
        }


def check_embeds(
    family: Family,
    transformer_config: Mapping[str, Any],
    embeds: Mapping[str, PromptEmbeds],
    dtype: torch.dtype,
    together: Sequence[str] = (),
) -> None:
    """Check that prompts' embeddings are what the transformer takes, before it is loaded.

    Args:
        family: The model's family.
        transformer_config: Config of the transformer.
        embeds: Embeddings by prompt.
        dtype: Their dtype.
        together: Prompts that may share a batch.

    Raises:
        UserError: if text encoders and transformer are of different models, or prompts cannot share a batch.
    """
    by_shape = {tuple(t.shape for t in embeds[prompt].values()): embeds[prompt] for prompt in together}
    if by_shape:
        family.collate_embeds(list(by_shape.values()))
    most = max(family.flags["max_sequence_length"], 2)
    shorter, longer = (family.empty_embeds(transformer_config, tokens, dtype) for tokens in (1, most))
    for embedded in embeds.values():
        for name in shorter.keys() & embedded.keys():
            # Axes of tokens are as long as the prompt.
            sizes = zip(shorter[name].shape, longer[name].shape, embedded[name].shape)
            if any(first == second != size for first, second, size in sizes):
                raise UserError(
                    f"--pretrained_model_name_or_path {family.model_path}: its text encoders make {name} of shape "
                    f"{tuple(embedded[name].shape)}, and its transformer takes {tuple(longer[name].shape)} for "
                    f"{most} tokens; they are of different models."
                )


def encode_prompts(
    family: Family,
    prompts: Sequence[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep_trainable: bool = False,
    streamed: bool = False,
    progress: StageProgress | None = None,
    adapt: Callable[[DiffusionPipeline], None] | None = None,
    photos: Mapping[str, Sequence[str]] | None = None,
    pairs: Mapping[str, Pair] | None = None,
) -> tuple[dict[str, PromptEmbeds], TrainedText | None]:
    """Embed prompts and free the text encoders.

    Args:
        family: The model's family.
        prompts: Prompts; repeated ones are encoded once.
        dtype: Dtype of the encoders.
        device: Where they run.
        keep_trainable: Return the encoders that ``--train_text_encoder`` adapts instead of freeing them.
        streamed: Read the layers of large encoders from the checkpoint while they run, again for every prompt; the
            embeddings are the same.
        progress: The running stage, which advances by one per prompt; by default many prompts get a bar of their own.
        adapt: Changes the text pipeline before it is used: loads a LoRA, say.
        photos: Names of the photos by prompt, for the warning of prompts that are longer than the model reads.
        pairs: What makes prompts and condition images that are encoded together, one at a time, by the entries of
            ``prompts`` that stand for them.

    Returns:
        Embeddings by prompt, on the CPU, and the kept encoders.

    Raises:
        UserError: if text encoders or tokenizers cannot be loaded; naming the prompt, if the model's pipeline does not
            take it or its embeddings are not finite.
    """
    prompts = list(dict.fromkeys(prompts))
    layered: list[str] = []
    if streamed:
        streamable = family.streamable_text_encoders(trains_text=keep_trainable)
        layered = [name for name in large_encoders(family.text_encoder_configs()) if name in streamable]
    pipeline = _load(family, dtype, device, layered)
    if adapt is not None:
        adapt(pipeline)
    embeds: dict[str, PromptEmbeds] = {}
    cut: dict[str, tuple[int, int]] = {}
    # One at a time: in a batch the last bits of a prompt's embeddings would depend on the others.
    shown = progress is None and len(prompts) >= PROGRESS_FROM
    for prompt in listed(prompts, "Encoding prompts", "prompt", total=len(prompts), shown=shown):
        try:
            with measured_prompt(family.kept_tokens(pipeline)) as lengths:
                (encoded,) = _encode(family, pipeline, prompt, pairs)
        except ValueError as error:
            of_photos = f" of {', '.join(photos[prompt])}" if photos and photos.get(prompt) else ""
            raise UserError(
                f"The prompt '{prompt[:80]}'{of_photos} cannot be encoded ({error}); change it, or "
                "--max_sequence_length."
            ) from error
        if lengths.cut is not None:
            cut[prompt] = lengths.cut
        # Copies, because a view would keep all of what it is a part of.
        embeds[prompt] = {name: tensor.clone() for name, tensor in encoded.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in encoded.values()):
            raise UserError(
                f"The text encoders make embeddings that are not finite of the prompt '{prompt[:80]}'; give another "
                "--mixed_precision, or check the encoders' files."
            )
        if progress is not None:
            progress.update()
    if cut:
        logger.warning(describe_cut(cut, sum(map(bool, prompts)), photos))  # Nobody wrote the empty one of guidance.
    trained = None
    if keep_trainable:
        tokens = family.prompt_tokens(pipeline, prompts)
        rows = {prompt: {name: ids[row] for name, ids in tokens.items()} for row, prompt in enumerate(prompts)}
        trained = TrainedText(family.trainable_text_encoders(pipeline), rows)
    # The pipeline holds the last references to the encoders.
    del pipeline
    free_memory()
    return embeds, trained


def _encode(
    family: Family, pipeline: DiffusionPipeline, prompt: str, pairs: Mapping[str, Pair] | None
) -> list[PromptEmbeds]:
    if pairs and prompt in pairs:
        return family.encode_pairs(pipeline, [pairs[prompt]()])
    return family.encode_prompts(pipeline, [prompt])


def _load(family: Family, dtype: torch.dtype, device: torch.device, streamed: Sequence[str]) -> DiffusionPipeline:
    try:
        with no_progress_bar():
            return family.load_text_pipeline(dtype, device, streamed)
    except (UserError, OSError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # tokenizers raise types of their own
        raise UserError(
            f"--pretrained_model_name_or_path {family.model_path}: its text encoders or tokenizers cannot be loaded "
            f"({first_line(error)}); download it again."
        ) from error


def place_embeds(embeds: PromptEmbeds, device: torch.device | str, dtype: torch.dtype) -> PromptEmbeds:
    """Move embeddings to a device; masks and other numbers that are not floating keep their dtype."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in embeds.items()
    }
