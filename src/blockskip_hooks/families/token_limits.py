"""Prompts that are longer than a model reads: their ends change nothing, and most pipelines do not say so."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import CLIPTokenizer, PreTrainedTokenizerBase


_NAMED = 5
_QUOTED = 40


@dataclass
class PromptLengths:
    """Tokens of a prompt in each text encoder that reads it, and how many that encoder takes.

    Attributes:
        limit: Tokens that the pipeline keeps of what its tokenizers return; ``None`` where they cut it themselves.
        read: Tokens, the model's own words around the prompt among them, and limit, of every tokenizer.
        pooled: The same of CLIP, of which only one vector for the whole prompt is used beside other encoders.
    """

    limit: int | None = None
    read: list[tuple[int, int]] = field(default_factory=list)
    pooled: list[tuple[int, int]] = field(default_factory=list)

    @property
    def cut(self) -> tuple[int, int] | None:
        """Tokens and limit of the encoder that loses most of the prompt, or ``None`` if nothing is lost."""
        longer = [(tokens, limit) for tokens, limit in self.read or self.pooled if tokens > limit]
        return max(longer, key=lambda length: length[0] - length[1], default=None)


@contextmanager
def measured_prompt(limit: int | None = None) -> Iterator[PromptLengths]:
    """Measure what tokenizers cut while a pipeline encodes a prompt in this context.

    What a pipeline puts around a prompt, and how much of it it takes, is its own affair; so what its tokenizers are
    asked for is looked at, whichever they are.
    """
    lengths, original = PromptLengths(limit), PreTrainedTokenizerBase.__call__

    def measured(tokenizer: Any, text: Any = None, *args: Any, **settings: Any) -> Any:
        most = settings.get("max_length")
        if settings.get("truncation") and most is not None:
            special = {k: v for k, v in settings.items() if k == "add_special_tokens"}
            texts = [text] if isinstance(text, str) else text
            tokens = max(len(ids) for ids in original(tokenizer, texts, verbose=False, **special)["input_ids"])
            found = lengths.pooled if isinstance(tokenizer, CLIPTokenizer) else lengths.read
            found.append((tokens, most if lengths.limit is None else min(most, lengths.limit)))
        return original(tokenizer, text, *args, **settings)

    handlers = logging.getLogger("diffusers").handlers
    PreTrainedTokenizerBase.__call__ = measured
    try:
        for handler in handlers:
            handler.addFilter(_is_news)
        yield lengths
    finally:
        PreTrainedTokenizerBase.__call__ = original
        for handler in handlers:
            handler.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a pipeline says something else than what is said here, once for all prompts."""
    return "was truncated because" not in record.getMessage()


def describe_cut(
    cut: Mapping[str, tuple[int, int]], num_prompts: int, photos: Mapping[str, Sequence[str]] | None = None
) -> str:
    """One line on prompts whose ends are not read.

    Args:
        cut: Tokens and limit by prompt.
        num_prompts: Prompts in all.
        photos: Names of the photos of a prompt; a prompt of none is quoted.
    """
    named = []
    for prompt, (tokens, limit) in list(cut.items())[:_NAMED]:
        quoted = f"'{prompt[:_QUOTED]}…'"
        who = ", ".join((photos or {}).get(prompt, [])[:_NAMED]) or quoted
        named.append(f"{who}: {tokens} tokens, limit {limit}")
    more = f"; and {len(cut) - _NAMED} more" if len(cut) > _NAMED else ""
    return (
        f"The text encoder does not read the end of {len(cut)} of {num_prompts} prompts ({'; '.join(named)}{more}); "
        "shorten them, or raise --max_sequence_length where the model allows it."
    )
