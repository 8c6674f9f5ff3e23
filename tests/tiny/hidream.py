"""Tiny HiDream-I1 pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockskip_hooks.families.hidream import HiDream

from .base import TinyFamily, randomise, tiny_vae
from .text import WORDS
from .text_sd3 import clip_t5_components


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each known word, after a token that begins the text; nothing for padding, like the real one."""
    begin, end, unknown = "<|begin_of_text|>", "<|eot_id|>", "<unk>"
    words = Tokenizer(WordLevel({w: i for i, w in enumerate([begin, end, unknown, *WORDS])}, unk_token=unknown))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=begin, eos_token=end, unk_token=unknown, model_max_length=128
    )


def _transformer() -> HiDreamImageTransformer2DModel:
    torch.manual_seed(0)
    return randomise(
        HiDreamImageTransformer2DModel(
            # The pipeline always makes 128 x 128 latents, so patches are large to keep tokens few.
            patch_size=8,
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[24, 16],
            text_emb_dim=20,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 6, 6),
            llama_layers=[0, 1, 2, 2, 2],
        )
    )


def save_tiny_hidream(folder: Path) -> Path:
    """Write a whole pipeline of the real classes: VAE factor 2 and patches of 8, so latent tokens are 16 px."""
    torch.manual_seed(0)
    words = _llama_tokenizer()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    vae = tiny_vae(2, scaling_factor=0.8, shift_factor=0.1)
    HiDreamImagePipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=vae.eval(),
        text_encoder_4=llama.eval(),
        tokenizer_4=words,
        transformer=_transformer(),
        **clip_t5_components((12, 16), clip_positions=128, t5_width=24),
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))
    return folder


TINY = [TinyFamily("hidream", HiDream, save_tiny_hidream, num_blocks=5)]
