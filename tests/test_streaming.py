"""Skipped blocks are read ahead, kept in host memory where there is room, and shared by forwards that go in step."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.loading import checkpoint_index, host_buffers, streaming
from blockskip_hooks.loading.checkpoint_index import CheckpointWeights
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.loading.quantization import QuantizationConfig, move_weight, quantize_layer
from blockskip_hooks.loading.streaming import frozen_weights_on_host
from blockskip_hooks.planning.plan import PlannedStage
from blockskip_hooks.planning.stages import _send_ahead, _stage
from blockskip_hooks.planning.usage import Usage
from blockskip_hooks.residuals import precompute
from blockskip_hooks.residuals.precompute import _halving
from blockskip_hooks.state import SkipMode
from blockskip_hooks.utils.machine import cache_bytes
from tests import script
from tests.plans import fake_transformer
from tests.tiny import TINY_FAMILIES


FLUX = TINY_FAMILIES[0]
CONFIG = BlockSkipConfig(leading=2, trailing=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    FLUX.make_transformer().save_pretrained(folder / "transformer", max_shard_size="20KB")
    return folder


def load(folder: Path, **kwargs: Any) -> DiTBlockSkipTransformer:
    return DiTBlockSkipTransformer.from_pretrained(folder, CONFIG, **kwargs)


def run(model: DiTBlockSkipTransformer, batch: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return model.transformer(**FLUX.make_inputs(batch), return_dict=False)[0]


class Array(np.ndarray):
    """Compared and hashed as an object."""

    __hash__, __eq__ = object.__hash__, object.__eq__


class Reads(list[tuple[int, str]]):
    """What was read, each with the number of its first byte and the thread's name; as slow as asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        read = checkpoint_index.read_bytes

        def noted(path: Path, start: int, out: Any) -> None:
            time.sleep(seconds)
            self.append((start, threading.current_thread().name))
            read(path, start, out)

        monkeypatch.setattr(checkpoint_index, "read_bytes", noted)

    def taken(self) -> int:
        """The number of them until now, from zero."""
        count = len(self)
        self.clear()
        return count

    @property
    def waited_for(self) -> int:
        """How many of them the forward itself made."""
        return sum(not thread.startswith("read-ahead") for _, thread in self)


def skipped_tensors(model: DiTBlockSkipTransformer) -> int:
    return sum(len(list(module.parameters())) for module in model.streamed_modules.values())


