"""What tensors cost: bytes alive and FLOPs, of real and of fake tensors, seen by torch's dispatcher."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, fake or real, each storage once however many views it has.

    Tensors made before the context is entered count from :meth:`track` on.

    Attributes:
        current: Live bytes now.
        peak: Most live bytes so far.

    Example:
        >>> with LiveBytes() as live:
        ...     live.track(model.parameters())
        ...     model(x).sum().backward()
        >>> live.peak
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._finalizers: dict[int, weakref.finalize] = {}

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that exist already; those on the meta device hold no memory and do not count."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                self._count(tensor.untyped_storage())

    def reset_peak(self) -> None:
        """Start the peak anew from what is alive now."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._track_output(output)
        return output

    def _track_output(self, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self._count(output.untyped_storage())
        elif isinstance(output, (tuple, list)):
            for part in output:
                self._track_output(part)

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        # What outlives the context must not count against a later one.
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()

    def _count(self, storage: torch.UntypedStorage) -> None:
        # torch keeps a storage's Python object alive as long as the storage, so its identity is the storage's.
        key = id(storage)
        if key not in self._finalizers:
            num_bytes = storage.nbytes()
            self.current += num_bytes
            self.peak = max(self.peak, self.current)
            self._finalizers[key] = weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self.current -= num_bytes
        del self._finalizers[key]


class CountFlops(TorchDispatchMode):
    """Counts FLOPs with the formulas of torch's ``FlopCounterMode``, attention apart from other products.

    ``FlopCounterMode`` itself follows modules with autograd hooks, which is slow and holds tensors alive, and leaves
    out the CPU's attention.

    Attributes:
        products: FLOPs of matrix products and convolutions.
        attention: FLOPs of scaled dot-product attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.count(func, args, kwargs, output)
        return output

    def count(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Add one call of an operator."""
        packet = getattr(func, "_overloadpacket", None)
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.attention += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.attention += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=output)


class Meter(LiveBytes):
    """Live bytes and FLOPs in one pass: each mode on top of fake tensors costs as much as the fake tensors.

    Attributes:
        flops: The FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = CountFlops()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is not torch.ops.prim.device.default:
            self._track_output(output)
            self.flops.count(func, args, kwargs, output)
        return output
