"""Qwen tokenizers and text encoders: byte-pair encoding with chat markers, in which each known word is one token."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PaddleOCRVLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.utils import is_torchvision_available

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
    "Comprehend",
    "analyze",
    "provided",
    "prompt",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


IMAGE_MARKERS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def qwen2_tokenizer(**more_markers: str) -> Qwen2Tokenizer:
    """Byte-level pair encoding with ``<|im_start|>`` and ``<|im_end|>``, and a chat template."""
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more_markers.values()]
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
        extra_special_tokens=markers[1:3],
        model_specific_special_tokens=more_markers,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def qwen3_vl(vocab_size: int, num_layers: int) -> Qwen3VLModel:
    """Text width 16, with a vision tower as small as it gets."""
    return Qwen3VLModel(qwen3_vl_config(vocab_size, num_layers)).eval()


def qwen3_vl_with_head(words: Qwen2Tokenizer, num_layers: int) -> Qwen3VLForConditionalGeneration:
    """The same with a language-model head, for images of 32 pixels per token."""
    tokens = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    config = qwen3_vl_config(len(words), num_layers, patch_size=16)
    config.image_token_id, config.video_token_id = tokens["image_pad"], tokens["video_pad"]
    config.vision_start_token_id = tokens["vision_start"]
    return Qwen3VLForConditionalGeneration(config).eval()


def qwen3_vl_processor() -> Qwen3VLProcessor | PaddleOCRVLProcessor:
    """Processor of Qwen3-VL; without torchvision, which its videos insist on, one that does the same without them."""
    words = qwen2_tokenizer(**IMAGE_MARKERS)
    size = {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, temporal_patch_size=2, size=size)
    if is_torchvision_available():
        return Qwen3VLProcessor(images, words, Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    return PaddleOCRVLProcessor(images, words, chat_template=CHAT_TEMPLATE)


def qwen3_vl_config(vocab_size: int, num_layers: int, patch_size: int = 4) -> Qwen3VLConfig:
    """What :func:`qwen3_vl` makes; a patch of the vision tower is ``patch_size`` pixels wide."""
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
            "patch_size": patch_size,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )
