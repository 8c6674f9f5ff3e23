"""Presets of public models: their architectures are the published ones, and runs can be planned with them."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from importlib import resources
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
import transformers

from blockskip_hooks.blocks import list_blocks
from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.planning import presets
from blockskip_hooks.planning.components import simulate_text_encoder
from blockskip_hooks.planning.presets import preset_names
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import plan_run
from blockskip_hooks.selection import select_blocks
from tests.plans import Preset, load_preset
from tests.tiers import fast_first


class Published(NamedTuple):
    """What is known of a model from elsewhere.

    Attributes:
        blocks: Blocks that can be skipped.
        billions: Size of the transformer as stored, tables of positions included.
        text_billions: Sizes of the text encoders.
        resolution: Side in pixels that the model makes at its best.
        token_pixels: Side in pixels of one transformer token.
    """

    blocks: int
    billions: float
    text_billions: tuple[float, ...]
    resolution: int
    token_pixels: int


CLIP_L, CLIP_G, T5_XXL = 0.1237, 0.6947, 4.762
QWEN3_4B, QWEN3_8B, QWEN_VL_7B, QWEN3_VL_4B, GEMMA_2B, MISTRAL_24B = 4.022, 8.191, 8.292, 4.438, 2.614, 24.01
QWEN3_VL_8B = 8.767
# Sizes are those of the weight files where they are known, otherwise those in the model's name.
PUBLISHED = {
    "flux.1-dev": Published(57, 11.90, (0.1231, T5_XXL), 1024, 16),
    "flux.1-schnell": Published(57, 11.89, (0.1231, T5_XXL), 1024, 16),
    "flux.2-dev": Published(56, 32.22, (MISTRAL_24B,), 1024, 16),
    "flux.2-klein-4b": Published(25, 3.876, (QWEN3_4B,), 1024, 16),
    "flux.2-klein-9b": Published(32, 9.079, (QWEN3_8B,), 1024, 16),
    "krea-2": Published(28, 12.9, (QWEN3_VL_4B,), 1024, 16),
    "qwen-image": Published(60, 20.43, (QWEN_VL_7B,), 1024, 16),
    # Tokens of 16 px, which go by fours.
    "qwen-image-2.1": Published(32, 7.25, (QWEN3_VL_8B,), 1024, 32),
    "sana-0.6b": Published(28, 0.6, (GEMMA_2B,), 512, 32),
    "sana-1.6b": Published(20, 1.6, (GEMMA_2B,), 1024, 32),
    "sana-4.8b": Published(60, 4.8, (GEMMA_2B,), 1024, 32),
    "sd3.5-large": Published(38, 8.1, (CLIP_L, CLIP_G, T5_XXL), 1024, 16),
    "sd3.5-medium": Published(24, 2.5, (CLIP_L, CLIP_G, T5_XXL), 1024, 16),
    "z-image": Published(30, 6.155, (QWEN3_4B,), 1024, 16),
}
NAMES = sorted(PUBLISHED)


def read(name: str) -> dict[str, Any]:
    return json.loads((resources.files(presets) / f"{name}.json").read_text())


def plan(preset: Preset, skip_ratio: float, side: int, *, text: bool = False) -> dict[str, Any]:
    """Like a user's run: LoRA on the family's layers, prompts as long as the family's default, bfloat16."""
    family = preset.family
    num_blocks = len(list_blocks(empty_model(preset.transformer_config), family.block_stacks))
    selection = select_blocks("auto", skip_ratio, num_blocks) if skip_ratio else select_blocks("none", 0, num_blocks)
    config = BlockSkipConfig(leading=selection.leading, trailing=selection.trailing)
    targets = preset.lora_targets(config)
    request = PlanRequest(
        family=family,
        transformer_config=preset.transformer_config,
        config=config,
        patch=PatchSamplingConfig(min_size=side, max_size=side, multiple=family.latent_token_size),
        rank=4,
        lora_targets=targets,
        recorded_layers=preset.recorded_layers(config, targets),
        text_tokens=family.flags["max_sequence_length"],
        text_encoders=preset.text_encoders if text else (),
        # Whole, as they are in the files.
        streamable_encoders=(),
        cache_latents=True,
        num_samples=10,
        precompute_batch_size=1,
    )
    return plan_run(request)


def train_stage(plan: dict[str, Any]) -> dict[str, Any]:
    return next(stage for stage in plan["stages"] if stage["name"] == "train")


