"""Plans with quantised kept blocks: their peak is that of real tensors, and they need no library."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, SpanResiduals
from blockskip_hooks.blocks import modulation_layers
from blockskip_hooks.config import PatchSamplingConfig
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.planning.counters import Meter
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import plan_run
from tests import script
from tests.quantized import CONFIGS, FLUX, METHODS, SPANS
from tests.tiny import randomise


def held(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that parameters are made of."""
    for parameter in model.parameters():
        if type(parameter).__name__ == "Int8Tensor":
            yield from (parameter.qdata, parameter.scale)
        else:
            yield parameter
            state = getattr(parameter, "quant_state", None)
            yield from () if state is None else (state.absmax, state.code)


@pytest.fixture(scope="module")
def mid_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX wide enough that weights count."""
    folder = tmp_path_factory.mktemp("mid")
    shutil.copytree(FLUX.folder, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    config = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 8}
    config |= {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True}
    transformer = randomise(FluxTransformer2DModel(**config, axes_dims_rope=(8, 12, 12)))
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_the_planned_peak_is_that_of_real_tensors(mid_flux: Path, method: str, checkpointing: bool):
    tiny, spans, dtype, side, tokens = FLUX, BlockSkipConfig(leading=1, trailing=1), torch.bfloat16, 64, 12
    family = tiny.family(mid_flux, flags={"max_sequence_length": tokens, "resolution": side})
    config = json.loads((mid_flux / "transformer" / "config.json").read_text())
    skeleton = DiTBlockSkipTransformer(empty_model(config), spans)
    names = modulation_layers(skeleton.spans, family.modulation_layers)
    request = PlanRequest(
        device="cpu",
        family=family,
        transformer_config=config,
        config=spans,
        patch=PatchSamplingConfig(min_size=side, max_size=side, multiple=family.latent_token_size),
        rank=4,
        lora_targets=lora_targets(skeleton, ["attn.to_q", "attn.to_k", "attn.to_v"]),
        recorded_layers=names,
        quantization=CONFIGS[method],
        text_tokens=tokens,
        weight_dtype=dtype,
        gradient_checkpointing=checkpointing,
        num_samples=20,
        precompute_batch_size=1,
    )
    plan = plan_run(request)
    assert f"in {CONFIGS[method].name}" in format_plan(plan)
    planned = next(stage for stage in plan["stages"] if stage["name"] == "train")

    model = DiTBlockSkipTransformer.from_pretrained(
        mid_flux, spans, torch_dtype=dtype, recorded_layers=names, quantization=CONFIGS[method]
    )
    frozen = sum(t.untyped_storage().nbytes() for t in held(model) if not t.is_meta)
    assert planned["parameter_bytes"] == pytest.approx(frozen, rel=0.02)
    latents = torch.randn(1, *family.latent_shape(side, side), dtype=dtype)
    embeds = family.empty_embeds(config, tokens, dtype)
    inputs = family.transformer_inputs(config, latents, torch.ones(1), {n: t[None] for n, t in embeds.items()})
    with torch.autocast("cpu", dtype):
        residuals = model.capture_residuals(**inputs, return_dict=False)
    parameters = add_lora(model.transformer, request.lora_targets, rank=4, alpha=1, dropout=0.0, seed=0)
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.AdamW(parameters)

    def step() -> None:
        clean, noise = torch.randn_like(latents), torch.randn_like(latents)
        sigmas = torch.rand(1, 1, 1, 1, dtype=dtype)
        prompt = {n: torch.randn(1, *t.shape, dtype=t.dtype) for n, t in embeds.items()}
        given = family.transformer_inputs(config, (1 - sigmas) * clean + sigmas * noise, torch.ones(1), prompt)
        own = SpanResiduals(**{name: tensor.clone() for name, tensor in residuals.tensors().items()})
        with torch.autocast("cpu", dtype):
            prediction = model(**given, residuals=own, return_dict=False)[0]
        prediction = family.prediction_to_latents(prediction.float(), clean)
        flow_matching_loss(prediction, noise - clean, sigmas, "none").mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter() as live:
        live.track(tensor for tensor in held(model) if not tensor.is_meta)
        live.track(tensor for state in optimizer.state.values() for tensor in state.values())
        step()
    assert planned["peak_device_bytes"] == pytest.approx(live.peak, rel=0.05)


def test_the_planner_needs_neither_library(mid_flux: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    family = FLUX.family(mid_flux)
    request = PlanRequest(
        family=family,
        transformer_config=json.loads((mid_flux / "transformer" / "config.json").read_text()),
        config=SPANS,
        patch=PatchSamplingConfig(min_size=64, max_size=64, multiple=family.latent_token_size),
        rank=4,
        lora_targets=["transformer_blocks.1.attn.to_q"],
        text_tokens=12,
        num_samples=2,
    )
    peaks = {}
    for method, quantized in {"none": None, **CONFIGS}.items():
        stages = plan_run(dataclasses.replace(request, quantization=quantized))["stages"]
        peaks[method] = {stage["name"]: stage["peak_device_bytes"] for stage in stages}
    for stage in ("precompute", "train"):
        assert peaks["nf4"][stage] < peaks["int8"][stage] < peaks["none"][stage]
        assert peaks["fp4-double"][stage] < peaks["nf4"][stage]


@pytest.mark.slow
def test_plan_memory_compares_with_plain_lora_that_is_not_quantised(capsys: pytest.CaptureFixture[str]):
    plans = {}
    for method in ("nf4", "int8", "none"):
        command = ["--preset", "sana-0.6b", "--quantization", method, "--json"]
        assert script.load_script("plan_memory").main(command) == 0
        plans[method] = json.loads(capsys.readouterr().out)
    plain = {method: plan["plain_lora"] for method, plan in plans.items()}
    assert plain["nf4"] == plain["int8"] == plain["none"]
    train = {
        method: next(stage["peak_device_bytes"] for stage in plan["stages"] if stage["name"] == "train")
        for method, plan in plans.items()
    }
    assert train["nf4"] < train["int8"] < train["none"] < plain["none"]["peak_device_bytes"]
