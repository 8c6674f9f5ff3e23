"""Placeholders and the wrapper in use: applied, driven by hand, removed, and refused where they would go wrong."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig

from blockskip_hooks import (
    BlockSkipConfig,
    CaptureDone,
    DiTBlockSkipTransformer,
    SpanResiduals,
    apply_block_skip,
    remove_block_skip,
)
from blockskip_hooks.blocks import list_blocks
from blockskip_hooks.state import SkipMode
from tests.tiny import TINY_FAMILIES, TinyFamily, forward


def test_apply_and_remove_leave_the_model_as_it_was(tiny: TinyFamily):
    transformer = tiny.make_transformer()
    inputs = tiny.make_inputs(1)
    with torch.no_grad():
        expected = forward(transformer, inputs)
        stacks = tiny.family.block_stacks
        state = apply_block_skip(transformer, BlockSkipConfig(leading=2, trailing=1), stacks)
        assert state.mode is SkipMode.RUN and torch.equal(forward(transformer, inputs), expected)
        with pytest.raises(ValueError, match="already"):
            apply_block_skip(transformer, BlockSkipConfig(leading=1), stacks)
        remove_block_skip(transformer, stacks)
        assert torch.equal(forward(transformer, inputs), expected)
    apply_block_skip(transformer, BlockSkipConfig(leading=1), stacks)


def test_wrong_residuals_and_spans_are_named():
    tiny = TINY_FAMILIES[0]
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=1))
    residuals = model.capture_residuals(**tiny.make_inputs(1))
    with pytest.raises(ValueError, match="another batch"):
        forward(model, tiny.make_inputs(2), residuals=residuals)
    with pytest.raises(ValueError, match="No residual of the leading span"):
        forward(model, tiny.make_inputs(1), residuals=SpanResiduals())
    with pytest.raises(ValueError, match="leaves none to train"):
        DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=3, trailing=2))
    with pytest.raises(ValueError, match=">= 0"):
        BlockSkipConfig(leading=-1)


def test_without_residuals_an_identity_stays_one():
    """``residuals="none"`` is the identity for skipped blocks in every call; the full model is asked for by name."""
    tiny = TINY_FAMILIES[0]
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=1, residuals="none"))
    inputs = tiny.make_inputs(1)
    with torch.no_grad():
        identity = forward(model, inputs, residuals=SpanResiduals())
        assert torch.equal(forward(model, inputs), identity)
        with model.full_model() as transformer:
            whole = forward(transformer, inputs)
        assert torch.equal(whole, forward(tiny.make_transformer(), inputs)) and not torch.equal(whole, identity)
        assert torch.equal(forward(model, inputs), identity)


def test_a_mode_that_is_none_is_refused():
    state = apply_block_skip(TINY_FAMILIES[0].make_transformer(), BlockSkipConfig(leading=1))
    with pytest.raises(ValueError, match="'banana' is no mode .* SkipMode.INJECT, SkipMode.CAPTURE, SkipMode.RUN"):
        state.mode = "banana"  # type: ignore[assignment]
    assert state.mode is SkipMode.RUN


def test_placeholders_are_driven_by_hand_as_the_reference_says(tiny: TinyFamily):
    """Capture, inject, remove, without the wrapper; nothing is raised on the way."""
    transformer, config = tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=1)
    inputs = tiny.make_inputs(2)
    expected = DiTBlockSkipTransformer(transformer, config).capture_residuals(**inputs).tensors()
    remove_block_skip(transformer)
    state = apply_block_skip(transformer, config)
    state.mode = SkipMode.CAPTURE
    with torch.no_grad():
        full = forward(transformer, inputs)
        captured = state.captured.tensors()
        assert captured.keys() == expected.keys() and all(torch.equal(captured[n], t) for n, t in expected.items())
        state.mode, state.residuals = SkipMode.INJECT, state.captured
        assert (forward(transformer, inputs) - full).abs().max() <= 1e-5
    remove_block_skip(transformer)
    with pytest.raises(ValueError, match="SkipMode.INJECT needs the placeholders, which were removed"):
        state.mode = SkipMode.INJECT


@pytest.mark.parametrize("stops_early", [False, True])
def test_every_capture_leaves_residuals_of_its_own(stops_early: bool):
    """Forwards in capture mode one after the other: each sample's residuals, and those kept before stay."""
    tiny = TINY_FAMILIES[0]
    transformer, config = tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=2)
    samples = [tiny.make_inputs(1), {**tiny.make_inputs(1), "timestep": torch.tensor([0.1])}]
    model = DiTBlockSkipTransformer(transformer, config)
    expected = [model.capture_residuals(**inputs).tensors() for inputs in samples]
    model.remove()
    state = apply_block_skip(transformer, config)
    state.mode, state.stops_early = SkipMode.CAPTURE, stops_early
    kept = []
    for inputs in samples:
        with torch.no_grad(), pytest.raises(CaptureDone) if stops_early else contextlib.nullcontext():
            forward(transformer, inputs)
        kept.append(state.captured)
    assert not torch.equal(expected[0]["leading_hidden_states"], expected[1]["leading_hidden_states"])
    for residuals, tensors in zip(kept, expected, strict=True):
        assert residuals.tensors().keys() == tensors.keys()
        assert all(torch.equal(residuals.tensors()[name], tensor) for name, tensor in tensors.items())
    state.mode = SkipMode.RUN
    assert state.captured is kept[1]
    state.mode = SkipMode.CAPTURE
    assert state.captured.tensors() == {}
    remove_block_skip(transformer)
    assert not transformer._forward_pre_hooks


