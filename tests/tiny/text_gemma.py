"""Gemma's word-level tokenizer and text encoder."""

from __future__ import annotations

import string

import torch
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from .text import WORDS


_SPACE = "\u2581"


def gemma_tokenizer() -> GemmaTokenizer:
    """Byte-pair encoding in which each known word, with the space before it, is one token or a few."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])}
    for piece in (*(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, *string.ascii_letters, *string.punctuation):
        vocabulary.setdefault(piece, len(vocabulary))
    merges: list[tuple[str, str]] = []
    for word in (*WORDS, "<Prompt", "Start>"):
        # Byte-pair merges that build each word from the left.
        pieces = list(word)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    for word in (*WORDS, "<Prompt", "Start>"):
        merges.append((_SPACE, word))
        vocabulary.setdefault(_SPACE + word, len(vocabulary))
    return GemmaTokenizer(
        vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=512, add_bos_token=True
    )


def gemma_encoder(vocabulary_size: int) -> Gemma2Model:
    """Two layers, hidden size 24."""
    torch.manual_seed(0)
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocabulary_size,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            query_pre_attn_scalar=12,
        )
    ).eval()
