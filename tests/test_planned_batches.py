"""What a plan makes of memory: batches of precompute, forwards in step, the VAE alone and images in tiles."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blockskip_hooks import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.planning.allocator import MIB, Trace
from blockskip_hooks.planning.components import simulate_vae
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.planning.plan import sends_ahead
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import _precompute_batch, plan_run
from blockskip_hooks.planning.usage import Usage
from tests.plans import Preset, load_preset, request_for, stage


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_precompute_batch_needs_no_more_than_training(preset: Preset, device: str) -> None:
    request = request_for(preset, 1, 1, num_samples=64, batch_size=4, precompute_batch_size=None, device=device)
    plan = plan_run(request)
    precompute = stage(plan, "precompute")
    assert precompute["batch_size"] > 1
    # Hidden states of forwards in step may take a twentieth more, on a CPU without the block that is read ahead.
    ahead = precompute["parameter_bytes"] - stage(plan, "train")["parameter_bytes"] if device == "cpu" else 0
    assert precompute["peak_reserved_bytes"] - ahead <= 1.05 * stage(plan, "train")["peak_reserved_bytes"]


@pytest.mark.parametrize(("device", "budget", "expected"), [
    ("cuda", None, (4, 4)), ("cuda", 2**40, (8, 2)), ("mps", None, (16, 1)),
])  # fmt: skip
def test_gaps_of_a_large_batch_count_where_a_smaller_one_reads_no_block_oftener(
    preset: Preset, device: Any, budget: int | None, expected: tuple[int, int]
) -> None:
    """A budget is there to be used, though."""
    request = request_for(
        preset, 1, 1, num_samples=16, precompute_batch_size=None, device=device, memory_budget_bytes=budget
    )

    def usage(live: int, halted: int = 0, gap: int = 0) -> Usage:
        traces = (Trace((live * MIB, gap * MIB)),) if device == "cuda" else ()
        return Usage(live * MIB, 190 * MIB, halted_bytes=halted * MIB, traces=traces)

    def capture(batch_size: int) -> tuple[Usage, None]:
        return usage(190 + 10 * batch_size, 2 * batch_size, 120 if batch_size > 4 else 0), None

    fake: Any = SimpleNamespace(request=request, capture=capture, ahead_bytes=0)
    vae: Any = SimpleNamespace(encode=lambda batch_size: (usage(191), False))
    # Eight samples reserve 390 MiB, and 406 with another eight that wait.
    *chosen, needed = _precompute_batch(fake, capture(1)[0], usage(400), vae, 0)
    assert tuple(chosen) == expected
    assert needed.reserved_bytes <= (400 if budget is None else 420) * MIB


def test_forwards_go_in_step_as_far_as_memory_allows(preset: Preset) -> None:
    """A twentieth more than the largest of a step and one such forward, or a budget, which may hold two blocks too."""
    settings = {"num_samples": 64, "batch_size": 1, "precompute_batch_size": None, "gradient_checkpointing": True}
    images = {"validation_resolution": 48, "validation_batch_size": 2, "validation_prompts": 3}
    plan = plan_run(request_for(preset, 1, 1, **settings, **images))
    alone = plan_run(request_for(preset, 1, 1, **settings | {"num_samples": 1}, **images | {"validation_prompts": 1}))
    for name in ("precompute", "validate"):
        peaks = [stage(alone, part)["peak_device_bytes"] for part in ("train", name)]
        assert stage(plan, name)["peak_device_bytes"] <= 1.05 * max(peaks)
    ample = plan_run(request_for(preset, 1, 1, **settings, **images, memory_budget_bytes=2**40))
    done = {
        name: stage(ample, name)["batch_size"] * stage(ample, name)["together"] for name in ("precompute", "validate")
    }
    assert done == {"precompute": 64, "validate": 6} and not sends_ahead(ample)
    assert sends_ahead(plan_run(request_for(preset, 1, 1, **settings, memory_budget_bytes=2**40, device="cuda")))
    assert stage(plan, "precompute")["batch_size"] * stage(plan, "precompute")["together"] < 64
    assert not sends_ahead(plan)
    scarce = plan_run(request_for(preset, 1, 1, **settings, **images, memory_budget_bytes=1))
    assert stage(scarce, "precompute")["together"] == stage(scarce, "validate")["together"] == 1


@pytest.mark.slow
def test_the_vae_works_alone_where_it_would_need_more_than_training(preset: Preset) -> None:
    """Its weights beside the transformer's fit or are planned without them; small training leaves no room."""
    roomy = plan_run(request_for(preset, 0, 0, validation_resolution=32, device="cuda"))
    assert not stage(roomy, "validate")["vae_alone"] and not stage(roomy, "precompute")["vae_alone"]
    tight = plan_run(request_for(preset, 2, 2, validation_resolution=128, batch_size=1, device="cuda"))
    validate = stage(tight, "validate")
    assert validate["vae_alone"]
    beside = plan_run(request_for(preset, 2, 2, validation_resolution=128, batch_size=64, device="cuda"))
    assert not stage(beside, "validate")["vae_alone"]


def test_on_a_cpu_the_transformer_makes_no_room_for_the_vae(preset: Preset) -> None:
    """Its frozen weights would only go to where they are."""
    request = request_for(preset, 2, 2, validation_resolution=128, batch_size=1)
    assert stage(plan_run(replace(request, device="cuda")), "validate")["vae_alone"]
    plan = plan_run(request)
    assert not stage(plan, "validate")["vae_alone"] and not stage(plan, "precompute")["vae_alone"]
    tiled = stage(plan, "validate")["vae_tiled"]
    decode = simulate_vae(preset.family, 1, (128, 128), torch.float32, decode=True, tiled=tiled, device="cpu")
    kept = stage(plan, "train")["parameter_bytes"]
    assert stage(plan, "validate")["peak_device_bytes"] >= kept + decode.peak_bytes


@pytest.mark.slow
def test_images_are_decoded_in_tiles_where_the_whole_one_does_not_fit() -> None:
    """SANA's VAE needs several times the memory of a training step for a picture of 1024 pixels."""
    preset = load_preset("sana-0.6b")
    config = BlockSkipConfig(leading=13, trailing=13)
    patch = PatchSamplingConfig(mode="dynamic", min_size=512, max_size=1024, multiple=32)
    request = PlanRequest(
        family=preset.family,
        transformer_config=preset.transformer_config,
        config=config,
        patch=patch,
        rank=4,
        lora_targets=preset.lora_targets(config),
        validation_resolution=1024,
    )
    plan = plan_run(request)
    validate = stage(plan, "validate")
    assert validate["vae_alone"] and validate["vae_tiled"] and "in tiles" in format_plan(plan)
    whole = simulate_vae(preset.family, 1, (1024, 1024), torch.bfloat16, decode=True)
    assert validate["peak_device_bytes"] < whole.peak_bytes / 2
