"""The library used wrongly, or as one would guess: right, or refused in one line of its own words."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    remove_block_skip,
)
from blockskip_hooks.loading.quantization import quantize_layer
from blockskip_hooks.lora import add_lora
from tests.tiny import TINY_FAMILIES


TINY = TINY_FAMILIES[0]
CONFIG = BlockSkipConfig(leading=1, trailing=1)
RECORDED = "transformer_blocks.1.norm1.linear"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny transformer as a checkpoint."""
    folder = tmp_path_factory.mktemp("pipeline")
    TINY.make_transformer().save_pretrained(folder / "transformer")
    return folder


def predict(model: torch.nn.Module, inputs: dict | None = None, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or TINY.make_inputs(2)), **kwargs, return_dict=False)[0]


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}


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


# What a module can do


def test_a_second_removal_does_nothing():
    transformer = TINY.make_transformer()
    expected = predict(transformer)
    first = DiTBlockSkipTransformer(transformer, CONFIG)
    assert first.remove() is transformer and first.remove() is transformer
    remove_block_skip(transformer)
    second = DiTBlockSkipTransformer(transformer, CONFIG)
    first.remove()
    residuals = second.capture_residuals(**TINY.make_inputs(2))
    assert (predict(second, residuals=residuals) - expected).abs().max() <= 1e-5


def test_placeholders_taken_off_by_either_way_are_off():
    transformer = TINY.make_transformer()
    expected = predict(transformer)
    for skips in (CONFIG, BlockSkipConfig()):
        model = DiTBlockSkipTransformer(transformer, skips, offload_device="cpu", recorded_layers=RECORDED)
        with pytest.raises(UserError, match="applied to this transformer already"):
            apply_block_skip(transformer, CONFIG)
        remove_block_skip(transformer)
        assert model.remove() is transformer and not any(p.is_meta for p in transformer.parameters())
        assert torch.equal(predict(copy.deepcopy(transformer)), expected)
        assert not any(module._forward_pre_hooks for module in transformer.modules())


def test_a_model_may_be_taken_apart_within_full_model():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    expected = predict(model)
    predict(model, residuals=model.capture_residuals(**TINY.make_inputs(2)))
    with model.full_model() as transformer:
        model.remove()
    assert torch.equal(predict(transformer), expected) and torch.equal(predict(model), expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda function: function.__name__)
def test_a_copy_would_run_the_blocks_of_the_original_and_is_refused(copied, folder: Path):
    for model in (
        DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG),
        DiTBlockSkipTransformer.from_pretrained(folder, CONFIG),
    ):
        with pytest.raises(UserError, match="can be neither copied nor pickled"):
            copied(model)
    transformer = TINY.make_transformer()
    apply_block_skip(transformer, CONFIG)
    if copied is not copy.copy:  # A shallow copy is the same model.
        with pytest.raises(UserError, match="can be neither copied nor pickled"):
            copied(transformer)
    remove_block_skip(transformer)
    assert torch.equal(predict(copy.deepcopy(transformer)), predict(transformer))


def test_streamed_blocks_follow_the_device_and_dtype_of_the_model(folder: Path):
    model = DiTBlockSkipTransformer.from_pretrained(folder, CONFIG)
    streamed = next(iter(model.streamed_modules.values()))
    assert torch.equal(predict(model.to("cpu")), predict(TINY.make_transformer()))
    model.to(torch.bfloat16)
    inputs = cast(TINY.make_inputs(2), torch.bfloat16)
    expected = predict(TINY.make_transformer().to(torch.bfloat16), inputs)
    assert torch.equal(predict(model, inputs), expected)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in streamed.parameters())


def test_host_weights_come_back_in_the_dtype_that_the_model_has_now():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG, offload_device="cpu").half()
    assert {p.dtype for p in model.remove().parameters()} == {torch.float16}
    assert not any("_apply" in vars(module) for module in model.transformer.modules())


def test_what_is_saved_is_whole_or_refused(folder: Path, tmp_path: Path):
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    assert {name.removeprefix("transformer.") for name in model.state_dict()} == set(model.transformer.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(type(model.transformer).from_pretrained(tmp_path)), predict(model))
    streamed = DiTBlockSkipTransformer.from_pretrained(folder, CONFIG)
    for save in (streamed.state_dict, lambda: streamed.save_pretrained(tmp_path)):
        with pytest.raises(UserError, match=r"not in memory .*save_lora_adapter\(folder\)"):
            save()


