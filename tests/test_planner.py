"""The planner: its simulated peaks against real tensors, and the plan it writes."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, SpanResiduals
from blockskip_hooks.families import FAMILIES, Family
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.planning.counters import Meter
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import RECORD_OVERHEAD, plan_run
from blockskip_hooks.search.tables import SelectionTable, shipped_tables
from blockskip_hooks.selection import from_table
from tests.plans import LAYERS, TEXT_TOKENS, Preset, fake_transformer, load_preset, request_for, stage
from tests.tiny import TINY_FAMILIES


def real_peak(preset: Preset, request: PlanRequest) -> int:
    """Peak bytes of live tensors in a real training step with the optimizer's state in place."""
    family: Family = preset.family
    dtype = request.weight_dtype
    transformer = torch.nn.Module.to(TINY_FAMILIES[0].make_transformer(), dtype)
    model = DiTBlockSkipTransformer(transformer, request.config)
    shape = (request.batch_size, *family.latent_shape(*request.training_size))
    widths = preset.transformer_config

    def make_inputs() -> tuple[torch.Tensor, ...]:
        return (
            torch.randn(shape, dtype=dtype),
            torch.randn(shape, dtype=dtype),
            torch.rand(request.batch_size, 1, 1, 1, dtype=dtype),
            torch.randn(request.batch_size, TEXT_TOKENS, widths["joint_attention_dim"], dtype=dtype),
            torch.randn(request.batch_size, widths["pooled_projection_dim"], dtype=dtype),
        )

    def call(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, text: torch.Tensor, pooled: Any) -> Any:
        embeds = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
        noisy = (1 - sigmas) * latents + sigmas * noise
        return family.transformer_inputs(widths, noisy, torch.rand(request.batch_size), embeds)

    residuals = model.capture_residuals(**call(*make_inputs()), return_dict=False)
    for block in model.spans.skipped:
        torch.nn.Module.to(block.module, "meta")
    adapters = {"rank": request.rank, "alpha": 1, "dropout": request.lora_dropout}
    parameters = add_lora(transformer, request.lora_targets, **adapters, seed=0)
    if request.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.AdamW(parameters)

    def step() -> None:
        latents, noise, sigmas, text, pooled = make_inputs()
        injected = SpanResiduals(**{name: tensor.clone() for name, tensor in residuals.tensors().items()})
        autocast = torch.autocast("cpu", dtype) if dtype is not torch.float32 else contextlib.nullcontext()
        inputs = call(latents, noise, sigmas, text, pooled)
        with autocast:
            prediction = model(**inputs, residuals=injected, return_dict=False)[0]
        prediction = family.prediction_to_latents(prediction.float(), latents)
        flow_matching_loss(prediction, noise - latents, sigmas, "none").mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter() as live:
        live.track(tensor for tensor in model.parameters())
        live.track(t for state in optimizer.state.values() for t in state.values())
        step()
    return live.peak


@pytest.mark.parametrize(
    ("leading", "trailing", "changes"),
    [
        (0, 0, {}),
        (2, 1, {"batch_size": 3}),
        (0, 0, {"gradient_checkpointing": True}),
        (1, 2, {"gradient_checkpointing": True, "weight_dtype": torch.bfloat16}),
        (0, 0, {"weight_dtype": torch.bfloat16}),
        (1, 1, {"weight_dtype": torch.bfloat16}),
        (0, 0, {"lora_dropout": 0.5}),
    ],
    ids=["plain", "spans", "checkpointing", "spans-checkpointing-bf16", "bf16", "spans-bf16", "dropout"],
)
def test_train_peak_is_that_of_real_tensors(
    preset: Preset, leading: int, trailing: int, changes: dict[str, Any]
) -> None:
    request = request_for(preset, leading, trailing, **changes)
    planned = stage(plan_run(request), "train")["peak_device_bytes"]
    assert planned == pytest.approx(real_peak(preset, request), rel=0.05)


