"""Plans of a tiny model: a preset of it, the request with small settings, one stage of what comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, PatchSamplingConfig, lora_targets
from blockskip_hooks.blocks import modulation_layers
from blockskip_hooks.families import FAMILIES, Family
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.planning.presets import preset_family
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.simulation import FakeTransformer
from tests.tiny import TINY_FAMILIES


TEXT_TOKENS = 5
LAYERS = ["attn.to_q", "attn.to_k", "attn.to_v"]


@dataclass(frozen=True)
class Preset:
    """A model of public architecture, without its files."""

    family: Family
    transformer_config: dict[str, Any]
    text_encoders: list[dict[str, Any]] = field(default_factory=list)

    def skeleton(self, config: BlockSkipConfig) -> DiTBlockSkipTransformer:
        """The transformer without weights, placeholders on."""
        return DiTBlockSkipTransformer(
            empty_model(self.transformer_config, self.family.transformer_class(self.transformer_config)),
            config,
            self.family.block_stacks,
        )

    def lora_targets(self, config: BlockSkipConfig, layers: Sequence[str] | None = None) -> list[str]:
        """Full names of the layers that get LoRA, by default those that the family names."""
        return lora_targets(self.skeleton(config), layers or self.family.lora_layers, self.family.text_stream_layers)

    def recorded_layers(self, config: BlockSkipConfig, targets: Sequence[str]) -> tuple[str, ...]:
        """Modulation layers of kept blocks without LoRA, whose outputs records hold; none if nothing is skipped."""
        if not config.num_skipped:
            return ()
        names = modulation_layers(self.skeleton(config).spans, self.family.modulation_layers)
        return tuple(name for name in names if name not in targets)


def load_preset(name: str) -> Preset:
    family = preset_family(name)
    encoders = list(family.text_encoder_configs().values())
    return Preset(family, load_config(family.model_path / "transformer"), encoders)


def tiny_preset(folder: Path) -> Preset:
    """A tiny FLUX as a preset, with the scheduler of the real one, which is written to ``folder``."""
    preset_family("flux.1-dev").scheduler.save_pretrained(folder / "scheduler")
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
    return Preset(FAMILIES["FluxPipeline"](folder), config)


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
