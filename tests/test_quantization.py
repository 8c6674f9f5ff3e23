"""Quantised kept blocks: what is quantised, truths E1 and E2 on such models, whole runs, the planner, bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, SpanResiduals
from blockskip_hooks.blocks import modulation_layers
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.config import PatchSamplingConfig
from blockskip_hooks.loading import quantization
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.loading.quantization import QuantizationConfig, check_device, read_quantization
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.planning.counters import LiveBytes
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import plan_run
from blockskip_hooks.training.record_plan import describe_records
from blockskip_hooks.training.samples import load_samples
from tests import script
from tests.script import PROMPT, WEIGHTS, assert_same_weights, losses, weights
from tests.tiers import fast_first
from tests.tiny import TINY_FAMILIES, TinyFamily, randomise


def widened(name: str, **changes: Any) -> TinyFamily:
    """A tiny pipeline whose blocks are as wide as a block of 4-bit weights, a few times over."""
    tiny = next(tiny for tiny in TINY_FAMILIES if tiny.name == name)

    def save(folder: Path) -> None:
        shutil.copytree(tiny.folder, folder)
        transformer = tiny.make_transformer()
        torch.manual_seed(0)
        wide = type(transformer).from_config({**transformer.config, **changes})
        shutil.rmtree(folder / "transformer")
        randomise(wide).save_pretrained(folder / "transformer")

    return dataclasses.replace(tiny, name=f"{name}-wide", save=save)


FLUX = widened("flux-dev", num_attention_heads=8)
SANA = widened(
    "sana",
    num_attention_heads=8,
    attention_head_dim=16,
    num_cross_attention_heads=8,
    cross_attention_head_dim=16,
    cross_attention_dim=128,
)


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


CONFIGS = {
    "nf4": QuantizationConfig.named("nf4"),
    "int8": QuantizationConfig.named("int8"),
    "bitsandbytes-int8": QuantizationConfig(library="bitsandbytes", bits=8),
    "fp4-double": QuantizationConfig(library="bitsandbytes", bits=4, quant_type="fp4", double_quant=True),
}
SLOW = {"bitsandbytes-int8", "fp4-double"}
ALL = [
    pytest.param(config, id=name, marks=[needs(config.library), *[pytest.mark.slow] * (name in SLOW)])
    for name, config in CONFIGS.items()
]
METHODS = [
    pytest.param("nf4", marks=needs("bitsandbytes")),
    pytest.param("int8", marks=needs("torchao")),
]
SPANS = BlockSkipConfig(leading=1, trailing=2)
# Relative error of a quantised normally distributed weight.
ERROR = {4: 0.15, 8: 0.02}


@pytest.fixture(params=fast_first([FLUX, SANA]), ids=lambda tiny: tiny.name)
def tiny(request: pytest.FixtureRequest) -> TinyFamily:
    return request.param


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(160, 128), (128, 128), (128, 192)])


def load(
    tiny: TinyFamily,
    config: QuantizationConfig | None,
    spans: BlockSkipConfig = SPANS,
    *,
    recorded: bool = True,
    **kwargs: Any,
) -> DiTBlockSkipTransformer:
    family = tiny.make_family()
    stacks = family.block_stacks
    skeleton = DiTBlockSkipTransformer(tiny.make_transformer(), spans, stacks)
    names = modulation_layers(skeleton.spans, family.modulation_layers) if recorded else ()
    return DiTBlockSkipTransformer.from_pretrained(
        tiny.folder, spans, stacks=stacks, recorded_layers=names, quantization=config, **kwargs
    )


def is_quantized(layer: torch.nn.Module) -> bool:
    return type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params", "Int8Tensor")


def plain_weight(layer: Any) -> torch.Tensor:
    """The weight that a quantised layer multiplies with."""
    weight = layer.weight
    if type(weight).__name__ == "Int8Tensor":
        return weight.dequantize()
    import bitsandbytes.functional as F

    if type(weight).__name__ == "Params4bit":
        return F.dequantize_4bit(weight.data, weight.quant_state)
    scale = weight.SCB if weight.SCB is not None else layer.state.SCB
    return F.int8_vectorwise_dequant(weight.data, scale)


def rounded_transformer(tiny: TinyFamily, model: DiTBlockSkipTransformer) -> torch.nn.Module:
    """The ordinary transformer with the rounded weights of ``model`` in full precision."""
    transformer = tiny.make_transformer()
    with torch.no_grad():
        for name, layer in model.transformer.named_modules():
            if is_quantized(layer):
                weight = transformer.get_submodule(name).weight
                weight.copy_(plain_weight(layer).view_as(weight))
    return transformer


def forward(model: torch.nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    return model(**inputs, **kwargs, return_dict=False)[0]


def train_lora(tiny: TinyFamily, model: DiTBlockSkipTransformer, transformer: torch.nn.Module) -> None:
    """LoRA of rank 2 on the kept blocks of ``transformer``, away from zero."""
    targets = lora_targets(model, tiny.family.lora_layers, tiny.family.text_stream_layers)
    add_lora(transformer, targets, rank=2, alpha=2, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def gradients(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "kept-modulation"])
@pytest.mark.parametrize("config", ALL)
def test_linear_layers_of_kept_blocks_are_quantised_and_nothing_else(
    tiny: TinyFamily, config: QuantizationConfig, recorded: bool
):
    model = load(tiny, config, recorded=recorded)
    original = tiny.make_transformer()
    kept = tuple(f"{block.name}." for block in model.spans.kept)
    expected = {
        name
        for name, layer in original.named_modules()
        if (isinstance(layer, torch.nn.Linear) or config.takes_pointwise and quantization.is_pointwise(layer))
        and name.startswith(kept)
        and name not in model.recorded_layers
    }
    quantized = {name for name, layer in model.transformer.named_modules() if is_quantized(layer)}
    assert quantized == expected and expected
    for name in quantized:
        weight = original.get_submodule(name).weight.flatten(1)
        error = (plain_weight(model.transformer.get_submodule(name)) - weight).norm() / weight.norm()
        assert 0 < error < ERROR[config.bits], name
    streamed = tuple(f"{name}." for name in model.streamed_modules)
    for name, parameter in model.transformer.named_parameters():
        if name.startswith(streamed):
            assert parameter.is_meta, name
        elif name.rpartition(".")[0] not in quantized or name.endswith(".bias"):
            assert torch.equal(parameter, original.get_parameter(name)), name


@pytest.mark.parametrize("config", ALL)
def test_e1_residuals_reproduce_the_full_quantised_model(tiny: TinyFamily, config: QuantizationConfig):
    """The full model streams its skipped blocks in full precision, so it is the ordinary one with rounded weights."""
    model, inputs = load(tiny, config), tiny.make_inputs(2)
    # bitsandbytes' 8-bit layers round their input as well.
    close = 1e-5 if config != CONFIGS["bitsandbytes-int8"] else 1e-2
    with torch.no_grad():
        reference = forward(rounded_transformer(tiny, model), inputs)
        unquantized = forward(tiny.make_transformer(), inputs)
        full = forward(model, inputs)
        residuals = model.capture_residuals(**inputs)
        injected = forward(model, inputs, residuals=residuals)
        again = forward(model, inputs)
    assert (full - reference).abs().max() <= close * reference.abs().max()
    assert (full - unquantized).abs().max() > 1e-4
    assert (injected - full).abs().max() <= 1e-5 * full.abs().max()
    assert torch.equal(again, full)


@pytest.mark.parametrize("config", ALL)
def test_e1_holds_in_bfloat16(tiny: TinyFamily, config: QuantizationConfig):
    model, inputs = load(tiny, config, torch_dtype=torch.bfloat16), tiny.make_inputs(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = forward(model, inputs).float()
        injected = forward(model, inputs, residuals=model.capture_residuals(**inputs)).float()
    assert (injected - full).norm() <= 1e-2 * full.norm()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("config", ALL)
def test_e2_gradients_are_those_of_the_full_model_without_trailing_span(
    tiny: TinyFamily, config: QuantizationConfig, checkpointing: bool
):
    """Images are made in eval mode in between, as in a run: that must not change how the layers compute."""
    model, inputs = load(tiny, config, BlockSkipConfig(leading=2), recorded=False), tiny.make_inputs(2)
    full = rounded_transformer(tiny, model)
    for transformer in (full, model.transformer):
        train_lora(tiny, model, transformer)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
    residuals = model.capture_residuals(**inputs)
    with torch.no_grad():
        forward(model, inputs)
    model.train()

    def trained(module: torch.nn.Module, transformer: torch.nn.Module, **kwargs: Any) -> dict[str, torch.Tensor]:
        transformer.zero_grad()
        forward(module, inputs, **kwargs).square().mean().backward()
        return gradients(transformer)

    actual = trained(model, model.transformer, residuals=residuals)
    # The whole quantised model, and the ordinary one with rounded weights, where rounding errors fall elsewhere.
    own_rounding = 1e-4 if config != CONFIGS["bitsandbytes-int8"] else 5e-2
    with model.full_model() as whole:
        of_whole = trained(whole, whole)
    others = ((of_whole, 1e-5), (trained(full.train(), full), own_rounding))
    for expected, close in others:
        assert actual.keys() == expected.keys() and expected
        for name, gradient in expected.items():
            assert actual[name].dtype == torch.float32 and gradient.abs().max() > 0, name
            assert (actual[name] - gradient).norm() <= close * gradient.norm(), name
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("method", METHODS)
def test_lora_gradients_under_autocast_are_float32_and_reach_every_layer(tiny: TinyFamily, method: str):
    model = load(tiny, CONFIGS[method], torch_dtype=torch.bfloat16)
    inputs = tiny.make_inputs(2)
    train_lora(tiny, model, model.transformer)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        residuals = model.capture_residuals(**inputs)
        prediction = forward(model, inputs, residuals=residuals)
    prediction.float().square().mean().backward()
    found = gradients(model.transformer)
    assert found and all(g is not None and g.dtype == torch.float32 and g.abs().max() > 0 for g in found.values())


@needs("torchao")
def test_no_dequantised_weight_is_kept_for_backward():
    layer = quantization.quantize_layer(torch.nn.Linear(64, 64), CONFIGS["int8"], "cpu")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.ones(2, 64, requires_grad=True)).sum()
    assert not any(tensor.numel() >= 64 * 64 for tensor in saved)


@pytest.mark.parametrize("config", ALL)
def test_a_layer_is_in_full_only_while_it_is_quantised(
    tiny: TinyFamily, config: QuantizationConfig, monkeypatch: pytest.MonkeyPatch
):
    whole: list[int] = []
    original = quantization.quantize_layer

    def could_be_quantized(layer: torch.nn.Module) -> bool:
        is_linear = isinstance(layer, torch.nn.Linear) or quantization.is_pointwise(layer)
        return is_linear and not is_quantized(layer)

    def counted(layer: torch.nn.Linear, *args: Any) -> torch.nn.Linear:
        loaded = [m for m in model_of[-1].modules() if could_be_quantized(m)]
        whole.append(sum(not m.weight.is_meta for m in loaded) - outside[0])
        return original(layer, *args)

    names = load(tiny, config)
    outside = [sum(could_be_quantized(m) and not m.weight.is_meta for m in names.transformer.modules())]
    model_of: list[torch.nn.Module] = []
    make = type(names.transformer).from_config

    def remembered(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model_of.append(make(*args, **kwargs))
        return model_of[-1]

    monkeypatch.setattr(type(names.transformer), "from_config", remembered)
    monkeypatch.setattr("blockskip_hooks.loading.models.quantize_layer", counted)
    load(tiny, config)
    assert whole and set(whole) == {1}


@pytest.mark.parametrize("config", ALL)
def test_named_layers_stay_as_they_are(tiny: TinyFamily, config: QuantizationConfig):
    model = load(tiny, dataclasses.replace(config, skipped_layers=("to_q",)))
    quantized = [name for name, layer in model.transformer.named_modules() if is_quantized(layer)]
    assert quantized and not any(name.endswith(".to_q") for name in quantized)
    assert any(name.endswith(".to_k") for name in quantized)


# Whole runs

FLAGS = ("--skip_blocks", "1,2", "--gradient_checkpointing", "--upcast_before_saving", "--checkpointing_steps", "2")
RUNS = pytest.mark.parametrize(
    ("tiny", "method"),
    [
        pytest.param(FLUX, "nf4", id="flux-nf4", marks=needs("bitsandbytes")),
        pytest.param(SANA, "int8", id="sana-int8", marks=needs("torchao")),
    ],
)
_finished: dict[str, Path] = {}


def run_script(tiny: TinyFamily, photos: Path, output: Path, *flags: str) -> Path:
    extra = [part for flag, value in tiny.flags.items() for part in (f"--{flag}", str(value))]
    sizes = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    return script.train(tiny.folder, photos, output, *extra, *FLAGS, *flags, **sizes)


@pytest.fixture
def finished(tiny: TinyFamily, method: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with 8-bit Adam where it is installed, gradient checkpointing, class images and validation images."""
    if method not in _finished:
        output = tmp_path_factory.mktemp("run") / "out"
        flags = ["--quantization", method, "--validation_prompt", PROMPT, "--num_validation_images", "1"]
        prior = ("--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", "2")
        flags += [*prior, "--class_data_dir", str(output.parent / "class"), *eight_bit_adam()]
        _finished[method] = run_script(tiny, photos, output, *flags)
    yield _finished[method]


def eight_bit_adam() -> list[str]:
    return ["--use_8bit_adam"] if importlib.util.find_spec("bitsandbytes") else []


@RUNS
def test_a_run_trains_and_leaves_a_stock_lora(tiny: TinyFamily, method: str, finished: Path):
    assert len(losses(finished)) == 4 and all(torch.isfinite(torch.tensor(losses(finished))))
    assert len(list((finished.parent / "class").iterdir())) == 2
    assert CONFIGS[method].name in json.loads((finished / "plan.json").read_text())["quantization"]
    assert json.loads((finished / "run_report.json").read_text())["train"]["quantization"] == CONFIGS[method].name
    assert f"| Kept blocks held in | {CONFIGS[method].name} |" in (finished / "README.md").read_text()
    model = DiTBlockSkipTransformer(tiny.make_transformer(), SPANS, tiny.family.block_stacks)
    kept = tuple(f"transformer.{block.name}." for block in model.spans.kept)
    exported = weights(finished)
    assert exported and all(name.startswith(kept) and ".lora_" in name for name in exported)
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in exported.values())

    pipeline = tiny.family.pipeline_class.from_pretrained(tiny.folder)
    pipeline.set_progress_bar_config(disable=True)
    kwargs = json.loads((tiny.folder / "blockskip_defaults.json").read_text())["pipeline_kwargs"]
    call = {**tiny.make_family().prompt_inputs(PROMPT), **kwargs, "output_type": "np"}
    before = torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(0)).images)
    pipeline.load_lora_weights(finished)
    loaded = [p for n, p in pipeline.transformer.named_parameters() if "lora_B" in n]
    assert len(loaded) == sum("lora_B" in name for name in exported) and all(p.abs().max() > 0 for p in loaded)
    after = torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(0)).images)
    assert not torch.equal(before, after)


@RUNS
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    tiny: TinyFamily, method: str, finished: Path, photos: Path, tmp_path: Path
):
    output = tmp_path / "out"
    shutil.copytree(finished / "checkpoint-2", output / "checkpoint-2")
    prior = ("--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", "2")
    flags = ("--class_data_dir", str(finished.parent / "class"), *eight_bit_adam(), *prior)
    run_script(tiny, photos, output, "--quantization", method, *flags, "--resume_from_checkpoint", "latest")
    assert losses(output) == losses(finished)
    assert_same_weights(output, finished)


@needs("bitsandbytes")
def test_a_config_file_of_upstream_does_what_the_flag_does(photos: Path, tmp_path: Path):
    tiny = FLUX
    file = tmp_path / "nf4.json"
    file.write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    flags = ("--max_train_steps", "2")
    one = run_script(tiny, photos, tmp_path / "one", *flags, "--bnb_quantization_config_path", str(file))
    other = run_script(tiny, photos, tmp_path / "other", *flags, "--quantization", "nf4")
    assert_same_weights(one, other)


@needs("bitsandbytes")
@needs("torchao")
def test_records_belong_to_one_quantisation(photos: Path, tmp_path: Path):
    """The trailing residual depends on the kept blocks before it."""
    tiny = FLUX
    descriptions = []
    for method in ("none", "nf4", "int8"):
        argv = ["--pretrained_model_name_or_path", tiny.folder, "--instance_data_dir", photos, "--report_to", "none"]
        argv += ["--instance_prompt", PROMPT, "--output_dir", tmp_path, "--resolution", "64", "--quantization", method]
        run = prepare_run(parse_args([str(word) for word in (*argv, "--skip_blocks", "1,2", "--seed", "0")]))
        sources, plan = load_samples(run)
        descriptions.append(json.dumps(describe_records(run, plan, sources, torch.float32)))
    assert len(set(descriptions)) == 3


# The planner


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
    with LiveBytes() as live:
        live.track(tensor for tensor in held(model) if not tensor.is_meta)
        live.track(tensor for state in optimizer.state.values() for tensor in state.values())
        step()
    assert planned["peak_device_bytes"] == pytest.approx(live.peak, rel=0.05)


def test_the_planner_needs_neither_library(monkeypatch: pytest.MonkeyPatch):
    for package in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    family = FLUX.make_family()
    config = json.loads((FLUX.folder / "transformer" / "config.json").read_text())
    request = PlanRequest(
        family=family,
        transformer_config=config,
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


# Bad input


def test_layers_that_4_bits_do_not_fit_stay_as_they_are():
    """bitsandbytes' CPU kernel mixes up the scales of rows that are no whole number of blocks."""
    narrow = next(tiny for tiny in TINY_FAMILIES if tiny.name == "flux-dev")
    blocks = [block.name for block in DiTBlockSkipTransformer(narrow.make_transformer(), SPANS).spans.kept]
    names = CONFIGS["nf4"].layers(narrow.make_transformer(), blocks)
    layers = [narrow.make_transformer().get_submodule(name) for name in names]
    assert names and all(layer.in_features % 64 == 0 for layer in layers)
    assert len(CONFIGS["int8"].layers(narrow.make_transformer(), blocks)) > len(names)


FLAG = "--bnb_quantization_config_path"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "name a JSON file"]),
        ("{load", ["is not JSON", "correct the file"]),
        ("\xff", ["is not JSON"]),
        ("[1]", ["no JSON object"]),
        ('{"load_in_4bits": true, "x": 1}', ["unknown keys: load_in_4bits, x", "load_in_4bit,"]),
        ("{}", ["either load_in_4bit or load_in_8bit"]),
        ('{"load_in_8bit": false}', ["either load_in_4bit or load_in_8bit"]),
        ('{"load_in_4bit": true, "load_in_8bit": true}', ["not both"]),
    ],
)
def test_a_config_file_that_cannot_work_is_one_line(tmp_path: Path, content: str | None, words: list[str]):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="bnb_quantization_config_path") as error:
        read_quantization("none", str(file))
    message = str(error.value)
    assert "\n" not in message and str(file) in message and all(word in message for word in words)


