"""What tensors cost: bytes alive and FLOPs, of real and of fake tensors, seen by torch's dispatcher."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .devices import DeviceType, rounded


@dataclass
class Flops:
    """FLOPs by the formulas of torch's ``FlopCounterMode``, attention apart from other products.

    ``FlopCounterMode`` itself follows modules with autograd hooks, which is slow and holds tensors alive, and leaves
    out the CPU's attention.

    Attributes:
        products: FLOPs of matrix products and convolutions.
        attention: FLOPs of scaled dot-product attention.
    """

    products: int = 0
    attention: int = 0

    def count(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Add one call of an operator."""
        packet = getattr(func, "_overloadpacket", None)
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.attention += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.attention += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=output)


_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ALL_BLOCKS = "all blocks"
"""Name of a phase in which something that every block left is freed."""


@dataclass(frozen=True)
class Phase:
    """A part of a piece of work, such as what one block does.

    Attributes:
        name: The block; ``None`` for what is done before or after the blocks.
        peak_bytes: Most live bytes at a time.
        left_bytes: Live bytes at its end less those at its beginning.
        product_flops: FLOPs of matrix products and convolutions.
        attention_flops: FLOPs of attention.
        freed_bytes: What is freed of bytes that a block left in an earlier phase, by the name of that block.
        events: Number and bytes of each allocation, in order; the number and 0 where it is freed.
    """

    name: str | None
    peak_bytes: int
    left_bytes: int
    product_flops: int
    attention_flops: int
    freed_bytes: Mapping[str, int] = field(default_factory=dict)
    events: Sequence[tuple[int, int]] = ()


class Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of tensors that are alive, each storage once however many views it has.

    Tensors may be fake or real; those made before the context is entered count from :meth:`track` on. One mode counts
    both, because each mode on top of fake tensors costs as much as the fake tensors.

    Args:
        device: Whose allocator rounds the bytes.

    Attributes:
        current: Live bytes now.
        peak: Most live bytes in the current phase; without phases, most so far.
        flops: The FLOPs of the current phase so far.

    Example:
        >>> with Meter() as meter:
        ...     meter.track(model.parameters())
        ...     model(x).sum().backward()
        >>> meter.peak
    """

    def __init__(self, device: DeviceType = "cpu") -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.flops = Flops()
        self._device = device
        self._finalizers: dict[int, weakref.finalize] = {}
        # Of the current phase: the block that works, live bytes at its start, what it freed of other blocks'.
        self._name: str | None = None
        self._start = 0
        self._freed: dict[str, int] = {}
        self._phases: list[Phase] = []
        self._events: list[tuple[int, int]] = []
        self._numbers: dict[int, int] = {}
        self._allocations = 0

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that exist already; those on the meta device hold no memory and do not count."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        # What is there before is no allocation.
        self._events.clear()
        self._numbers.clear()

    def reset_peak(self) -> None:
        """Start the peak anew from what is alive now."""
        self.peak = self.current

    def begin(self, name: str | None) -> None:
        """End the current phase and begin another; nothing happens where a block's phase goes on."""
        if name is None or name != self._name:
            self._end()
            self._name = name

    def raise_peak(self, num_bytes: int) -> None:
        """Count bytes that are alive for a moment, beside what is alive now."""
        self.peak = max(self.peak, self.current + rounded(num_bytes, self._device))
        self._allocations += 1
        self._events += [(self._allocations, num_bytes), (self._allocations, 0)]

    @property
    def phase(self) -> int:
        """Number of the phase that goes on."""
        return len(self._phases)

    def phases(self) -> list[Phase]:
        """The phases so far, the current one included."""
        self._end()
        return self._phases

    def _end(self) -> None:
        left, flops = self.current - self._start, self.flops
        made = self.peak, left, flops.products, flops.attention, self._freed, self._events
        self._phases.append(Phase(self._name, *made))
        self.flops, self._start, self._freed, self._events = Flops(), self.current, {}, []
        self.reset_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is not torch.ops.prim.device.default:
            self._track_output(output)
            self.flops.count(func, args, kwargs, output)
        if self._device == "cuda" and func is _ATTENTION_BACKWARD:
            # CUDA's kernels add up the query's gradient in float32.
            self.raise_peak(4 * args[1].numel())
        return output

    def _track_output(self, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self._count(output.untyped_storage())
        elif isinstance(output, (tuple, list)):
            for part in output:
                self._track_output(part)

    def _count(self, storage: torch.UntypedStorage) -> None:
        # torch keeps a storage's Python object alive as long as the storage, so its identity is the storage's.
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._finalizers:
            return
        size = rounded(num_bytes, self._device)
        self.current += size
        self.peak = max(self.peak, self.current)
        self._finalizers[key] = weakref.finalize(storage, self._free, key, size, self._name)
        if num_bytes:
            self._allocations += 1
            self._numbers[key] = self._allocations
            self._events.append((self._allocations, num_bytes))

    def _free(self, key: int, size: int, block: str | None) -> None:
        self.current -= size
        if block is not None and block != self._name:
            self._freed[block] = self._freed.get(block, 0) + size
        del self._finalizers[key]
        if (number := self._numbers.pop(key, None)) is not None:
            self._events.append((number, 0))

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        # What outlives the context must not count against a later one.
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()
