"""Truths E1-E3 of block skipping: placeholders with residuals equal the full model, streaming changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, SpanResiduals
from blockskip_hooks.blocks import list_blocks, modulation_layers, split_blocks
from blockskip_hooks.families.flux import Flux
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.lora import lora_targets
from tests.tiny import TINY_FAMILIES, TinyFamily, forward


# Every family with every (n, m) that keeps a block; with one pair in the fast tier.
SPANS = [
    pytest.param(tiny, (n, m), id=f"{tiny.name}-{n},{m}", marks=pytest.mark.fast_for(tiny.name) if n == m == 1 else [])
    for tiny in TINY_FAMILIES
    for n in range(tiny.num_blocks)
    for m in range(tiny.num_blocks - n)
]


def add_lora(
    transformer: torch.nn.Module, tiny: TinyFamily, config: BlockSkipConfig, *, randomise_b: bool = False
) -> None:
    """Give the kept blocks the family's LoRA with rank 2; B starts at zero unless asked otherwise."""
    skeleton = wrap(tiny, empty_model(dict(transformer.config), type(transformer)), config)
    targets = lora_targets(skeleton, tiny.family.lora_layers, tiny.family.text_stream_layers)
    torch.manual_seed(0)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    cast_training_params(transformer)
    if randomise_b:
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)


def wrap(tiny: TinyFamily, transformer: torch.nn.Module, config: BlockSkipConfig, **kwargs) -> DiTBlockSkipTransformer:
    return DiTBlockSkipTransformer(transformer, config, tiny.family.block_stacks, **kwargs)


@pytest.mark.column("E1")
@pytest.mark.parametrize(("tiny", "spans"), SPANS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_residuals_reproduce_the_full_model(tiny: TinyFamily, spans: tuple[int, int], checkpointing: bool):
    """E1, for every (n, m), a span across the double/single-stream border included."""
    inputs = tiny.make_inputs(2)
    with torch.no_grad():
        expected = forward(tiny.make_transformer(), inputs)
    model = wrap(tiny, tiny.make_transformer(), BlockSkipConfig(leading=spans[0], trailing=spans[1]))
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    residuals = model.capture_residuals(**inputs)
    actual = forward(model, inputs, residuals=residuals)
    assert (actual - expected).abs().max() <= 1e-5
    if spans[1] == 0:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("spans", [(2, 0), (0, 2), (1, 2)], ids=str)
def test_bfloat16_is_exact_up_to_rounding(spans: tuple[int, int]):
    """A trailing residual is a difference of rounded numbers and rounded itself; a leading output is kept as it is."""
    tiny = next(tiny for tiny in TINY_FAMILIES if tiny.family is Flux)
    inputs = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in tiny.make_inputs(2).items()
    }
    with torch.no_grad():
        expected = forward(tiny.make_transformer().bfloat16(), inputs)
    model = wrap(tiny, tiny.make_transformer().bfloat16(), BlockSkipConfig(leading=spans[0], trailing=spans[1]))
    actual = forward(model, inputs, residuals=model.capture_residuals(**inputs))
    off = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert off < 0.0015 and (off > 0) == (spans[1] > 0)


def test_skipped_blocks_matter_and_do_not_run(tiny: TinyFamily):
    """Without residuals the prediction is another one; with them the skipped weights are not read at all."""
    inputs = tiny.make_inputs(1)
    model = wrap(tiny, tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=2))
    residuals = model.capture_residuals(**inputs)
    with torch.no_grad():
        expected = forward(model, inputs, residuals=residuals)
        for block in model.spans.skipped:
            for parameter in block.module.parameters():
                parameter.fill_(float("nan"))
        assert torch.equal(forward(model, inputs, residuals=residuals), expected)
    identity = wrap(tiny, tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=2, residuals="none"))
    assert (forward(identity, inputs, residuals=SpanResiduals()) - expected).abs().max() > 1e-2