def num_stored(model: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


def test_every_preset_is_checked_here() -> None:
    assert preset_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_transformer_has_the_published_blocks_and_size(name: str) -> None:
    preset, published = load_preset(name), PUBLISHED[name]
    transformer = empty_model(preset.transformer_config)
    assert len(list_blocks(transformer, preset.family.block_stacks)) == published.blocks
    assert num_stored(transformer) / 1e9 == pytest.approx(published.billions, rel=0.02)
    assert preset.family.latent_token_size == published.token_pixels
    # Some families say the side in their pipeline's code, for models of all sizes.
    assert preset.family.image_size in (1024, published.resolution)


@pytest.mark.parametrize("name", NAMES)
def test_text_encoders_have_the_published_size_each_shared_weight_once(name: str) -> None:
    encoders = load_preset(name).text_encoders
    sizes = []
    for config in encoders:
        encoder_class = getattr(transformers, config["architectures"][0])
        with torch.device("meta"):
            sizes.append(
                sum(p.numel() for p in encoder_class(encoder_class.config_class.from_dict(config)).parameters())
            )
    assert [size / 1e9 for size in sizes] == pytest.approx(PUBLISHED[name].text_billions, rel=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_configs_name_only_settings_that_their_classes_have(name: str) -> None:
    data = read(name)
    for config in (data["transformer"], data["vae"]):
        unknown = {key for key in config if not key.startswith("_")} - set(empty_model(config).config)
        # Entries of older diffusers that are still in the files on the hub.
        assert unknown <= {"force_upcast"}
    scheduler = getattr(diffusers, data["scheduler"]["_class_name"]).from_config(data["scheduler"])
    unknown = {key for key in data["scheduler"] if not key.startswith("_")} - set(scheduler.config)
    assert not unknown


@pytest.mark.parametrize("name", NAMES)
def test_text_fits_the_transformer(name: str) -> None:
    data, encoders = read(name)["transformer"], load_preset(name).text_encoders
    config = encoders[-1].get("text_config", encoders[-1])
    width = config.get("hidden_size") or config["d_model"]
    names = ("joint_attention_dim", "caption_channels", "cap_feat_dim", "text_hidden_dim", "context_in_dim")
    (wanted,) = (data[key] for key in names if key in data)
    # FLUX.2 reads three hidden layers.
    assert wanted == (3 if "flux.2" in name else 1) * width


@pytest.mark.parametrize("name", NAMES)
def test_preset_says_where_its_numbers_are_from(name: str) -> None:
    data = read(name)
    assert data["schema"] == 1
    assert data["name"].count("/") == 1
    assert data["family"] == load_preset(name).family.name
    assert len(data["source"]) > 40


def test_configs_can_be_read_as_long_as_the_family_is_in_use() -> None:
    family = load_preset("sd3.5-medium").family
    folder = family.model_path
    gc.collect()
    transformer = read("sd3.5-medium")["transformer"]
    assert family.empty_embeds(transformer, 20, torch.float32)["prompt_embeds"].shape == (97, 4096)
    assert family.image_size == 1024
    del family
    gc.collect()
    assert not folder.exists()


# With shared weights: the embeddings of T5 and Qwen3.
@pytest.mark.parametrize(("name", "number"), [("flux.1-dev", 1), ("z-image", 0), ("sana-0.6b", 0)])
def test_simulated_text_encoder_holds_its_weights_once(name: str, number: int) -> None:
    usage = simulate_text_encoder(load_preset(name).text_encoders[number], 1, 64, torch.bfloat16)
    assert usage.parameter_bytes / 2e9 == pytest.approx(PUBLISHED[name].text_billions[number], rel=0.005)
    assert usage.parameter_bytes < usage.peak_bytes < 1.1 * usage.parameter_bytes
    # Two for each weight and token, but embeddings are looked up.
    assert 0.7 < usage.product_flops / (64 * usage.parameter_bytes) < 1.01


def with_few_blocks(preset: Preset) -> Preset:
    """The same widths, two blocks of each kind."""
    config = dict(preset.transformer_config)
    config |= {key: 2 for key in ("num_layers", "num_single_layers", "n_layers") if key in config}
    if config.get("dual_attention_layers"):
        config["dual_attention_layers"] = [0]
    return replace(preset, transformer_config=config)


# One of each architecture; the SANAs differ in their attention.
@pytest.mark.parametrize(
    "name",
    fast_first(
        ["flux.2-klein-4b", "sana-0.6b", "flux.2-dev", "krea-2", "qwen-image", "sana-4.8b", "sd3.5-medium", "z-image"]
        + ["qwen-image-2.1"],
        fast=2,
    ),
)
def test_full_width_runs_can_be_planned(name: str) -> None:
    preset = with_few_blocks(load_preset(name))
    side = PUBLISHED[name].resolution // 2
    skipping, plain = plan(preset, 0.3, side), plan(preset, 0, side)
    assert skipping["skip"]["leading"] == 1
    assert [stage["name"] for stage in skipping["stages"]] == ["precompute", "train"]
    for key in ("peak_device_bytes", "parameter_bytes", "activation_bytes", "tflops_per_step"):
        assert 0 < train_stage(skipping)[key] < train_stage(plain)[key], key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_complete_models_can_be_planned(name: str) -> None:
    preset, published = load_preset(name), PUBLISHED[name]
    skipping = plan(preset, 0.3, published.resolution // 2, text=True)
    plain = train_stage(plan(preset, 0, published.resolution))
    skip, train = skipping["skip"], train_stage(skipping)
    assert skip["blocks"] == published.blocks
    assert skip["leading"] + skip["trailing"] == round(0.3 * published.blocks)
    assert [stage["name"] for stage in skipping["stages"]] == ["encode", "precompute", "train"]
    assert skipping["stages"][0]["parameter_bytes"] / 2e9 == pytest.approx(sum(published.text_billions), rel=0.005)
    assert plain["parameter_bytes"] / 2e9 == pytest.approx(published.billions, rel=0.02)
    assert train["peak_device_bytes"] < 0.85 * plain["peak_device_bytes"]
    assert train["tflops_per_step"] < 0.5 * plain["tflops_per_step"]
