"""Tiny models of every family: real classes, random weights, small enough for seconds on one core."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny transformer and the inputs of one forward.

    Attributes:
        name: Family and variant.
        make_transformer: Builds the transformer with weights from a fixed seed.
        make_inputs: Builds keyword inputs for a batch size.
        num_blocks: N.
    """

    name: str
    make_transformer: Callable[[], torch.nn.Module]
    make_inputs: Callable[[int], dict[str, Any]]
    num_blocks: int


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter weight enough that each block changes its input: zero-initialised gates would hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.7 / fan_in**0.5) if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def _flux(guidance_embeds: bool) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return randomise(
            FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=24,
                pooled_projection_dim=20,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            )
        )

    return make


def _flux_inputs(guidance_embeds: bool) -> Callable[[int], dict[str, Any]]:
    def make(batch_size: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        side, text = 4, 5
        img_ids = torch.zeros(side, side, 3)
        img_ids[..., 1] += torch.arange(side)[:, None]
        img_ids[..., 2] += torch.arange(side)[None]
        return {
            "hidden_states": torch.randn(batch_size, side * side, 16, generator=generator),
            "encoder_hidden_states": torch.randn(batch_size, text, 24, generator=generator),
            "pooled_projections": torch.randn(batch_size, 20, generator=generator),
            "timestep": torch.rand(batch_size, generator=generator),
            "guidance": torch.full((batch_size,), 3.5) if guidance_embeds else None,
            "img_ids": img_ids.reshape(-1, 3),
            "txt_ids": torch.zeros(text, 3),
        }

    return make


TINY_FAMILIES = [
    TinyFamily("flux-dev", _flux(True), _flux_inputs(True), 5),
    TinyFamily("flux-schnell", _flux(False), _flux_inputs(False), 5),
]


WORDS = ["a", "photo", "of", "sks", "dog", "cat", "on", "in", "the", "red", "blue", "beach", "snow", "object"]


def _tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Word-level tokenizers of the real classes."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {
        token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in WORDS)])
    }
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary.setdefault(letter, len(vocabulary))
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    merges = []
    for word in WORDS:
        # Byte-pair merges that build each word from the left.
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in dict.fromkeys(merges)))
    clip = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), *((f"▁{word}", 0.0) for word in WORDS), ("▁", -20.0)]
    pieces += [(letter, -20.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = Tokenizer(Unigram(pieces, unk_id=2))
    words.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="always")
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast", **names}))
    t5 = T5TokenizerFast.from_pretrained(folder)
    return clip, t5


def save_tiny_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    """Write a whole FLUX pipeline of the real classes: VAE factor 4, so latent tokens are 8 px."""
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = _tokenizers(folder / "tokenizer_files")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=20,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=20,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer), d_model=24, d_ff=32, d_kv=12, num_layers=2, num_heads=2)
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.8,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=_flux(guidance_embeds)(),
    ).save_pretrained(folder)
    images = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))
    return folder
