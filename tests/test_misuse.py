"""The library used wrongly, or as one would guess: right, or refused in one line of its own words."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

from blockskip_hooks import (
    BlockSkipConfig,
    DiTBlockSkipTransformer,
    PatchSamplingConfig,
    QuantizationConfig,
    SpanResiduals,
    UserError,
    apply_block_skip,
    list_blocks,
    lora_targets,
)
from blockskip_hooks.loading.quantization import quantize_layer
from tests.wrapped import CONFIG, RECORDED, TINY, cast, predict


# Settings


@pytest.mark.parametrize("count", [2.5, "2", True, None, -1], ids=repr)
def test_counts_of_blocks_are_whole_numbers(count):
    with pytest.raises(UserError, match=r"^BlockSkipConfig\.trailing is .*; give a whole number of blocks >= 0\.$"):
        BlockSkipConfig(trailing=count)


def test_counts_of_other_libraries_will_do():
    assert BlockSkipConfig(leading=np.int64(2)).num_skipped == 2


@pytest.mark.parametrize("size", [256.0, "256", True], ids=repr)
def test_sizes_of_patches_are_whole_numbers(size):
    with pytest.raises(UserError, match="^PatchSamplingConfig.min_size is .*; give a whole number of pixels above 0"):
        PatchSamplingConfig(mode="dynamic", min_size=size, max_size=512, multiple=16)


@pytest.mark.parametrize("config", [{"leading": 1}, (1, 1), None], ids=repr)
def test_spans_come_as_a_config(config):
    for wrap in (DiTBlockSkipTransformer, apply_block_skip):
        with pytest.raises(UserError, match=r"does not say what to skip; give BlockSkipConfig\("):
            wrap(TINY.make_transformer(), config)


def test_messages_are_in_the_words_of_the_library():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    for misuse in (
        lambda: BlockSkipConfig(leading=3, trailing=3).validate_for(5),
        lambda: PatchSamplingConfig(mode="dynamic", min_size=250, max_size=512, multiple=16),
        lambda: PatchSamplingConfig(mode="dynamic", min_size=512, max_size=256, multiple=16),
        lambda: lora_targets(model, ["nothing"]),
        lambda: lora_targets(model, []),
        lambda: lora_targets(model, ["to_q"], blocks=["nothing"]),
    ):
        with pytest.raises(UserError) as error:
            misuse()
        assert "--" not in str(error.value) and "\n" not in str(error.value)


# What is wrapped


def test_what_is_no_transformer_is_named():
    for wrap in (DiTBlockSkipTransformer, apply_block_skip):
        with pytest.raises(UserError, match="^A str is no transformer"):
            wrap("FLUX.1-dev", CONFIG)
        with pytest.raises(UserError, match="^Linear has no stack of blocks"):
            wrap(torch.nn.Linear(2, 2), CONFIG)


def test_a_wrapper_around_a_wrapper_is_refused():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    for wrap in (DiTBlockSkipTransformer, apply_block_skip):
        for wrapped in (model, model.transformer):
            with pytest.raises(UserError, match="applied to this transformer already"):
                wrap(wrapped, CONFIG)
    with pytest.raises(UserError, match=r"^DiTBlockSkipTransformer is a wrapper .* its `\.transformer`"):
        list_blocks(model)
    adapted = get_peft_model(TINY.make_transformer(), LoraConfig(target_modules=["to_q"]))
    with pytest.raises(UserError, match=r"^PeftModel is a wrapper .* its `\.base_model\.model`"):
        DiTBlockSkipTransformer(adapted, CONFIG)


def test_a_model_that_could_not_be_wrapped_is_left_alone():
    transformer = TINY.make_transformer()
    with pytest.raises(UserError, match="recorded_layers has 'nothing', which is no linear layer of a kept block"):
        DiTBlockSkipTransformer(transformer, CONFIG, recorded_layers="nothing", offload_device="cpu")
    assert not any(p.is_meta for p in transformer.parameters())
    model = DiTBlockSkipTransformer(transformer, CONFIG)
    with pytest.raises(UserError, match="applied to this transformer already"):
        DiTBlockSkipTransformer(transformer, CONFIG, offload_device="cpu")
    assert not any(p.is_meta for p in model.parameters())


def test_weights_that_cannot_come_and_go_are_named_before_any_moves():
    with_adapter, without_weights, quantized = (TINY.make_transformer() for _ in range(3))
    with_adapter.add_adapter(LoraConfig(target_modules=["to_q"]))
    cpu_offload(without_weights, execution_device="cpu")
    block = quantized.transformer_blocks[0]
    layer = torch.nn.Linear(64, 64)
    block.attn.to_q = quantize_layer(layer, QuantizationConfig(library="bitsandbytes", bits=4), "cpu")
    for transformer, what in (
        (with_adapter, "an adapter's"),
        (without_weights, "not in memory"),
        (quantized, "bitsandbytes' own"),
    ):
        places = [parameter.device for parameter in transformer.parameters()]
        with pytest.raises(UserError, match=f"^offload_device takes plain weights, but .* is {what}; leave"):
            DiTBlockSkipTransformer(transformer, CONFIG, offload_device="cpu")
        assert places == [parameter.device for parameter in transformer.parameters()]
    # Where nothing is to move, they may be what they are, and others' hooks stay.
    for transformer in (with_adapter, without_weights):
        expected = predict(transformer)
        hooks = [hasattr(module, "_hf_hook") for module in transformer.modules()]
        model = DiTBlockSkipTransformer(transformer, CONFIG)
        residuals = model.capture_residuals(**TINY.make_inputs(2))
        assert (predict(model, residuals=residuals) - expected).abs().max() <= 1e-5
        assert torch.equal(predict(model.remove()), expected)
        assert hooks == [hasattr(module, "_hf_hook") for module in transformer.modules()]


def test_a_model_whose_blocks_are_compiled_computes_the_same():
    transformer = TINY.make_transformer()
    expected = predict(transformer)
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    model = DiTBlockSkipTransformer(transformer, CONFIG)
    residuals = model.capture_residuals(**TINY.make_inputs(2))
    assert (predict(model, residuals=residuals) - expected).abs().max() <= 1e-5
    torch._dynamo.reset()


def test_one_name_is_a_name_and_not_its_letters():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    assert lora_targets(model, "to_q") == lora_targets(model, ["to_q"])
    block = model.spans.kept[0].name
    assert lora_targets(model, "to_q", blocks=block) == [f"{block}.attn.to_q"]
    assert len(list_blocks(model.transformer, "transformer_blocks")) == 2


def test_lora_needs_the_wrapper():
    with pytest.raises(UserError, match="a FluxTransformer2DModel does not say; give the DiTBlockSkipTransformer"):
        lora_targets(TINY.make_transformer(), ["to_q"])


# Residuals


def test_records_of_several_samples_become_one_batch():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    inputs = TINY.make_inputs(2)
    batched = {n for n, v in inputs.items() if torch.is_tensor(v) and v.shape[0] == 2 and not n.endswith("_ids")}
    single = [{n: v[i : i + 1] if n in batched else v for n, v in inputs.items()} for i in range(2)]
    records = [model.capture_residuals(**one) for one in single]
    expected, joined = model.capture_residuals(**inputs), SpanResiduals.cat(records)
    assert joined.tensors().keys() == expected.tensors().keys()
    for name, tensor in joined.tensors().items():
        assert (tensor - expected.tensors()[name]).abs().max() <= 1e-5
    assert (predict(model, inputs, residuals=joined) - predict(model, inputs)).abs().max() <= 1e-5


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"], ids=str)
def test_what_is_copied_to_the_host_has_arrived(device, monkeypatch: pytest.MonkeyPatch):
    """A copy from an accelerator that does not wait is garbage for whoever reads it at once; no CPU shows it."""
    waited = []
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a, non_blocking=False: waited.append(not non_blocking) or to(t, *a)
    )
    SpanResiduals(trailing_hidden_states=torch.zeros(1, 4, 8)).to(device)
    SpanResiduals(trailing_hidden_states=torch.zeros(1, 4, 8)).to("meta")
    assert waited == [True, False]


def test_records_that_are_no_batch_are_refused():
    one = SpanResiduals(trailing_hidden_states=torch.zeros(1, 4, 8))
    with pytest.raises(UserError, match="of the same spans"):
        SpanResiduals.cat([one, SpanResiduals(leading_hidden_states=torch.zeros(1, 4, 8))])
    with pytest.raises(UserError, match="must be some"):
        SpanResiduals.cat([])
    for records in (one, [one.tensors()], [None]):
        with pytest.raises(UserError, match="^SpanResiduals.cat takes a list of SpanResiduals"):
            SpanResiduals.cat(records)
    with pytest.raises(UserError, match=r"trailing_hidden_states .* \(4, 8\) and \(6, 8\) behind the batch"):
        SpanResiduals.cat([one, SpanResiduals(trailing_hidden_states=torch.zeros(1, 6, 8))])


@pytest.mark.parametrize("residuals", [{}, [], torch.zeros(1)], ids=lambda value: type(value).__name__)
def test_residuals_of_another_type_are_refused(residuals):
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    with pytest.raises(UserError, match=r"is a \w+; give what capture_residuals returned, .*SpanResiduals\.cat"):
        predict(model, residuals=residuals)


def test_recorded_outputs_are_checked_and_cast_as_residuals_are():
    model = DiTBlockSkipTransformer(TINY.make_transformer().bfloat16(), CONFIG, recorded_layers=RECORDED)
    inputs = cast(TINY.make_inputs(2), torch.bfloat16)
    residuals = model.capture_residuals(**inputs)
    recorded, expected = residuals.modulation, predict(model, inputs, residuals=residuals)
    residuals.modulation = recorded.float()
    assert torch.equal(predict(model, inputs, residuals=residuals), expected)
    wide = torch.cat([recorded, recorded], dim=1)  # Of more layers.
    for wrong in (recorded[:1], recorded[:, :-8], wide):
        residuals.modulation = wrong
        with pytest.raises(
            UserError, match=r"^The recorded output has shape .* but .*norm1\.linear needs .* another batch"
        ):
            predict(model, inputs, residuals=residuals)


@pytest.mark.parametrize("count", [-1, 4, 1000])
def test_condition_tokens_are_part_of_the_images(count: int):
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    residuals = model.capture_residuals(**TINY.make_inputs(2))
    for call in (model.capture_residuals, partial(model, residuals=residuals)):
        with (
            torch.no_grad(),
            pytest.raises(UserError, match=rf"^condition_tokens is {count}, but .* receives . tokens"),
        ):
            call(**TINY.make_inputs(2), condition_tokens=count)
    assert torch.equal(predict(model, residuals=residuals), predict(model, residuals=residuals))


def test_the_transformer_called_by_itself_never_gets_residuals_of_before():
    """A pipeline around it would make images of stale records."""
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    whole = predict(model.transformer)
    predict(model, residuals=model.capture_residuals(**TINY.make_inputs(2)))
    with pytest.raises(UserError, match=r"call it inside model\.full_model\(\)"):
        predict(model.transformer)
    with model.full_model() as transformer:
        assert torch.equal(predict(transformer), whole)
    assert torch.equal(predict(model), whole) and torch.equal(predict(model.transformer), whole)


# Where it is loaded from


def test_a_hub_id_downloads_the_transformer_only(wrapped_folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(name: str, **kwargs) -> str:
        asked.append((name, kwargs))
        return str(wrapped_folder)

    monkeypatch.setattr("blockskip_hooks.loading.download.snapshot_download", download)
    model = DiTBlockSkipTransformer.from_pretrained("someone/tiny", CONFIG, revision="main")
    assert torch.equal(predict(model), predict(TINY.make_transformer()))
    DiTBlockSkipTransformer.from_pretrained("someone/tiny", CONFIG)
    patterns = ["transformer/*.json", "transformer/*.safetensors"]
    assert [name for name, _ in asked] == ["someone/tiny"] * 2
    assert asked[0][1] == {"revision": "main", "allow_patterns": patterns} and asked[1][1]["revision"] is None


def test_a_model_that_is_not_there_is_named(wrapped_folder: Path, tmp_path: Path):
    with pytest.raises(
        UserError,
        match="^black-forest-labs/FLUX.1-dev is not a folder, and not whole in the hub's cache; unset HF_HUB_OFFLINE",
    ):
        DiTBlockSkipTransformer.from_pretrained("black-forest-labs/FLUX.1-dev", CONFIG)
    with pytest.raises(UserError, match=r"has no transformer/config\.json; give the folder of a pipeline"):
        DiTBlockSkipTransformer.from_pretrained(tmp_path, CONFIG)
    with pytest.raises(UserError, match=r"has no transformer/config\.json"):
        DiTBlockSkipTransformer.from_pretrained(wrapped_folder / "transformer", CONFIG)
    with pytest.raises(UserError, match="^torch_dtype is 'bf16'; give a dtype of torch"):
        DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG, torch_dtype="bf16")
    with pytest.raises(UserError, match="^quantization is 'nf4'; give a config, such as QuantizationConfig"):
        DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG, quantization="nf4")