def test_placeholders_are_found_in_any_stack():
    tiny = TINY_FAMILIES[0]
    transformer, inputs = tiny.make_transformer(), tiny.make_inputs(1)
    with torch.no_grad():
        expected = forward(transformer, inputs)
    state = apply_block_skip(transformer, BlockSkipConfig(leading=1, residuals="none"), ["single_transformer_blocks"])
    state.mode = SkipMode.INJECT
    with pytest.raises(ValueError, match="applied to this transformer already"):
        apply_block_skip(transformer, BlockSkipConfig(leading=1), ["transformer_blocks"])
    remove_block_skip(transformer, ["transformer_blocks"])
    with torch.no_grad():
        assert torch.equal(forward(transformer, inputs), expected)
    apply_block_skip(transformer, BlockSkipConfig(leading=1), ["transformer_blocks"])


def test_a_wrong_stack_is_named():
    transformer = TINY_FAMILIES[0].make_transformer()
    with pytest.raises(ValueError, match="no stack of blocks 'transformer_block'; .*transformer_blocks, single_tr"):
        list_blocks(transformer, ["transformer_block", "single_transformer_blocks"])
    transformer.transformer_blocks.append(torch.nn.Linear(1, 1))
    for stacks in (None, ["transformer_blocks"]):
        with pytest.raises(ValueError, match="transformer_blocks.2 is a Linear, .* not know as a block"):
            list_blocks(transformer, stacks)


def test_a_training_step_without_residuals_is_refused():
    """It would train the whole model; without gradients, in evaluation and with nothing skipped it is no mistake."""
    tiny = TINY_FAMILIES[0]
    inputs = tiny.make_inputs(1)
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=1))
    with pytest.raises(ValueError, match="got no residuals.*pass `residuals=`"):
        forward(model.train(), inputs)
    with torch.no_grad():
        expected = forward(model, inputs)
    with model.full_model() as transformer:
        assert torch.equal(forward(transformer, inputs), expected)
    assert torch.equal(forward(model.eval(), inputs), expected)
    model.remove()
    assert torch.equal(forward(model.train(), inputs), expected)
    plain = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig())
    assert torch.equal(forward(plain.train(), inputs), expected)


def test_residuals_after_removal_are_refused():
    tiny = TINY_FAMILIES[0]
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=1))
    inputs = tiny.make_inputs(1)
    residuals = model.capture_residuals(**inputs)
    transformer = model.remove()
    with pytest.raises(ValueError, match="removed; call apply_block_skip again"):
        forward(model, inputs, residuals=residuals)
    with pytest.raises(ValueError, match="removed"):
        model.capture_residuals(**inputs)
    with torch.no_grad():
        assert torch.equal(forward(model, inputs), forward(transformer, inputs))


def test_lora_on_a_skipped_block_is_refused_in_training():
    tiny = TINY_FAMILIES[0]
    model = DiTBlockSkipTransformer(tiny.make_transformer().requires_grad_(False), BlockSkipConfig(leading=1))
    inputs = tiny.make_inputs(1)
    model.transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    residuals = model.capture_residuals(**inputs)
    with pytest.raises(ValueError, match="LoRA of transformer_blocks.0 would never learn"):
        forward(model, inputs, residuals=residuals)
    with torch.no_grad():
        forward(model, inputs, residuals=residuals)
    for parameter in model.transformer.transformer_blocks[0].parameters():
        parameter.requires_grad_(False)
    forward(model, inputs, residuals=residuals).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_residuals_of_another_dtype_are_cast(dtype: torch.dtype):
    tiny = TINY_FAMILIES[0]
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=1))
    inputs = tiny.make_inputs(1)
    residuals = model.capture_residuals(**inputs)
    other = SpanResiduals(**{name: tensor.to(dtype) for name, tensor in residuals.tensors().items()})
    with torch.no_grad():
        expected, cast = (forward(model, inputs, residuals=r) for r in (residuals, other))
    assert cast.dtype == torch.float32
    assert (cast - expected).abs().max() <= 0.05 * expected.abs().max()


def test_residuals_that_are_no_numbers_are_refused():
    tiny = TINY_FAMILIES[0]
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=1))
    residuals = model.capture_residuals(**tiny.make_inputs(1))
    residuals.leading_hidden_states = residuals.leading_hidden_states.long()
    with pytest.raises(ValueError, match="leading span has the dtype torch.int64; give floating point"):
        forward(model, tiny.make_inputs(1), residuals=residuals)


def test_wrapper_is_transparent():
    tiny = TINY_FAMILIES[0]
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=1))
    assert model.config.num_layers == 2
    assert model.dtype == torch.float32
    assert not hasattr(model, "no_such_attribute")


def test_weights_that_processes_share_stay_on_their_devices():
    model = DiTBlockSkipTransformer(TINY_FAMILIES[0].make_transformer(), BlockSkipConfig(leading=1))
    model.is_sharded = True
    with pytest.raises(ValueError, match="processes share cannot be in host memory"):
        model.on_host()
