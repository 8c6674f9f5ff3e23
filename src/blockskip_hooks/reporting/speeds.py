"""How fast this device does what a run will do most, measured in a part of a second, on weights that are no model's.

A kept block of each stack, with its LoRA, runs forward and backward as in training and forward alone; the VAE works on
small images; and some of the checkpoint is read. Of large models on slow devices the block sees fewer tokens.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..planning.counters import CountFlops
from ..planning.simulation import FakeTransformer, empty_model
from ..training.settings import Run


LARGEST_FORWARD = {"cpu": 4e9, "cuda": 1e12}
"""FLOPs of a measured forward, at most, by kind of device."""
VAE_SIDE = {"cpu": 64, "cuda": 256}
"""Side in pixels of the image that the VAE is measured on, at most."""
MEASURED_SECONDS = 0.1
"""A measurement is repeated until it took this long, but no more often than a few times."""
REPEATS = 5
VAE_BATCH = 8
"""Images that it is measured on at a time, at most."""
READ_BYTES = 8 * 2**20
READS = 4


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What this device reaches, in FLOP/s; reading in bytes/s.

    Attributes:
        train: Forward and backward of training.
        forward: Forward without gradients in precompute's and validation's batches.
        encode: The VAE's encoder.
        decode: The VAE's decoder; ``None`` where no images are made.
        read: Weights from the checkpoint.
    """

    train: float
    forward: float
    encode: float
    decode: float | None
    read: float


