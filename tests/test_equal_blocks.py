"""Of equal blocks a few are simulated, and the rest follows by arithmetic: the same as simulating them all."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from blockskip_hooks import BlockSkipConfig, PatchSamplingConfig, SpanResiduals
from blockskip_hooks.blocks import list_blocks
from blockskip_hooks.families import Family
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.loading.quantization import QuantizationConfig
from blockskip_hooks.planning import equal_blocks
from blockskip_hooks.planning.components import simulate_text_encoder
from blockskip_hooks.planning.counters import ALL_BLOCKS
from blockskip_hooks.planning.presets import preset_names
from tests.plans import Preset, fake_transformer, load_preset
from tests.tiny import TinyFamily


@dataclass(frozen=True)
class Setting:
    """What a simulation depends on beside the model; spans are shares of its blocks."""

    leading: float = 0
    trailing: float = 0
    dtype: torch.dtype = torch.bfloat16
    quantization: str = "none"
    checkpointing: bool = False
    accumulates: bool = False
    rank: int = 4


SETTINGS = {
    "plain": Setting(),
    "middle": Setting(0.3, 0.3, checkpointing=True, quantization="int8", rank=16),
    "leading": Setting(0.6, 0, quantization="nf4", accumulates=True, rank=64),
    "trailing": Setting(0.1, 0.7, checkpointing=True, accumulates=True, dtype=torch.float32),
}


def costs(family: Family, config: dict[str, Any], setting: Setting, side: int, text_tokens: int) -> dict[str, Any]:
    """Everything that the planner asks a simulated transformer for."""
    num_blocks = len(list_blocks(empty_model(config, family.transformer_class(config)), family.block_stacks))
    spans = BlockSkipConfig(leading=int(setting.leading * num_blocks), trailing=int(setting.trailing * num_blocks))
    preset = Preset(family, config)
    targets = preset.lora_targets(spans)
    fake = fake_transformer(
        family,
        config,
        spans,
        patch=PatchSamplingConfig(min_size=side, max_size=side, multiple=1),
        batch_size=2,
        text_tokens=text_tokens,
        rank=setting.rank,
        lora_targets=targets,
        weight_dtype=setting.dtype,
        recorded_layers=preset.recorded_layers(spans, targets),
        quantization=QuantizationConfig.named(setting.quantization),
        gradient_checkpointing=setting.checkpointing,
        gradient_accumulation_steps=2 if setting.accumulates else 1,
    )
    residuals, capture = SpanResiduals(), None
    if spans.num_skipped:
        capture, residuals = fake.capture(2)
    train = fake.train(residuals)
    infer = fake.infer(1, (side, side))
    return {
        "blocks": fake.num_blocks,
        "lora": sorted(fake.lora_sizes()),
        "capture": capture,
        "residuals": {name: tuple(tensor.shape) for name, tensor in residuals.tensors().items()},
        "train": train,
        "infer": infer,
    }


def deepened(config: dict[str, Any]) -> dict[str, Any]:
    """A tiny model's config with runs of equal blocks that are long enough to shorten."""
    deep = {**config, **{key: 6 for key in ("num_layers", "num_single_layers", "n_layers") if key in config}}
    if "llama_layers" in deep:
        deep["llama_layers"] = [0, 1] * 6
    return deep


def assert_equal_to_full_depth(monkeypatch: pytest.MonkeyPatch, *args: Any) -> None:
    """Live bytes to the byte; where the allocator's pieces come to lie is known less well."""
    short = costs(*args)
    monkeypatch.setattr(equal_blocks, "SIMULATED", 1000)
    full = costs(*args)
    assert short == full
    for work in ("capture", "train", "infer"):
        if full[work]:
            assert short[work].reserved_bytes == pytest.approx(full[work].reserved_bytes, rel=0.1), work


def test_tiny_models_cost_what_their_full_depth_costs(tiny: TinyFamily, monkeypatch: pytest.MonkeyPatch):
    """The trailing span reaches over the border between two stacks, where there is one."""
    config = deepened(load_config(tiny.folder / "transformer"))
    family, setting = tiny.make_family(), SETTINGS["trailing"]
    if any(layout.only for layout in family.block_layouts.values()):
        # Behind it there must be a block of the image to train.
        setting = replace(setting, trailing=0.5)
    assert_equal_to_full_depth(monkeypatch, family, config, setting, tiny.resolution, tiny.text_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["plain", "middle", "leading"])
def test_tiny_models_cost_the_same_in_other_settings(tiny: TinyFamily, setting: str, monkeypatch: pytest.MonkeyPatch):
    config = deepened(load_config(tiny.folder / "transformer"))
    family = tiny.make_family()
    assert_equal_to_full_depth(monkeypatch, family, config, SETTINGS[setting], tiny.resolution, tiny.text_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", preset_names())
def test_public_models_cost_what_their_full_depth_costs(name: str, setting: str, monkeypatch: pytest.MonkeyPatch):
    preset = load_preset(name)
    assert_equal_to_full_depth(monkeypatch, preset.family, preset.transformer_config, SETTINGS[setting], 256, 64)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", preset_names())
def test_text_encoders_cost_what_their_full_depth_costs(name: str, streamed: bool, monkeypatch: pytest.MonkeyPatch):
    preset = load_preset(name)
    for config in preset.text_encoders:
        simulate = functools.partial(
            simulate_text_encoder,
            config,
            1,
            64,
            torch.bfloat16,
            streamed=streamed,
            call=preset.family.text_call(config),
        )
        short = simulate()
        with monkeypatch.context() as patch:
            patch.setattr(equal_blocks, "SIMULATED", 1000)
            assert short == simulate()


def test_a_run_is_its_first_two_blocks_and_its_last():
    model = torch.nn.Module()
    model.add_module("blocks", torch.nn.ModuleList(torch.nn.Linear(2, 2 if i < 6 else 3) for i in range(8)))
    blocks = [(f"blocks.{name}", equal_blocks.kind_of(block)) for name, block in model.blocks.named_children()]
    depth = equal_blocks.shorten(model, blocks)
    assert [layer.out_features for layer in model.blocks] == [2, 2, 2, 3, 3]
    assert depth.copies == {"blocks.1": 3}
    assert depth.names == {f"blocks.{old}": f"blocks.{new}" for new, old in enumerate([0, 1, 5, 6, 7])}
    names = [name for name, _ in blocks]
    assert depth.renamed(["blocks.2.a", "blocks.6.a", "other.0.a"], names) == ["blocks.3.a", "other.0.a"]
    assert [depth.times(name) for name in ("blocks.0.weight", "blocks.1.weight", "other")] == [1, 4, 1]


def test_the_peak_is_that_of_the_first_or_the_last_copy():
    grows = equal_blocks.Phase("b", 100, 10, 3, 1)
    shrinks = equal_blocks.Phase("b", 130, -20, 6, 2)
    depth = equal_blocks.Depth({"b": 4}, {})
    assert depth.in_full([grows], 7) == equal_blocks.Phase(None, 147, 0, 15, 5)
    assert depth.in_full([shrinks], 0) == equal_blocks.Phase(None, 130, 0, 30, 10)
    # The copies leave 40 bytes; what is done for all blocks frees 3 bytes of each.
    loss = equal_blocks.Phase(ALL_BLOCKS, 120, -3, 0, 0, {"b": 3})
    after = equal_blocks.Phase("c", 121, 0, 0, 0)
    assert depth.in_full([grows, loss, after], 0).peak_bytes == max(140, 160, 121 + 40 - 12)
