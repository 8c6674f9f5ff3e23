"""Plans of a tiny model: a preset of it, the request with small settings, one stage of what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from blockskip_hooks import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.families import FAMILIES, Family
from blockskip_hooks.planning.presets import Preset, load_preset
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.simulation import FakeTransformer
from tests.tiny import TINY_FAMILIES


TEXT_TOKENS = 5
LAYERS = ["attn.to_q", "attn.to_k", "attn.to_v"]


def tiny_preset(folder: Path) -> Preset:
    """A tiny FLUX as a preset, with the scheduler of the real one, which is written to ``folder``."""
    load_preset("flux.1-dev").family.scheduler.save_pretrained(folder / "scheduler")
    vae = {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    transformer = TINY_FAMILIES[0].make_transformer()
    config = {**transformer.config, "_class_name": type(transformer).__name__}
    return Preset("tiny", FAMILIES["FluxPipeline"](folder), config)


def fake_transformer(
    family: Family, config: dict[str, Any], spans: BlockSkipConfig, **settings: Any
) -> FakeTransformer:
    """A simulated transformer, without LoRA unless ``settings`` name its targets."""
    patch = PatchSamplingConfig(min_size=32, max_size=32, multiple=1)
    given = {"patch": patch, "rank": 1, "lora_targets": (), "weight_dtype": torch.float32, **settings}
    return FakeTransformer(PlanRequest(family=family, transformer_config=config, config=spans, **given))


def request_for(preset: Preset, leading: int = 0, trailing: int = 0, side: int = 32, **changes: Any) -> PlanRequest:
    config = BlockSkipConfig(leading=leading, trailing=trailing)
    settings: dict[str, Any] = {
        "family": preset.family,
        "transformer_config": preset.transformer_config,
        # What the plan is held to are real tensors of a CPU.
        "device": "cpu",
        "config": config,
        "patch": PatchSamplingConfig(min_size=side, max_size=side, multiple=preset.family.latent_token_size),
        "rank": 4,
        "lora_targets": preset.lora_targets(config, LAYERS),
        "batch_size": 2,
        "text_tokens": TEXT_TOKENS,
        "weight_dtype": torch.float32,
        "cache_latents": True,
        "num_samples": 20,
        "precompute_batch_size": 1,
    }
    return PlanRequest(**{**settings, **changes})


def stage(plan: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in plan["stages"] if stage["name"] == name)
