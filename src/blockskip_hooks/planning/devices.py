"""How a kind of device computes, as far as memory depends on it: autocast's lists, fused kernels, rounding.

Fake tensors live on the CPU, where backward needs no driver. So that they take what they would take on another device,
the CPU's autocast kernels are replaced, within a context, by ones that cast as that device's do. Which operators those
are is read from torch's dispatcher, where the kernels of all devices are registered whether or not there is one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map


DeviceType = Literal["cuda", "cpu", "mps"]
"""Devices whose rules are known. Others, such as XPU, have CUDA's lists."""
PLANNED_DEVICES: tuple[DeviceType, ...] = ("cuda", "cpu", "mps")

# Names of torch's `AT_FORALL_LOWER_PRECISION_FP` and `AT_FORALL_PROMOTE` (ATen/autocast_mode.h); whatever else a GPU's
# autocast has a kernel for runs in float32.
_LOWERED = (
    "_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution prelu "
    "addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot "
    "_thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "_scaled_dot_product_flash_attention scaled_dot_product_attention cudnn_convolution cudnn_convolution_transpose "
    "_mps_convolution"
)
_PROMOTED = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"
LOWERED, PROMOTED = frozenset(_LOWERED.split()), frozenset(_PROMOTED.split())
# CUDA's caching allocator hands out, and torch.cuda.memory_allocated counts, multiples of this.
CUDA_GRAIN = 512


def rules_for(device_type: str) -> DeviceType:
    """The rules that a device of this type is planned by."""
    return "cpu" if device_type == "cpu" else "mps" if device_type == "mps" else "cuda"


def rounded(num_bytes: int, device: DeviceType) -> int:
    """Bytes that a tensor takes on a device."""
    return -(-num_bytes // CUDA_GRAIN) * CUDA_GRAIN if device == "cuda" else num_bytes


@contextlib.contextmanager
def computing_as(device: DeviceType) -> Iterator[None]:
    """Within this context fake tensors of the CPU are cast and kept as tensors of another device are.

    The CPU's own autocast is not what it was meanwhile, so nothing else may compute.
    """
    if device == "cpu":
        yield
        return
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    there, here = set(registered(f"Autocast{device.upper()}")), set(registered("AutocastCPU"))
    libraries = [torch.library.Library("aten", "IMPL", key) for key in ("AutocastCPU", "AutogradCPU")]
    autocast, autograd = libraries
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH) if device == "mps" else contextlib.nullcontext():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name in there | here:
                packet, _, overload = name.removeprefix("aten::").partition(".")
                if name in there and packet in LOWERED and name in here:
                    continue
                operator = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
                if operator is None or name in there and packet in LOWERED:
                    # Nothing of a model calls what is below an operator that is cast already.
                    continue
                kernel = _cast(operator, packet in PROMOTED) if name in there else torch.library.fallthrough_kernel
                autocast.impl(operator, kernel)
            autograd.impl(torch.ops.aten.rms_norm.default, _fused_rms_norm)
            if device == "cuda":
                autograd.impl(torch.ops.aten.dropout.default, _fused_dropout)
            yield
    finally:
        for library in libraries:
            library._destroy()


def _cast(operator: Any, promoted: bool) -> Callable[..., Any]:
    """An autocast kernel that runs an operator in float32 or, promoted, in the widest dtype of its inputs."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        wide = [False]

        def look(value: Any) -> Any:
            wide[0] |= isinstance(value, torch.Tensor) and value.dtype == torch.float32
            return value

        def cast(value: Any) -> Any:
            eligible = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(torch.float32) if eligible else value

        with torch._C._ExcludeDispatchKeyGuard(key):
            if promoted:
                tree_map(look, (args, kwargs))
            if wide[0] or not promoted:
                args, kwargs = tree_map(cast, (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


class _RmsNorm(torch.autograd.Function):
    """What a fused RMS norm takes and keeps; the CPU's is a sequence of operators that keep more."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor | None, dims: int) -> torch.Tensor:
        reciprocals = torch.empty(input.shape[: input.dim() - dims], dtype=torch.float32)
        ctx.save_for_backward(input, weight, reciprocals)
        return torch.empty_like(input)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), torch.empty_like(weight) if ctx.needs_input_grad[1] else None, None


def _fused_rms_norm(
    input: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    return _RmsNorm.apply(input, weight, len(shape))


class _Dropout(torch.autograd.Function):
    """What a fused dropout takes and keeps: a mask of a byte per number, where the CPU's keeps factors."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(input, dtype=torch.bool))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.empty_like(gradient)


def _fused_dropout(input: torch.Tensor, probability: float, train: bool) -> torch.Tensor:
    return _Dropout.apply(input) if train and probability > 0 else input