@pytest.mark.column("E2")
@pytest.mark.parametrize(
    ("tiny", "leading"),
    [pytest.param(tiny, n, id=f"{tiny.name}-{n}") for tiny in TINY_FAMILIES for n in range(1, tiny.num_blocks)],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_equal_the_full_model_without_trailing_span(tiny: TinyFamily, leading: int, checkpointing: bool):
    """E2: m = 0, LoRA away from zero, every LoRA gradient."""
    inputs = tiny.make_inputs(2)
    config = BlockSkipConfig(leading=leading)

    def gradients(skip: bool) -> dict[str, torch.Tensor]:
        model: torch.nn.Module = tiny.make_transformer()
        add_lora(model, tiny, config, randomise_b=True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        kwargs = {}
        if skip:
            model = wrap(tiny, model, config)
            kwargs["residuals"] = model.capture_residuals(**inputs)
        forward(model, inputs, **kwargs).square().mean().backward()
        return {
            name.removeprefix(
                "transformer.",
            )
            if skip
            else name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys() and expected
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("spans", [(1, 0), (0, 1), (2, 1)], ids=str)
@pytest.mark.parametrize(
    "tiny", [tiny for tiny in TINY_FAMILIES if tiny.family.modulation_layers], ids=lambda tiny: tiny.name
)
def test_recorded_layers_need_no_weights(tiny: TinyFamily, spans: tuple[int, int]):
    """The outputs of modulation layers in the residuals give the same prediction and gradients without the layers."""
    inputs = tiny.make_inputs(2)
    config = BlockSkipConfig(leading=spans[0], trailing=spans[1])

    def gradients(recorded: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        transformer = tiny.make_transformer()
        add_lora(transformer, tiny, config, randomise_b=True)
        skeleton = split_blocks(list_blocks(transformer, tiny.family.block_stacks), config)
        names = modulation_layers(skeleton, tiny.family.modulation_layers) if recorded else ()
        assert bool(names) == recorded
        model = wrap(tiny, transformer, config, recorded_layers=names)
        residuals = model.capture_residuals(**inputs)
        assert (residuals.modulation is not None) == recorded
        for name in names:
            for parameter in transformer.get_submodule(name).parameters():
                parameter.data.fill_(float("nan"))
        prediction = forward(model, inputs, residuals=residuals)
        prediction.square().mean().backward()
        return prediction.detach(), {n: p.grad for n, p in transformer.named_parameters() if p.requires_grad}

    expected, actual = gradients(recorded=False), gradients(recorded=True)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(actual[1][name], gradient) for name, gradient in expected[1].items())


def test_recorded_layers_stream_and_are_undone(tmp_path: Path):
    tiny = TINY_FAMILIES[0]
    transformer, inputs = tiny.make_transformer(), tiny.make_inputs(2)
    transformer.save_pretrained(tmp_path / "transformer")
    config = BlockSkipConfig(leading=1, trailing=1)
    names = modulation_layers(split_blocks(list_blocks(transformer), config), tiny.family.modulation_layers)
    model = DiTBlockSkipTransformer.from_pretrained(tmp_path, config, recorded_layers=names)
    assert all(p.is_meta for name in names for p in model.transformer.get_submodule(name).parameters())
    with torch.no_grad():
        expected = forward(transformer, inputs)
        assert torch.equal(forward(model, inputs), expected)
        residuals = model.capture_residuals(**inputs)
        assert (forward(model, inputs, residuals=residuals) - expected).abs().max() <= 1e-5
        with pytest.raises(ValueError, match="No recorded output"):
            forward(model, inputs, residuals=SpanResiduals(**{**vars(residuals), "modulation": None}))
        wrapped = DiTBlockSkipTransformer(transformer, config, recorded_layers=names, offload_device="cpu")
        assert torch.equal(forward(wrapped.remove(), inputs), expected)


def test_trailing_span_passes_the_gradient_through(tiny: TinyFamily):
    """With m > 0 the skip is the identity for gradients, so every kept LoRA still receives one."""
    inputs = tiny.make_inputs(2)
    config = BlockSkipConfig(leading=1, trailing=2)
    model = wrap(tiny, tiny.make_transformer(), config)
    add_lora(model.transformer, tiny, config, randomise_b=True)
    residuals = model.capture_residuals(**inputs)
    forward(model, inputs, residuals=residuals).square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


@pytest.mark.column("E3")
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"], ids=["one file", "shards"])
def test_streamed_forward_is_the_ordinary_forward(tiny: TinyFamily, tmp_path: Path, max_shard_size: str):
    """E3: bit for bit, and skipped blocks hold weights only while they run."""
    # Frozen as the streamed one is: on some CPUs torch rounds layers otherwise whose weights ask for gradients.
    transformer = tiny.make_transformer().requires_grad_(False)
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size=max_shard_size)
    inputs = tiny.make_inputs(2)
    with torch.no_grad():
        expected = forward(transformer, inputs)
    config = BlockSkipConfig(leading=2, trailing=1)
    model = DiTBlockSkipTransformer.from_pretrained(
        tmp_path, config, stacks=tiny.family.block_stacks, transformer_class=type(transformer)
    )
    with torch.no_grad(), model.full_model():
        assert torch.equal(forward(model.transformer, inputs), expected)
    assert all(p.is_meta for block in model.spans.skipped for p in block.module.parameters())
    assert not any(p.is_meta for block in model.spans.kept for p in block.module.parameters())
    residuals = model.capture_residuals(**inputs)
    assert (forward(model, inputs, residuals=residuals) - expected).abs().max() <= 1e-5


def test_host_offload_streams_and_is_undone(tiny: TinyFamily):
    inputs = tiny.make_inputs(1)
    transformer = tiny.make_transformer()
    with torch.no_grad():
        expected = forward(transformer, inputs)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    model = wrap(tiny, transformer, BlockSkipConfig(leading=1, trailing=2), offload_device="cpu")
    assert all(p.is_meta for block in model.spans.skipped for p in block.module.parameters())
    with torch.no_grad():
        assert torch.equal(forward(model, inputs), expected)
    restored = model.remove()
    with torch.no_grad():
        assert torch.equal(forward(restored, inputs), expected)
    assert before.keys() == restored.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in restored.state_dict().items())


def test_bfloat16_weights_stream_in_their_dtype(tmp_path: Path):
    tiny = TINY_FAMILIES[0]
    tiny.make_transformer().to(torch.bfloat16).save_pretrained(tmp_path / "transformer")
    inputs = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and k != "img_ids" else v
        for k, v in tiny.make_inputs(1).items()
    }
    config = BlockSkipConfig(leading=2, trailing=1)
    model = DiTBlockSkipTransformer.from_pretrained(tmp_path, config, torch_dtype=torch.bfloat16)
    residuals = model.capture_residuals(**inputs)
    assert residuals.leading_hidden_states.dtype == torch.bfloat16
    with torch.no_grad():
        full = forward(model, inputs)
        assert (forward(model, inputs, residuals=residuals) - full).abs().max() <= 0.05 * full.abs().max()


def test_blocks_are_listed_in_execution_order(tiny: TinyFamily):
    transformer = tiny.make_transformer()
    order: list[int] = []
    blocks = list_blocks(transformer, tiny.family.block_stacks)
    for block in blocks:
        block.module.register_forward_pre_hook(lambda *_, index=block.index: order.append(index))
    with torch.no_grad():
        forward(transformer, tiny.make_inputs(1))
    assert order == list(range(tiny.num_blocks))
