"""Text encoders that Stable Diffusion 3 and HiDream-I1 share, with their tokenizers."""

from __future__ import annotations

from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .text import clip_tokenizer, t5_tokenizer


def clip_with_projection(
    tokenizer: CLIPTokenizer, width: int, projection: int, positions: int
) -> CLIPTextModelWithProjection:
    """A CLIP text model whose pooled output is projected; its start and end tokens are the tokenizer's."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModelWithProjection(config).eval()


def clip_t5_components(clip_widths: tuple[int, int], clip_positions: int, t5_width: int) -> dict[str, object]:
    """``text_encoder`` to ``text_encoder_3`` and their tokenizers; the CLIPs project to widths 12 and 8.

    Args:
        clip_widths: Widths of the two CLIPs' hidden states.
        clip_positions: Tokens of a prompt that the CLIPs see.
        t5_width: Width of T5's hidden states.
    """
    components: dict[str, object] = {}
    for suffix, width, projection in zip(("", "_2"), clip_widths, (12, 8), strict=True):
        tokenizer = clip_tokenizer()
        tokenizer.model_max_length = clip_positions
        components[f"tokenizer{suffix}"] = tokenizer
        components[f"text_encoder{suffix}"] = clip_with_projection(tokenizer, width, projection, clip_positions)
    words: T5TokenizerFast = t5_tokenizer()
    config = T5Config(vocab_size=len(words), d_model=t5_width, d_ff=32, d_kv=12, num_layers=2, num_heads=2)
    return {**components, "tokenizer_3": words, "text_encoder_3": T5EncoderModel(config).eval()}