def test_train_flops_are_those_of_real_tensors(preset: Preset) -> None:
    transformer = TINY_FAMILIES[0].make_transformer()
    inputs = TINY_FAMILIES[0].make_inputs(2)
    with torch.no_grad(), Meter() as meter:
        transformer(**inputs)
    # The tiny inputs are 4 image tokens: 2 latent tokens on a side.
    side = 2 * preset.family.latent_token_size
    settings = {"device": "cpu", "text_tokens": TEXT_TOKENS}
    fake = fake_transformer(preset.family, preset.transformer_config, BlockSkipConfig(), **settings)
    usage = fake.infer(2, (side, side))
    assert usage.product_flops == meter.flops.products > 0
    assert usage.attention_flops == meter.flops.attention > 0


@pytest.fixture(scope="module")
def plain_plan(preset: Preset) -> dict[str, Any]:
    """All blocks train."""
    return plan_run(request_for(preset))


@pytest.fixture(scope="module")
def skipping_plan(preset: Preset) -> dict[str, Any]:
    """The first two blocks and the last are skipped; everything a plan can hold is asked for."""
    extras = {"validation_resolution": 48, "validation_batch_size": 3, "memory_budget_bytes": 1}
    return plan_run(request_for(preset, 2, 1, **extras))


def test_skipping_needs_less(plain_plan: dict[str, Any], skipping_plan: dict[str, Any]) -> None:
    plain, skipped = stage(plain_plan, "train"), stage(skipping_plan, "train")
    for key in (
        "peak_device_bytes",
        "parameter_bytes",
        "activation_bytes",
        "lora_optimizer_bytes",
        "tflops_per_step",
        "attention_tflops_per_step",
    ):
        assert skipped[key] < plain[key], key


def test_skipped_blocks_cost_nothing_in_training_and_two_blocks_in_precompute(
    preset: Preset, skipping_plan: dict[str, Any]
) -> None:
    """The one that runs and, on a CPU, the one that is read meanwhile."""

    def num_bytes(module: torch.nn.Module) -> int:
        return sum(4 * parameter.numel() for parameter in module.parameters())

    skeleton = preset.skeleton(BlockSkipConfig(leading=2, trailing=1))
    skipped = [num_bytes(block.module) for block in skeleton.spans.skipped]
    kept = num_bytes(skeleton) - sum(skipped)
    assert stage(skipping_plan, "train")["parameter_bytes"] == kept
    ahead = min(max(skipped), sum(skipped) - max(skipped))
    # The transformer's phase of precompute has the higher peak: kept blocks and streamed ones; the VAE is gone.
    assert stage(skipping_plan, "precompute")["parameter_bytes"] == kept + max(skipped) + ahead
    # Where one block is skipped there is no next one.
    assert stage(plan_run(request_for(preset, 1, 0)), "precompute")["parameter_bytes"] == num_bytes(skeleton)


def test_plan_has_the_schema(skipping_plan: dict[str, Any]) -> None:
    plan = skipping_plan
    assert json.loads(json.dumps(plan)) == plan
    assert plan["schema"] == 1
    spans = {"blocks": 5, "leading": 2, "trailing": 1, "ratio": 0.6}
    assert plan["skip"] == {**spans, "source": "flag", "table": None, "harm": None}
    assert plan["patch"] == {"mode": "none", "min": 32, "max": 32, "training_resolution": 32, "positions": "patch"}
    assert [s["name"] for s in plan["stages"]] == ["precompute", "train", "validate"]
    # Three validation images at a time would need more than training.
    assert [s["batch_size"] for s in plan["stages"]] == [1, 2, 1]
    for s in plan["stages"]:
        assert s["simulated"] is True
        assert s["seconds"] is None
        assert s["peak_device_bytes"] == s["parameter_bytes"] + s["activation_bytes"] + s["lora_optimizer_bytes"]
    assert plan["fits"] == {"budget_bytes": 1, "ok": False, "reason": None}