def test_an_adapter_on_every_block_is_refused_where_some_have_no_weights(folder: Path):
    for model in (
        DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG, offload_device="cpu"),
        DiTBlockSkipTransformer.from_pretrained(folder, CONFIG),
    ):
        model.add_adapter(LoraConfig(target_modules=["to_q"]))
        with pytest.raises(
            UserError, match=r"^attn\.to_q\.lora_A.* no weights to stream; add adapters to .*lora_targets"
        ):
            predict(model)


def test_weights_that_are_streamed_are_not_loaded_into(folder: Path):
    model = DiTBlockSkipTransformer.from_pretrained(folder, CONFIG)
    expected = predict(model)
    weights = {name: 2 * tensor for name, tensor in TINY.make_transformer().state_dict().items()}
    prefixed = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    for module, given in ((model.transformer, weights), (model, prefixed)):
        with pytest.raises(UserError, match=r"^transformer_blocks\.0\..* so load_state_dict cannot change it"):
            module.load_state_dict(given)
    assert torch.equal(predict(model), expected)
    kept = {name: tensor for name, tensor in weights.items() if name.startswith("transformer_blocks.1.")}
    model.transformer.load_state_dict(kept, strict=False)
    assert not torch.equal(predict(model), expected)


def test_a_forward_in_inference_mode_changes_no_later_one(folder: Path):
    model = DiTBlockSkipTransformer.from_pretrained(folder, CONFIG, stream_cache=2**30)
    with torch.inference_mode():
        residuals = model.capture_residuals(**TINY.make_inputs(2))
    add_lora(model.transformer, lora_targets(model, "to_q"), rank=2, alpha=2, dropout=0.0, seed=0)
    model(**TINY.make_inputs(2), residuals=residuals, return_dict=False)[0].sum().backward()
    with model.full_model() as transformer:
        transformer(**TINY.make_inputs(2), return_dict=False)[0].sum().backward()
    with torch.inference_mode():
        predict(model)
    inputs = cast(TINY.make_inputs(2), torch.bfloat16)
    assert torch.equal(predict(model.to(torch.bfloat16), inputs), predict(TINY.make_transformer().bfloat16(), inputs))


def test_a_forward_that_fails_holds_no_streamed_weights(folder: Path):
    model = DiTBlockSkipTransformer.from_pretrained(folder, CONFIG)
    expected = predict(model)

    def fail(*_) -> None:
        handle.remove()
        raise RuntimeError("out of memory")

    handle = model.spans.leading[0].module.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(model)
    assert all(p.is_meta for p in model.spans.skipped[0].module.parameters()) and not model._streamer._ahead
    assert torch.equal(predict(model), expected)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_takes_a_model_whose_skipped_blocks_have_no_weights(folder: Path, one_process: None):
    gradients = []
    for wrap in (lambda model: model, torch.nn.parallel.DistributedDataParallel):
        model = DiTBlockSkipTransformer.from_pretrained(folder, CONFIG)
        parameters = add_lora(model.transformer, lora_targets(model, "to_q"), rank=2, alpha=2, dropout=0.0, seed=0)
        residuals = model.capture_residuals(**TINY.make_inputs(2))
        wrap(model)(**TINY.make_inputs(2), residuals=residuals, return_dict=False)[0].sum().backward()
        gradients.append([parameter.grad for parameter in parameters])
    assert all(map(torch.equal, *gradients)) and any(gradient.any() for gradient in gradients[0])


def test_eval_and_train_reach_the_transformer():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    assert model.eval() is model and not model.transformer.training and model.train().transformer.training


def test_a_compiled_wrapper_computes_the_same():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG).eval()
    compiled = torch.compile(model, backend="eager")
    residuals = compiled.capture_residuals(**TINY.make_inputs(2))
    assert torch.equal(predict(compiled, residuals=residuals), predict(model, residuals=residuals))
    assert torch.equal(predict(compiled), predict(model))
    with pytest.raises(UserError, match="^OptimizedModule is a wrapper"):
        DiTBlockSkipTransformer(torch.compile(TINY.make_transformer()), CONFIG)


# Where it is loaded from


