"""Truths E1-E3 of block skipping: placeholders with residuals equal the full model, streaming changes nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from blockskip_hooks import (
    BlockSkipConfig,
    CaptureDone,
    DiTBlockSkipTransformer,
    SpanResiduals,
    apply_block_skip,
    remove_block_skip,
)
from blockskip_hooks.blocks import list_blocks, modulation_layers, split_blocks
from blockskip_hooks.families.flux import Flux
from blockskip_hooks.loading.checks import check_model
from blockskip_hooks.loading.models import check_surplus, empty_model
from blockskip_hooks.lora import lora_targets
from blockskip_hooks.state import SkipMode
from tests.tiny import TINY_FAMILIES, TinyFamily, randomise, save_tiny_flux


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


def forward(model: torch.nn.Module, inputs: dict, **kwargs) -> torch.Tensor:
    prediction = model(**inputs, **kwargs, return_dict=False)[0]
    return torch.stack(prediction) if isinstance(prediction, list) else prediction


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
    transformer = tiny.make_transformer()
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


def test_blocks_are_listed_in_execution_order(tiny: TinyFamily):
    transformer = tiny.make_transformer()
    order: list[int] = []
    blocks = list_blocks(transformer, tiny.family.block_stacks)
    for block in blocks:
        block.module.register_forward_pre_hook(lambda *_, index=block.index: order.append(index))
    with torch.no_grad():
        forward(transformer, tiny.make_inputs(1))
    assert order == list(range(tiny.num_blocks))


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


def test_loading_names_what_is_wrong(tmp_path: Path):
    tiny = TINY_FAMILIES[0]
    config = BlockSkipConfig(leading=1)
    transformer = tiny.make_transformer()
    transformer.save_pretrained(tmp_path / "pickled" / "transformer", safe_serialization=False)
    with pytest.raises(ValueError, match="no safetensors weights"):
        DiTBlockSkipTransformer.from_pretrained(tmp_path / "pickled", config)

    transformer.save_pretrained(tmp_path / "truncated" / "transformer")
    weights = tmp_path / "truncated" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        DiTBlockSkipTransformer.from_pretrained(tmp_path / "truncated", config)

    randomise(transformer).register_to_config(in_channels=12)
    transformer.save_pretrained(tmp_path / "mismatch" / "transformer")
    with pytest.raises(ValueError, match="x_embedder.weight has shape"):
        DiTBlockSkipTransformer.from_pretrained(tmp_path / "mismatch", config)


SURPLUS = {
    "a block more": ("transformer_blocks.7.attn.to_q.weight", "1 tensors that its config's FluxTransformer2DModel"),
    "scaled fp8": ("transformer_blocks.0.attn.to_q.scale_weight", "quantised weights.* name the model in bfloat16"),
    "scaled fp8, marked": ("scaled_fp8", "quantised weights"),
    "bitsandbytes": ("transformer_blocks.0.attn.to_q.weight.absmax", "quantised weights"),
}


@pytest.mark.parametrize("case", SURPLUS)
def test_tensors_that_would_be_ignored_are_refused_by_name(case: str, tmp_path: Path):
    """Before a run is planned, from the files' headers, and where the library loads a model."""
    name, words = SURPLUS[case]
    folder = save_tiny_flux(tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), name: torch.ones(2)}, file)
    with pytest.raises(ValueError, match=f"{words}") as error:
        DiTBlockSkipTransformer.from_pretrained(folder, BlockSkipConfig(leading=1))
    assert name in str(error.value)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*{words}") as error:
        check_model(folder, Flux, None)
    assert name in str(error.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])
def test_quantised_weights_of_other_parts_are_refused(part: str, tmp_path: Path):
    folder = save_tiny_flux(tmp_path)
    (file,) = (folder / part).glob("*.safetensors")
    save_file({**load_file(file), "layer.scale_weight": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f": {part} holds quantised weights"):
        check_model(folder, Flux, None)


def test_buffers_that_are_not_saved_may_be_in_a_checkpoint():
    model = torch.nn.Module()
    model.register_buffer("table", torch.ones(2), persistent=False)
    check_surplus(["table"], model, "it")
    with pytest.raises(ValueError, match="it holds 1 tensors .* first other"):
        check_surplus(["table", "other"], model, "it")