def test_what_is_needed_of_a_gpu_is_reserved_bytes_and_the_context(preset: Preset) -> None:
    plans = {device: plan_run(request_for(preset, 2, 1, device=device)) for device in ("cuda", "mps", "cpu")}
    for device, plan in plans.items():
        assert plan["device"] == device and (plan["context_bytes"] > 0) == (device == "cuda")
        for s in plan["stages"]:
            assert s["needed_bytes"] == s["peak_reserved_bytes"] + plan["context_bytes"]
            assert (s["peak_reserved_bytes"] > s["peak_device_bytes"]) == (device == "cuda")
        assert ("reserved" in format_plan(plan)) == (device == "cuda")
    # The scores of attention are kept where no kernel does without them.
    assert stage(plans["mps"], "train")["activation_bytes"] > stage(plans["cuda"], "train")["activation_bytes"]


def test_text_encoders_that_train_are_part_of_every_stage(preset: Preset) -> None:
    folder = TINY_FAMILIES[0].folder
    encoders = FAMILIES["FluxPipeline"](folder).text_encoder_configs()
    trained = {name: encoders[name] for name in preset.family.trained_text_components}
    plain = plan_run(request_for(preset, 1, 1, validation_resolution=32, device="cuda"))
    along = plan_run(request_for(preset, 1, 1, validation_resolution=32, device="cuda", trained_encoders=trained))
    for name in ("precompute", "train", "validate"):
        more = {key: stage(along, name)[key] - stage(plain, name)[key] for key in stage(plain, name) if "bytes" in key}
        assert more["parameter_bytes"] > 0 and more["lora_optimizer_bytes"] > 0, name
    # What the encoder keeps for backward, and the modulation layers, whose input has a gradient now.
    assert stage(along, "train")["activation_bytes"] > stage(plain, "train")["activation_bytes"]


def test_records_on_disk(preset: Preset, skipping_plan: dict[str, Any]) -> None:
    # 16 px sides of latents, 64 image tokens of width 32, 5 text tokens after the leading span, float32.
    latents, image, text = 4 * 4 * 16 * 16, 4 * 32 * 64, 4 * 32 * TEXT_TOKENS
    expected = {"records": 20, "modulation_bytes": 0}
    record = latents + 2 * image + text
    size = {"bytes": 20 * (record + RECORD_OVERHEAD), "record_bytes": record}
    assert skipping_plan["residuals"] == {**expected, **size, "stretches": 1}
    # Room for 7 records is room for 3 steps of 2: 20 samples need 4 stretches.
    record = latents + image + text
    bounded = plan_run(request_for(preset, 1, 0, residual_budget_bytes=7 * (record + RECORD_OVERHEAD)))
    size = {"bytes": 20 * (record + RECORD_OVERHEAD), "record_bytes": record}
    assert bounded["residuals"] == {**expected, **size, "stretches": 4}


def test_recorded_modulation_is_on_disk_and_not_in_memory(preset: Preset) -> None:
    request = request_for(preset, 1, 1)
    names = preset.recorded_layers(request.config, request.lora_targets)
    # One double-stream block with two layers of 6 x 32 and two single-stream blocks with one of 3 x 32.
    assert len(names) == 4
    plan, recorded = plan_run(request), plan_run(replace(request, recorded_layers=names))
    assert recorded["residuals"]["modulation_bytes"] == 4 * (2 * 6 * 32 + 2 * 3 * 32)
    assert recorded["residuals"]["record_bytes"] == plan["residuals"]["record_bytes"]
    weights = 4 * (2 * 6 + 2 * 3) * (32 * 32 + 32)
    difference = stage(plan, "train")["parameter_bytes"] - stage(recorded, "train")["parameter_bytes"]
    assert difference == weights


@pytest.mark.parametrize("residuals", ["online", "none"])
def test_without_a_store_training_does_it_all(preset: Preset, residuals: str) -> None:
    config = BlockSkipConfig(leading=1, trailing=1, residuals=residuals)  # type: ignore[arg-type]
    plan = plan_run(request_for(preset, 1, 1, config=config, cache_latents=False))
    assert [s["name"] for s in plan["stages"]] == ["train"]
    assert not any(plan["residuals"].values())