def measure_speeds(run: Run, plan: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Speeds:
    """Measure what the plan of a run needs to be turned into seconds.

    Args:
        run: The prepared run.
        plan: Its plan.
        dtype: Dtype of frozen weights.
        device: Where the run computes.
    """
    stages = {stage["name"]: stage for stage in plan["stages"]}
    kept = run.skeleton.spans.kept
    stacks: dict[str, list[str]] = {}
    for block in kept:
        stacks.setdefault(block.name.rpartition(".")[0], []).append(block.name)
    counts = {names[0]: len(names) for names in stacks.values()}
    fake = FakeTransformer(
        run.family,
        run.transformer_config,
        run.config,
        rank=run.args.rank,
        lora_targets=[name for name in run.targets if name.startswith(tuple(f"{block}." for block in counts))],
        dtype=dtype,
    )
    train = stages["train"]
    batch, size, tokens = _small_enough(run, train, len(kept), device)
    trained, forward = _time_blocks(fake, counts, batch, size, tokens, device)
    vae, side = _Vae(run, dtype, device), VAE_SIDE.get(device.type, 64)
    crop = min(run_size(run))
    # Small crops are encoded faster together.
    crops = min(stages.get("precompute", train)["batch_size"], VAE_BATCH) if crop <= side else 1
    encode = vae.speed(crops, min(side, crop), decode=False)
    decode = vae.speed(1, min(side, run.image_size), decode=True) if run.makes_images else None
    return Speeds(train=trained, forward=forward, encode=encode, decode=decode, read=_reading_speed(run))


def run_size(run: Run) -> tuple[int, int]:
    """Height and width in pixels of the largest images in training."""
    shapes = (run.patch.training_shape(bucket) for bucket in range(len(run.patch.shapes)))
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def _small_enough(
    run: Run, train: Mapping[str, Any], kept: int, device: torch.device
) -> tuple[int, tuple[int, int], int]:
    """Batch, image size and tokens of the prompt whose forward through a block is short on this device."""
    batch, size, tokens = train["batch_size"], run_size(run), run.args.max_sequence_length
    forward = 1e12 * (train["tflops_per_step"] - train["vae_tflops"]) / 3 / max(kept, 1)
    limit = LARGEST_FORWARD.get(device.type, LARGEST_FORWARD["cpu"])
    if forward > limit:
        forward, batch = forward / batch, 1
    least = 2 * run.family.latent_token_size
    while forward > limit and (min(size) >= 2 * least or tokens > 32):
        # Not only multiples of what the VAE halves fit a transformer.
        if min(size) >= 2 * least:
            size = (size[0] // 2 // least * least, size[1] // 2 // least * least)
        tokens = max(tokens // 2, 32)
        forward /= 2
    return batch, size, tokens


def _time_blocks(
    fake: FakeTransformer,
    counts: Mapping[str, int],
    batch: int,
    size: tuple[int, int],
    tokens: int,
    device: torch.device,
) -> tuple[float, float]:
    """FLOP/s of a block of each stack, weighed by how many there are: forward and backward, and forward alone."""
    flops, seconds = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for name, (args, kwargs) in fake.block_inputs(list(counts), batch, size, tokens).items():
        block = fake.block(name)
        fill_with_numbers(block, device)
        inputs = [_numbers(value, device) for value in (args, kwargs)]

        def run_block(trains: bool, block: Any = block, inputs: Any = inputs) -> None:
            with torch.set_grad_enabled(trains), _autocast(fake.dtype, device):
                outputs = block(*inputs[0], **inputs[1])
            if trains:
                last = [part for part in _tensors(outputs) if part.requires_grad][-1]
                last.float().sum().backward()

        for trains in (True, False):
            work, each = _timed(functools.partial(run_block, trains), device)
            flops[trains] += counts[name] * work
            seconds[trains] += counts[name] * each
    return flops[True] / seconds[True], flops[False] / seconds[False]


class _Vae:
    """A VAE without the model's weights, on a device."""

    def __init__(self, run: Run, dtype: torch.dtype, device: torch.device) -> None:
        self.run, self.dtype, self.device = run, dtype, device
        self.model: Any = torch.nn.Module.to(empty_model(run.family.vae_config), dtype).requires_grad_(False).eval()
        fill_with_numbers(self.model, device)

    @torch.no_grad()
    def speed(self, count: int, side: int, *, decode: bool) -> float:
        """FLOP/s with so many images of this side."""
        family, multiple = self.run.family, self.run.family.latent_token_size
        side = max(side // multiple * multiple, multiple)
        if decode:
            shape: Sequence[int] = (count, *family.vae_latent_shape(side, side))
            work, seconds = _timed(
                lambda: self.model.decode(torch.zeros(shape, dtype=self.dtype, device=self.device)), self.device
            )
        else:
            pixels = torch.zeros((count, 3, side, side), dtype=self.dtype, device=self.device)
            work, seconds = _timed(lambda: family.posterior(self.model, pixels), self.device)
        return work / seconds


def _timed(work: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """FLOPs of some work, and the seconds of the fastest time: what else the machine does only makes it slower."""
    with CountFlops() as counted:
        work()
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < MEASURED_SECONDS:
        _wait_for(device)
        started = time.perf_counter()
        work()
        _wait_for(device)
        times.append(time.perf_counter() - started)
    return counted.products + counted.attention, min(times)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reading_speed(run: Run) -> float:
    """Bytes per second of some parts of the largest file of weights, which may be in memory already."""
    folder = run.family.model_path / "transformer"
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    length = file.stat().st_size
    read, started = 0, time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        for part in range(READS):
            stream.seek(length * part // READS)
            read += len(stream.read(min(READ_BYTES, length // READS)))
    return read / (time.perf_counter() - started)


def fill_with_numbers(module: torch.nn.Module, device: torch.device) -> None:
    """Give a module without weights numbers for weights, in place."""
    for part in module.modules():
        for holder in (part._parameters, part._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    value = _numbers(tensor, device)
                    if isinstance(tensor, torch.nn.Parameter):
                        value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
                    holder[name] = value


def _numbers(value: Any, device: torch.device) -> Any:
    """Real tensors for fake ones, in lists, tuples and dictionaries; hidden states carry a gradient."""
    if isinstance(value, torch.Tensor):
        real = torch.full(tuple(value.shape), 1, dtype=value.dtype, device=device)
        if value.is_floating_point():
            real.mul_(0.01)
            real.requires_grad_(value.ndim == 3)
        return real
    if isinstance(value, Mapping):
        return {name: _numbers(part, device) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_numbers(part, device) for part in value)
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _autocast(dtype: torch.dtype, device: torch.device) -> Any:
    """Mixed precision as accelerate sets it up."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype) if half else contextlib.nullcontext()


__all__ = ["Speeds", "measure_speeds"]