def test_a_hub_id_downloads_the_transformer_only(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(name: str, **kwargs) -> str:
        asked.append((name, kwargs))
        return str(folder)

    monkeypatch.setattr("blockskip_hooks.loading.download.snapshot_download", download)
    model = DiTBlockSkipTransformer.from_pretrained("someone/tiny", CONFIG, revision="main")
    assert torch.equal(predict(model), predict(TINY.make_transformer()))
    DiTBlockSkipTransformer.from_pretrained("someone/tiny", CONFIG)
    patterns = ["transformer/*.json", "transformer/*.safetensors"]
    assert [name for name, _ in asked] == ["someone/tiny"] * 2
    assert asked[0][1] == {"revision": "main", "allow_patterns": patterns} and asked[1][1]["revision"] is None


def test_a_model_that_is_not_there_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(
        UserError,
        match="^black-forest-labs/FLUX.1-dev is not a folder, and not whole in the hub's cache; unset HF_HUB_OFFLINE",
    ):
        DiTBlockSkipTransformer.from_pretrained("black-forest-labs/FLUX.1-dev", CONFIG)
    with pytest.raises(UserError, match=r"has no transformer/config\.json; give the folder of a pipeline"):
        DiTBlockSkipTransformer.from_pretrained(tmp_path, CONFIG)
    with pytest.raises(UserError, match=r"has no transformer/config\.json"):
        DiTBlockSkipTransformer.from_pretrained(folder / "transformer", CONFIG)
    with pytest.raises(UserError, match="^torch_dtype is 'bf16'; give a dtype of torch"):
        DiTBlockSkipTransformer.from_pretrained(folder, CONFIG, torch_dtype="bf16")
    with pytest.raises(UserError, match="^quantization is 'nf4'; give a config, such as QuantizationConfig"):
        DiTBlockSkipTransformer.from_pretrained(folder, CONFIG, quantization="nf4")


# One call after the other


def recording_model(checkpointing: bool) -> DiTBlockSkipTransformer:
    """A model that trains, with a recorded layer: what gradient checkpointing reads again in backward."""
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG, recorded_layers=RECORDED)
    add_lora(model.transformer, lora_targets(model, "to_q"), rank=2, alpha=2, dropout=0.0, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_forwards_own_residuals(checkpointing: bool):
    """However many forwards there are before their backward."""
    samples = [TINY.make_inputs(2), {**TINY.make_inputs(2), "timestep": torch.full((2,), 0.1)}]

    def gradients(at_once: bool) -> list[torch.Tensor]:
        model = recording_model(checkpointing)
        losses = []
        for sample, residuals in [(sample, model.capture_residuals(**sample)) for sample in samples]:
            losses.append(model(**sample, residuals=residuals, return_dict=False)[0].square().mean())
            if not at_once:
                losses.pop().backward()
        if at_once:
            sum(losses).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(at_once=True), gradients(at_once=False)))


def test_a_second_thread_is_refused_and_changes_nothing():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    residuals = model.capture_residuals(**TINY.make_inputs(2))
    expected, refused = predict(model, residuals=residuals), []

    def call_elsewhere(*_) -> None:
        hook.remove()
        for call in (
            lambda: predict(model),
            lambda: model.capture_residuals(**TINY.make_inputs(2)),
            lambda: model.full_model().__enter__(),
        ):
            with ThreadPoolExecutor(1) as pool:
                refused.append(str(pool.submit(call).exception()))

    hook = model.spans.kept[0].module.register_forward_hook(call_elsewhere)
    assert torch.equal(predict(model, residuals=residuals), expected)
    assert len(refused) == 3 and all(line.startswith("Another call of this model is running") for line in refused)
    assert torch.equal(predict(model, residuals=residuals), expected)


def test_an_error_in_a_forward_is_over_with_it():
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    residuals, expected = model.capture_residuals(**TINY.make_inputs(2)), predict(model)
    wrong = {**TINY.make_inputs(2), "img_ids": torch.zeros(1, 3)}
    for kwargs in ({}, {"residuals": residuals}):
        with pytest.raises(RuntimeError):
            predict(model, wrong, **kwargs)
        assert torch.equal(predict(model), expected)


def test_residuals_that_nothing_reads_are_refused():
    transformer = TINY.make_transformer()
    residuals = DiTBlockSkipTransformer(transformer, CONFIG).capture_residuals(**TINY.make_inputs(2))
    remove_block_skip(transformer)
    for config, name in ((BlockSkipConfig(leading=1), "trailing_hidden"), (BlockSkipConfig(), "leading_hidden")):
        model = DiTBlockSkipTransformer(transformer, config)
        with pytest.raises(UserError, match=f"^The residuals have {name}.* of another config; capture them again"):
            predict(model, residuals=residuals)
        model.remove()
    state = apply_block_skip(transformer, CONFIG)
    with pytest.raises(UserError, match=r"^`residuals=` is a dict; give what capture_residuals returned"):
        state.residuals = residuals.tensors()