def test_the_next_block_is_read_while_one_runs(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(folder)
    tensors, first = skipped_tensors(model), len(list(model.spans.skipped[0].module.parameters()))
    reads = Reads(monkeypatch)
    expected = run(FLUX_model(folder))
    with model.full_model():
        for begins_anew in (True, False, False):
            assert torch.equal(run(model), expected)
            # The first block of all is read when it is needed, later ones during the forward before.
            assert reads.waited_for == (first if begins_anew else 0)
            reads.clear()
    reads.clear()
    model.capture_residuals(**FLUX.make_inputs(1))
    assert reads.waited_for == first and len(reads) == tensors, "nothing is read that no forward follows for"


def FLUX_model(folder: Path) -> DiTBlockSkipTransformer:
    """The whole model in memory."""
    return DiTBlockSkipTransformer.from_pretrained(folder, BlockSkipConfig())


def test_layers_within_kept_blocks_are_read_ahead_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    kept = load(folder).spans.kept[0].name
    names = [f"{kept}.norm.linear", f"{kept}.norm1.linear"]
    transformer = FLUX_model(folder).transformer
    model = load(folder, recorded_layers=[name for name in names if name in dict(transformer.named_modules())])
    reads = Reads(monkeypatch)
    with model.full_model():
        run(model)
        reads.clear()
        assert torch.equal(run(model), run(FLUX_model(folder)))
    assert reads.waited_for == 0


def test_a_buffer_in_use_is_not_read_into(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever still holds a block's weights sees them unchanged, however far reading has come."""
    model = load(folder)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hold(module: torch.nn.Module, args: Any, output: Any) -> None:
        time.sleep(0.02)
        held.extend((parameter.data, parameter.data.clone()) for parameter in module.parameters())

    for block in model.spans.skipped:
        next(child for child in block.module.children() if list(child.parameters())).register_forward_hook(hold)
    with model.full_model():
        for _ in range(2):
            run(model)
    assert held and all(torch.equal(tensor, copy) for tensor, copy in held)


def test_no_more_is_in_memory_than_the_block_that_runs_and_as_much_ahead(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    model, alive = load(folder), weakref.WeakSet[np.ndarray]()
    largest = max(map(host_buffers.num_bytes, model.streamed_modules.values()))
    sizes: list[int] = []

    def noted(size: int, device: torch.device) -> torch.Tensor:
        # It lives as long as the last tensor in it.
        alive.add(array := np.empty(size, dtype=np.uint8).view(Array))
        sizes.append(sum(array.nbytes for array in alive))
        return torch.from_numpy(array)

    leave = streaming.Streamer.leave

    def patient(streamer: streaming.Streamer, module: torch.nn.Module) -> None:
        # What is read ahead comes in time, however busy the machine is.
        wait(streamer._ahead.values())
        leave(streamer, module)

    monkeypatch.setattr(host_buffers, "_allocate", noted)
    monkeypatch.setattr(streaming.Streamer, "leave", patient)
    with model.full_model():
        run(model)
        run(model)
    assert largest < max(sizes) <= 2 * largest
    planned = fake_transformer(FLUX.make_family(), model.config, CONFIG, device="cpu")
    # Beside it tensors begin at a multiple of some bytes.
    assert 0.8 * max(sizes) < planned.largest_streamed_bytes + planned.ahead_bytes <= max(sizes)
    del model
    assert not alive


def test_what_is_read_ahead_is_planned_as_large_as_what_follows():
    """The first of these blocks has two attentions, the others have one."""
    tiny, config = next(tiny for tiny in TINY_FAMILIES if tiny.name == "sd3.5"), BlockSkipConfig(leading=1, trailing=2)
    family = tiny.make_family()
    planned = fake_transformer(family, load_config(tiny.folder / "transformer"), config)
    model = DiTBlockSkipTransformer(tiny.make_transformer(), config, tiny.family.block_stacks)
    sizes = [sum(p.nbytes for p in module.parameters()) for module in model.streamed_modules.values()]
    assert sizes[0] > max(sizes[1:])
    assert planned.largest_streamed_bytes == sizes[0]
    # The last is followed by the first of the next forward.
    assert planned.ahead_bytes == max(sizes[1:])


@pytest.mark.parametrize(("block_bytes", "peak", "parameters"), [(30, 100, 70), (60, 120, 110)])
def test_a_block_that_is_sent_ahead_is_planned_beside_forwards_not_beside_the_vae(
    block_bytes: int, peak: int, parameters: int
):
    """The VAE takes 100 bytes, a forward 60 and the block beside it."""
    vae, forward = Usage(peak_bytes=100, parameter_bytes=70), Usage(peak_bytes=60, parameter_bytes=50)
    request: Any = SimpleNamespace(device="cuda", limit=lambda *_: 120)
    planned = [_stage("precompute", vae.then(forward), 1), _stage("train", vae, 1)]
    _send_ahead(request, planned, {"precompute": forward}, block_bytes, vae)
    precompute, train = planned
    assert precompute["sends_ahead"] and "sends_ahead" not in train
    assert precompute["peak_device_bytes"] == precompute["peak_reserved_bytes"] == peak
    assert precompute["parameter_bytes"] == parameters and train["peak_device_bytes"] == 100
    _send_ahead(request, planned, {"precompute": forward}, 61, vae)
    assert not precompute["sends_ahead"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_cached_blocks_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch, share: float):
    size = sum(map(host_buffers.num_bytes, load(folder).streamed_modules.values()))
    expected, reads = run(FLUX_model(folder)), Reads(monkeypatch)
    model = load(folder, stream_cache=int(share * size))
    tensors = skipped_tensors(model)
    reads.clear()
    assert torch.equal(run(model), expected) and reads.taken() == tensors
    assert torch.equal(run(model), expected)
    assert 0 < reads.taken() < tensors if share == 0.5 else reads.taken() == (1 - share) * tensors
    assert all(p.is_meta for module in model.streamed_modules.values() for p in module.parameters())


def test_forwards_in_step_read_each_block_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(folder)
    alone = [(run(model, size), model.capture_residuals(**FLUX.make_inputs(size))) for size in (1, 3, 2)]
    reads = Reads(monkeypatch)

    def twice(size: int) -> Callable[[], tuple[torch.Tensor, Any]]:
        def task() -> tuple[torch.Tensor, Any]:
            # The second forward captures, and leaves the model in another mode than it found.
            return run(model, size), model.capture_residuals(**FLUX.make_inputs(size))

        return task

    results = model.together([twice(1), twice(3), twice(2)])
    assert reads.taken() == 2 * skipped_tensors(model)
    for (prediction, residuals), (expected, captured) in zip(results, alone, strict=True):
        assert torch.equal(prediction, expected)
        assert captured.tensors().keys() == residuals.tensors().keys()
        assert all(torch.equal(t, captured.tensors()[name]) for name, t in residuals.tensors().items())
    assert model.skip_state.mode is SkipMode.RUN
    assert all(p.is_meta for module in model.streamed_modules.values() for p in module.parameters())


@pytest.mark.parametrize("leading", [0, 2])
def test_no_streamed_block_is_there_while_kept_blocks_run_in_step(folder: Path, leading: int):
    config = BlockSkipConfig(leading=leading, trailing=1)
    model = DiTBlockSkipTransformer.from_pretrained(folder, config)
    present = []

    def look(*_: Any) -> None:
        weights = [p for block in model.spans.skipped for p in block.module.parameters()]
        present.append(sum(not weight.is_meta for weight in weights))

    for block in model.spans.kept:
        block.module.register_forward_pre_hook(look)
    # Two forwards each, so that the second begins where the last block of the first is present.
    model.together([lambda: [run(model), run(model)]] * 3)
    assert present == [0] * 2 * 3 * len(model.spans.kept)
    # A transformer without its placeholders runs as any other.
    kept = model.spans.kept[0].module
    hooks = len(kept._forward_pre_hooks)
    model.remove()
    assert len(kept._forward_pre_hooks) == hooks - 1


def test_forwards_of_different_lengths_go_in_step_as_far_as_they_can(folder: Path):
    model = load(folder)
    results = model.together([lambda: [run(model), run(model)], lambda: [run(model)], list])
    assert [len(result) for result in results] == [2, 1, 0]
    assert all(torch.equal(prediction, run(model)) for result in results for prediction in result)


def test_an_error_ends_all_that_go_in_step(folder: Path):
    model, ended = load(folder), []

    def fine() -> None:
        try:
            run(model)
        finally:
            ended.append("fine")

    def failing() -> None:
        handle = model.spans.kept[0].module.register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            run(model)
        finally:
            handle.remove()

    with pytest.raises(ZeroDivisionError):
        model.together([failing, fine, fine])
    assert ended == ["fine", "fine"]
    assert all(p.is_meta for module in model.streamed_modules.values() for p in module.parameters())
    assert torch.equal(model.together([lambda: run(model)] * 2)[1], run(model))


def test_a_failure_to_read_ahead_is_the_forwards(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(folder)

    def fails(path: Path, start: int, out: Any) -> None:
        if threading.current_thread().name.startswith("read-ahead"):
            raise OSError("no disk")

    monkeypatch.setattr(checkpoint_index, "read_bytes", fails)
    with pytest.raises(OSError, match="no disk"):
        run(model)


def test_tensors_are_read_in_the_dtype_that_is_wanted(tmp_path: Path):
    stored = {"a.weight": torch.randn(3, 5), "a.scale": torch.tensor(0.3), "a.bias": torch.randn(4).half()}
    save_file(stored, tmp_path / "x.safetensors")
    index = dict.fromkeys(stored, tmp_path / "x.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weights = CheckpointWeights(index, dict.fromkeys(stored, dtype), "a.")
        for name in weights:
            out = torch.empty(stored[f"a.{name}"].shape, dtype=dtype)
            weights.read(name, out)
            assert torch.equal(out, weights[name]) and torch.equal(out, stored[f"a.{name}"].to(dtype))
    with pytest.raises(ValueError, match=r"a\.weight has shape \(3, 5\).*\(5, 3\)"):
        weights.read("weight", torch.empty(5, 3))
    file = tmp_path / "x.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OSError, match="ended while it was read"):
        for name in (weights := CheckpointWeights(index, {n: t.dtype for n, t in stored.items()}, "a.")):
            weights.read(name, torch.empty_like(stored[f"a.{name}"]))


def test_memory_that_runs_out_halves_the_batch():
    sizes: list[int] = []

    def work(size: int) -> str:
        sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return "done"

    assert _halving(work, 13) == "done" and sizes == [13, 6, 3]
    with pytest.raises(RuntimeError, match="reached zero"):
        _halving(lambda size: work(8), 2)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [None, 2])
def test_the_script_makes_the_same_records_in_step(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int | None
):
    """Also where memory runs out: then with half the batch, one at a time, to the weights of such a run."""
    flags = ("--skip_blocks", "1,1", "--skip_final_inference", "--max_train_steps", "4", "--no-refresh_residuals")
    reads, capture = Reads(monkeypatch), precompute.capture

    def train(name: str, in_step: int, size: int, *more: str) -> tuple[Path, int]:
        planned = PlannedStage(together=in_step)
        monkeypatch.setattr(script.load_script(), "planned_stage", lambda plan, name: planned)
        reads.clear()
        words = (*flags, "--precompute_batch_size", str(size), *more)
        return script.train(model, photos, tmp_path / name, *words), len(reads)

    alone, most = train("alone", 1, largest or 4)
    if largest is not None:

        def limited(of: Any, maker: Any, batch: Any) -> Any:
            if len(batch.samples) > largest:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return capture(of, maker, batch)

        monkeypatch.setattr(precompute, "capture", limited)
    in_step, fewest = train("in step", 4, 4, "--stream_cache", "1GiB" if largest else "none")
    assert fewest < most
    script.assert_same_weights(in_step, alone)


def test_the_cache_is_half_of_the_free_memory_beside_an_accelerator(monkeypatch: pytest.MonkeyPatch):
    free = psutil.virtual_memory().available
    assert cache_bytes("auto", torch.device("cpu")) == cache_bytes("none", torch.device("cuda")) == 0
    assert cache_bytes(10**9, torch.device("cpu")) == 10**9
    assert 0.3 * free < cache_bytes("auto", torch.device("cuda")) < 0.7 * free
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 0.15 * free < cache_bytes("auto", torch.device("cuda")) < 0.35 * free


def test_all_of_a_quantised_weight_moves():
    """torchao's inner tensors, and what bitsandbytes keeps beside the weight; seen on the meta device."""
    layers = {
        config: quantize_layer(torch.nn.Linear(64, 64), config, "cpu")
        for config in (
            QuantizationConfig(library="torchao", bits=8),
            QuantizationConfig(library="bitsandbytes", bits=4, double_quant=True),
            QuantizationConfig(library="bitsandbytes", bits=8),
        )
    }
    torchao, four, eight = (layer.weight for layer in layers.values())
    before = torchao.qdata
    move_weight(torchao, "meta")
    assert {getattr(torchao, part).device.type for part in torchao.__tensor_flatten__()[0]} == {"meta"}
    assert before.device.type == "cpu"
    moved: list[torch.device] = []
    four.quant_state.to = moved.append
    with frozen_weights_on_host(list(layers.values())[1]):
        assert moved == [torch.device("cpu")]
    assert len(moved) == 2
    layer: Any = list(layers.values())[2]
    layer(torch.randn(2, 64))
    with frozen_weights_on_host(layer):
        # One copy, to which both refer.
        assert layer.state.CB.data_ptr() == eight.data.data_ptr()