def test_adam_in_8_bits_and_accumulation(preset: Preset) -> None:
    request = request_for(preset, rank=256)
    full = stage(plan_run(request), "train")
    small = stage(plan_run(replace(request, use_8bit_adam=True)), "train")
    count = full["lora_optimizer_bytes"] // 12
    assert small["lora_optimizer_bytes"] == 4 * count + 2 * count + 2 * 4 * count // 256
    accumulated = stage(plan_run(replace(request, gradient_accumulation_steps=2)), "train")
    assert full["peak_device_bytes"] <= accumulated["peak_device_bytes"] <= full["peak_device_bytes"] + 4 * count


def test_format_plan_shows_blocks_and_says_simulated(skipping_plan: dict[str, Any]) -> None:
    text = format_plan(skipping_plan, model="tiny", outputs={"LoRA": "out/pytorch_lora_weights.safetensors"})
    assert "□□■■□" in text
    assert "does not fit" in text
    assert text.lower().count("simulated") == 1
    assert "out/pytorch_lora_weights.safetensors" in text


FEW = SelectionTable(
    "m", 5, "measured", "text masked in 2 LoRAs x 1 seeds, encoder a/b-c", leading=(0,) * 5, trailing=(0,) * 5
)
MANY = replace(FEW, about="text masked in the base model, 8 class prompts x 2 seeds, encoder a/b-c", date="2026-01-01")
INFERRED = SelectionTable("m", 5, "inferred", "from (other) figures; not 3 x 4", shipped=True)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (FEW, "(own: 2 LoRAs x 1 seeds)"),
        (MANY, "(own: 8 prompts x 2 seeds)"),
        (replace(MANY, shipped=True), "(shipped: 8 prompts x 2 seeds)"),
        (INFERRED, "(shipped, inferred)"),
    ],
)
def test_a_plan_says_whose_table_it_goes_by_and_what_that_rests_on(
    skipping_plan: dict[str, Any], table: SelectionTable, said: str
) -> None:
    text = format_plan({**skipping_plan, "skip": from_table(table, (1, 1)).as_dict()})
    assert f"first 1, last 1 of 5, 40% {said}" in text


def test_shipped_tables_are_said_to_be_shipped() -> None:
    assert all(table.shipped and "(shipped, " in table.describe() for table in shipped_tables())


def test_live_bytes_counts_a_storage_once_and_until_it_is_freed() -> None:
    kept = torch.zeros(100)
    with Meter() as live:
        live.track([kept, kept.view(10, 10)])
        assert live.current == 400
        doubled = kept * 2
        view = doubled[5:]
        del doubled
        assert live.current == 800
        del view
        assert (live.current, live.peak) == (400, 800)
        live.reset_peak()
        assert live.peak == 400
    del kept
    assert live.current == 400


def test_presets_have_the_published_sizes() -> None:
    dev = load_preset("flux.1-dev")
    count = sum(p.numel() for p in empty_model(dev.transformer_config).parameters())
    assert count == 11_901_408_320
    assert dev.family.latent_token_size == 16
    with pytest.raises(ValueError, match="--preset 'flux' does not exist; choose one of flux.1-dev"):
        load_preset("flux")


def test_unknown_model_class(preset: Preset) -> None:
    with pytest.raises(ValueError, match="names the class Nothing"):
        plan_run(request_for(preset, transformer_config={**preset.transformer_config, "_class_name": "Nothing"}))


def test_lora_targets_of_a_preset(preset: Preset) -> None:
    config = BlockSkipConfig(leading=2)
    targets = preset.lora_targets(config)
    assert targets and all(target.startswith("single_transformer_blocks.") for target in targets)
    skeleton = preset.skeleton(config)
    assert set(lora_targets(skeleton, LAYERS)) <= set(targets)
