"""What a model on fake tensors needs for a piece of work, counted block by block and reckoned up to its full depth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .allocator import Trace
from .counters import Meter
from .devices import DeviceType, computing_as, rounded
from .equal_blocks import Depth
from .fake_modules import num_bytes
from .usage import Usage


@contextlib.contextmanager
def halts_before(modules: Sequence[torch.nn.Module], meter: Meter, resident: int) -> Iterator[list[tuple[int, int]]]:
    """Within this context note phase and bytes alive beside ``resident`` ones before each of ``modules`` runs."""
    halts: list[tuple[int, int]] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: halts.append((meter.phase, meter.current - resident)))
        for module in modules
    ]
    try:
        yield halts
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Measure:
    """Counts the work of one model.

    Attributes:
        model: On fake tensors; what has no memory now is on the meta device. What trains is LoRA.
        blocks: Its blocks by name.
        depth: How they stand for those of the full model.
        device: Whose rules it computes by.
        beside: Other models in memory that take part, such as text encoders that train.
    """

    model: torch.nn.Module
    blocks: Mapping[str, torch.nn.Module]
    depth: Depth
    device: DeviceType
    beside: Sequence[torch.nn.Module] = ()

    @contextlib.contextmanager
    def counted(self) -> Iterator[Meter]:
        """Count what is done in this context, in phases that begin with each block; fake tensors must be on."""

        def begins(name: str) -> Callable[..., None]:
            return lambda module, args: meter.begin(name)

        with computing_as(self.device), Meter(self.device) as meter:
            meter.track(self._resident().values())
            handles = [block.register_forward_pre_hook(begins(name)) for name, block in self.blocks.items()]
            try:
                yield meter
            finally:
                for handle in handles:
                    handle.remove()

    @contextlib.contextmanager
    def backward_followed(self, meter: Meter) -> Iterator[None]:
        """Within this context a block's backward begins when the gradient of what it returned is there."""

        def follow(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
                tensors = output if isinstance(output, tuple) else (output,)
                first = next((t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad), None)
                if first is not None:
                    first.register_hook(lambda gradient: meter.begin(name))

            return hook

        handles = [block.register_forward_hook(follow(name)) for name, block in self.blocks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def usage(
        self,
        meter: Meter,
        *,
        streamed_bytes: int = 0,
        accumulates: bool = False,
        halts: Sequence[tuple[int, int]] = (),
    ) -> Usage:
        """What was counted, as of the full model.

        Args:
            meter: What was counted.
            streamed_bytes: Of the largest module that had weights only while it ran.
            accumulates: Whether every LoRA weight had a gradient from the start.
            halts: Where the work may be halted: the phase's number, and the bytes that it holds then.
        """
        sizes = {name: rounded(num_bytes(tensor), self.device) for name, tensor in self._resident().items()}
        lora = {name: sizes[name] for name, tensor in self._resident().items() if tensor.requires_grad}
        # What the blocks that were taken out hold all the time.
        copied = self._in_full(sizes) - sum(sizes.values())
        if accumulates:
            copied += self._in_full(lora) - sum(lora.values())
        phases = meter.phases()
        done, grown = self.depth.in_full(phases, copied), self.depth.grown(phases)
        trace = Trace(
            tuple(num_bytes(t) for name, t in self._resident().items() for _ in range(self.depth.times(name))),
            self.depth.events_in_full(phases),
        )
        return Usage(
            peak_bytes=done.peak_bytes,
            parameter_bytes=self._in_full(sizes) - self._in_full(lora) + streamed_bytes,
            lora_bytes=self._in_full(lora),
            product_flops=done.product_flops,
            attention_flops=done.attention_flops,
            halted_bytes=max((held + grown[phase] for phase, held in halts), default=0),
            traces=(trace,) if self.device == "cuda" else (),
        )

    def _in_full(self, sizes: Mapping[str, int]) -> int:
        return sum(size * self.depth.times(name) for name, size in sizes.items())

    def _resident(self) -> dict[str, torch.Tensor]:
        """What is in memory all the time, by name; tensors that modules share once."""
        tensors: dict[str, torch.Tensor] = {}
        for prefix, model in [("", self.model), *((f"{number}:", model) for number, model in enumerate(self.beside))]:
            tensors |= {f"{prefix}{name}": parameter for name, parameter in model.named_parameters()}
            tensors |= {f"{prefix}{name}": buffer for name, buffer in model.named_buffers()}
            # Constants in plain attributes, such as tables of rotary embeddings.
            for name, module in model.named_modules():
                values = {f"{prefix}{name}.{key}": value for key, value in vars(module).items()}
                tensors |= {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return {name: tensor for name, tensor in tensors.items() if tensor.device.type != "meta"}
