"""The wrapper as a module that is moved, saved, compiled, copied, taken apart and called again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from blockskip_hooks import (
    BlockSkipConfig,
    DiTBlockSkipTransformer,
    UserError,
    apply_block_skip,
    lora_targets,
    remove_block_skip,
)
from blockskip_hooks.lora import add_lora
from tests.wrapped import CONFIG, RECORDED, TINY, cast, predict


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
def test_a_copy_would_run_the_blocks_of_the_original_and_is_refused(copied, wrapped_folder: Path):
    for model in (
        DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG),
        DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG),
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


def test_streamed_blocks_follow_the_device_and_dtype_of_the_model(wrapped_folder: Path):
    model = DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG)
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


def test_what_is_saved_is_whole_or_refused(wrapped_folder: Path, tmp_path: Path):
    model = DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG)
    assert {name.removeprefix("transformer.") for name in model.state_dict()} == set(model.transformer.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(type(model.transformer).from_pretrained(tmp_path)), predict(model))
    streamed = DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG)
    for save in (streamed.state_dict, lambda: streamed.save_pretrained(tmp_path)):
        with pytest.raises(UserError, match=r"not in memory .*save_lora_adapter\(folder\)"):
            save()


def test_an_adapter_on_every_block_is_refused_where_some_have_no_weights(wrapped_folder: Path):
    for model in (
        DiTBlockSkipTransformer(TINY.make_transformer(), CONFIG, offload_device="cpu"),
        DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG),
    ):
        model.add_adapter(LoraConfig(target_modules=["to_q"]))
        with pytest.raises(
            UserError, match=r"^attn\.to_q\.lora_A.* no weights to stream; add adapters to .*lora_targets"
        ):
            predict(model)


def test_weights_that_are_streamed_are_not_loaded_into(wrapped_folder: Path):
    model = DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG)
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


def test_a_forward_in_inference_mode_changes_no_later_one(wrapped_folder: Path):
    model = DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG, stream_cache=2**30)
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


def test_a_forward_that_fails_holds_no_streamed_weights(wrapped_folder: Path):
    model = DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG)
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


def test_ddp_takes_a_model_whose_skipped_blocks_have_no_weights(wrapped_folder: Path, one_process: None):
    gradients = []
    for wrap in (lambda model: model, torch.nn.parallel.DistributedDataParallel):
        model = DiTBlockSkipTransformer.from_pretrained(wrapped_folder, CONFIG)
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
