"""Qwen tokenizers and text encoders: byte-pair encoding with chat markers, in which each known word is one token."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

from .text import WORDS


# Krea 2 cuts a fixed number of tokens off its template, so each of the template's words must be one token too.
TEMPLATE_WORDS = [
    "system",
    "user",
    "assistant",
    "Describe",
    "the",
    "image",
    "by",
    "detailing",
    "color",
    "shape",
    "size",
    "texture",
    "quantity",
    "text",
    "spatial",
    "relationships",
    "of",
    "objects",
    "and",
    "background",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen2_tokenizer() -> Qwen2Tokenizer:
    """Byte-level pair encoding with ``<|im_start|>`` and ``<|im_end|>``, and a chat template."""
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*markers, *sorted(ByteLevel.alphabet())])}
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(start + word for word in [*WORDS, *TEMPLATE_WORDS] for start in ("", "Ġ")):
        # A new merge comes after all others, so words that were one token stay so.
        first, *rest = Tokenizer(BPE(vocabulary, merges)).encode(word).tokens
        for piece in rest:
            merges.append((first, piece))
            first += piece
            vocabulary.setdefault(first, len(vocabulary))
    return Qwen2Tokenizer(
        vocabulary,
        merges,
        pad_token=markers[0],
        extra_special_tokens=markers[1:],
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def qwen3_vl(vocab_size: int, num_layers: int) -> Qwen3VLModel:
    """Text width 16, with a vision tower as small as it gets."""
    return Qwen3VLModel(qwen3_vl_config(vocab_size, num_layers)).eval()


def qwen3_vl_config(vocab_size: int, num_layers: int) -> Qwen3VLConfig:
    """What :func:`qwen3_vl` makes."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )
