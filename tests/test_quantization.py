"""Quantised kept blocks: what is quantised, and truths E1 and E2 on such models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.blocks import modulation_layers
from blockskip_hooks.loading import quantization
from blockskip_hooks.loading.quantization import QuantizationConfig, check_device
from blockskip_hooks.lora import add_lora, lora_targets
from tests.quantized import ALL, CONFIGS, FLUX, METHODS, SANA, SPANS, needs
from tests.tiers import fast_first
from tests.tiny import TINY_FAMILIES, TinyFamily


# Relative error of a quantised normally distributed weight.
ERROR = {4: 0.15, 8: 0.02}


@pytest.fixture(params=fast_first([FLUX, SANA]), ids=lambda tiny: tiny.name)
def tiny(request: pytest.FixtureRequest) -> TinyFamily:
    return request.param


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


def test_layers_that_4_bits_do_not_fit_stay_as_they_are():
    """bitsandbytes' CPU kernel mixes up the scales of rows that are no whole number of blocks."""
    narrow = next(tiny for tiny in TINY_FAMILIES if tiny.name == "flux-dev")
    blocks = [block.name for block in DiTBlockSkipTransformer(narrow.make_transformer(), SPANS).spans.kept]
    names = CONFIGS["nf4"].layers(narrow.make_transformer(), blocks)
    layers = [narrow.make_transformer().get_submodule(name) for name in names]
    assert names and all(layer.in_features % 64 == 0 for layer in layers)
    assert len(CONFIGS["int8"].layers(narrow.make_transformer(), blocks)) > len(names)


@pytest.mark.parametrize("config", ALL)
def test_every_method_works_on_the_cpu(config: QuantizationConfig):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_device(config, torch.device("cpu"), dtype)
