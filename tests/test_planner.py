"""The planner: its simulated peaks against real tensors, and the plan it writes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, PatchSamplingConfig, SpanResiduals
from blockskip_hooks.embedded import embedded_photos
from blockskip_hooks.families import FAMILIES, Family
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.planning.allocator import MIB, Trace
from blockskip_hooks.planning.components import simulate_vae
from blockskip_hooks.planning.counters import CountFlops, LiveBytes
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.planning.plan import sends_ahead
from blockskip_hooks.planning.presets import Preset, load_preset, write_preset
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.simulation import FakeTransformer, empty_model
from blockskip_hooks.planning.stages import RECORD_OVERHEAD, _precompute_batch, plan_run
from blockskip_hooks.planning.usage import Usage
from tests.script import load_script as load_training_script
from tests.tiny import TINY_FAMILIES


ROOT = Path(__file__).parents[1]
TEXT_TOKENS = 5
LAYERS = ["attn.to_q", "attn.to_k", "attn.to_v"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    """A tiny FLUX as a preset, with the scheduler of the real one."""
    folder = tmp_path_factory.mktemp("tiny")
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
    with LiveBytes() as live:
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
    with torch.no_grad(), CountFlops() as flops:
        transformer(**inputs)
    # The tiny inputs are 4 image tokens: 2 latent tokens on a side.
    side = 2 * preset.family.latent_token_size
    fake = FakeTransformer(
        preset.family,
        preset.transformer_config,
        BlockSkipConfig(),
        rank=4,
        lora_targets=[],
        dtype=torch.float32,
        device="cpu",
    )
    usage = fake.infer(2, (side, side), TEXT_TOKENS)
    assert usage.product_flops == flops.products > 0
    assert usage.attention_flops == flops.attention > 0


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
    assert plan["patch"] == {"mode": "none", "min": 32, "max": 32, "training_resolution": 32}
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

    def capture(batch_size: int, *_: Any) -> tuple[Usage, None]:
        return usage(190 + 10 * batch_size, 2 * batch_size, 120 if batch_size > 4 else 0), None

    fake: Any = SimpleNamespace(capture=capture, ahead_bytes=0)
    vae: Any = SimpleNamespace(encode=lambda batch_size: (usage(191), False))
    # Eight samples reserve 390 MiB, and 406 with another eight that wait.
    *chosen, needed = _precompute_batch(request, fake, capture(1)[0], usage(400), vae, 0)
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


def test_live_bytes_counts_a_storage_once_and_until_it_is_freed() -> None:
    kept = torch.zeros(100)
    with LiveBytes() as live:
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


def load_script() -> Any:
    path = ROOT / "examples" / "dreambooth_blockskip" / "plan_memory.py"
    spec = importlib.util.spec_from_file_location("plan_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("as_json", [True, False])
def test_script(as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def write_tiny(name: str, folder: Path, pipeline_settings: Any) -> str:
        shutil.copytree(TINY_FAMILIES[0].folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        return name

    script = load_script()
    monkeypatch.setattr(script, "write_preset", write_tiny)
    command = ["--preset", "tiny", "--skip_blocks", "1,2", "--resolution", "64", "--max_sequence_length", "5"]
    command += ["--precompute_batch_size", "1"]
    if as_json:
        assert script.main([*command, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["patch"]["training_resolution"] == 32
        assert plan["plain_lora"]["peak_device_bytes"] > stage(plan, "train")["peak_device_bytes"]
    else:
        assert script.main(command) == 0
        assert "plain LoRA at 64 px: " in capsys.readouterr().out


def test_a_preset_is_planned_as_the_training_script_plans_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers for the folder that a preset is written to."""
    flags = ["--skip_blocks", "6,2", "--resolution", "512", "--train_batch_size", "1", "--mixed_precision", "bf16"]
    assert load_script().main(["--preset", "sana-0.6b", *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    name = write_preset("sana-0.6b", tmp_path / "model")
    command = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--instance_prompt", "a dog", *flags]
    command += ["--instance_data_dir", str(embedded_photos()), "--max_train_steps", "500", "--plan_only"]
    command += ["--residual_budget", "16GB", "--skip_final_inference", "--output_dir", str(tmp_path / "out")]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert load_training_script().main(command) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert planned["model"] == name
    for written in (plan, planned):
        written["stages"] = [{key: s[key] for key in s if "second" not in key} for s in written["stages"]]
    assert plan == {key: planned[key] for key in plan}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "flux"], "--preset 'flux' does not exist"),
        (["--preset", "flux.1-dev", "--skip_blocks", "30,27"], "--skip_blocks 30,27"),
        (["--preset", "flux.1-dev", "--resolution", "500"], "--resolution is 500"),
        (["--preset", "flux.1-dev", "--rank", "0"], "--rank is 0"),
        (["--preset", "flux.1-dev", "--memory_budget", "much"], "'much' is not a number of bytes"),
    ],
)
def test_script_rejects(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The parser ends the process by itself.
    with contextlib.suppress(SystemExit):
        assert load_script().main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_lora_targets_of_a_preset(preset: Preset) -> None:
    config = BlockSkipConfig(leading=2)
    targets = preset.lora_targets(config)
    assert targets and all(target.startswith("single_transformer_blocks.") for target in targets)
    skeleton = preset.skeleton(config)
    assert set(lora_targets(skeleton, LAYERS)) <= set(targets)


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