@needs("bitsandbytes")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_4bit": 1}, "load_in_4bit must be a boolean"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"}, "bf16"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "nn"}, "torch.dtype"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "choose nf4 or fp4"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6}, "must be a float"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "saves nothing"),
    ],
)
def test_a_value_that_bitsandbytes_cannot_use_is_one_line(tmp_path: Path, settings: dict, words: str):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="bnb_quantization_config_path") as error:
        read_quantization("none", str(file))
    assert "\n" not in str(error.value) and words in str(error.value)


@needs("bitsandbytes")
def test_a_config_file_is_read(tmp_path: Path):
    file = tmp_path / "config.json"
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    file.write_text(json.dumps({**settings, "bnb_4bit_compute_dtype": "bfloat16", "quant_method": "bitsandbytes"}))
    config = read_quantization("none", str(file))
    assert config == QuantizationConfig(
        library="bitsandbytes", bits=4, double_quant=True, compute_dtype=torch.bfloat16
    )
    file.write_text(json.dumps({"load_in_8bit": True, "llm_int8_skip_modules": ["to_q"], "llm_int8_threshold": 4.0}))
    config = read_quantization("none", str(file))
    assert config is not None and (config.bits, config.threshold, config.skipped_layers) == (8, 4.0, ("to_q",))
    assert read_quantization("none") is None


@pytest.mark.parametrize(("method", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_a_missing_package_is_named(method: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(ValueError, match=f"--quantization {method} needs .* pip install {package}"):
        read_quantization(method)
    if package == "bitsandbytes":
        file = tmp_path / "config.json"
        file.write_text('{"load_in_8bit": true}')
        with pytest.raises(ValueError, match=f"{FLAG} .* pip install bitsandbytes"):
            read_quantization("none", str(file))


def test_both_flags_at_once_are_refused():
    with pytest.raises(ValueError, match="--quantization nf4 .* give one of them"):
        read_quantization("nf4", "x.json")


@pytest.mark.parametrize("config", ALL)
def test_every_method_works_on_the_cpu(config: QuantizationConfig):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_device(config, torch.device("cpu"), dtype)


@pytest.mark.parametrize("method", METHODS)
def test_a_device_that_the_library_cannot_use_ends_the_run_before_it_starts(
    method: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(*args: Any) -> None:
        raise RuntimeError("no kernel for this device\nmore lines")

    monkeypatch.setattr(quantization, "quantize_layer", fail)
    tiny = FLUX
    with pytest.raises(AssertionError, match="ended with 2"):
        run_script(tiny, photos, tmp_path / "out", "--quantization", method)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "no kernel for this device; leave --quantization" in error
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_bad_config_file_ends_the_script_with_code_two(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(AssertionError, match="ended with 2"):
        run_script(FLUX, photos, tmp_path / "out", FLAG, str(tmp_path / "none.json"))
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "out" / WEIGHTS).exists()
