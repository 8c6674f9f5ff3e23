"""The stand-in accelerator: built once, made known to torch as the device ``standin`` and to the libraries above it.

On it a CPU shows what a GPU would: tensors left behind on another device, bytes that live at once under CUDA's
autocast and fused kernels, bytes that cross, and how often the host waits. It says nothing of speed or rounding.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from torch.utils import cpp_extension


# Another name for the same: libraries that have lists of devices know "musa".
NAME = os.environ.get("STANDIN_NAME", "standin")
SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ["-O1", "-std=c++20"]

native: Any = None
"""The compiled module once :func:`activate` has been called."""


def cache_folder() -> Path:
    """Where what is built stays for later sessions."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "blockskip_standin"


def missing_tool() -> str | None:
    """What building lacks on this machine, or ``None``."""
    compiler = os.environ.get("CXX", "g++")
    return next((tool for tool in (compiler, "ninja") if shutil.which(tool) is None), None)


def build() -> Path:
    """The compiled module of this source for this torch and Python; takes a minute or two once per machine."""
    about = f"{SOURCE.read_text()}{FLAGS}{torch.__version__}{sys.version}".encode()
    target = cache_folder() / hashlib.sha256(about).hexdigest()[:16] / "standin_device.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    # The lock goes with the process that holds it; that of torch's loader stays when a build is killed.
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                cpp_extension.load(
                    "standin_device", [str(SOURCE)], extra_cflags=FLAGS, build_directory=scratch, with_cuda=False
                )
                os.replace(Path(scratch) / target.name, target)
    return target


def activate() -> None:
    """Make the device known, once per process, before anything looks for an accelerator."""
    global native
    if native is not None:
        return
    spec = importlib.util.spec_from_file_location("standin_device", build())
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    for name, kernel in _KERNELS.items():
        _LIBRARY.impl(name, kernel, "PrivateUse1")
    _teach_libraries()


def _device_module() -> ModuleType:
    """What torch and libraries look for in ``torch.standin``, as in ``torch.cuda``."""
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = module.is_bf16_supported = lambda *_: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.get_device_name = lambda *_: "stand-in accelerator"
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.set_device = module.synchronize = module.empty_cache = lambda *_: None
    # What is drawn without a generator is seeded by torch.manual_seed through the CPU's.
    module.manual_seed = module.manual_seed_all = lambda _: None
    module._is_in_bad_fork = lambda: False
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    return module


def _teach_libraries() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    import accelerate.accelerator

    # Without a device this asks about CUDA; peft's and bitsandbytes' layers cast by it.
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.is_autocast_enabled = lambda *device: enabled(*(device or (NAME,)))
    torch.get_autocast_gpu_dtype = lambda: dtype(NAME)
    # Where accelerate knows no scaler of a device's own it takes CUDA's, which does nothing without CUDA.
    accelerate.accelerator.get_grad_scaler = lambda _=None, **settings: torch.amp.GradScaler(NAME, **settings)
    if importlib.util.find_spec("bitsandbytes") is not None:
        _teach_bitsandbytes()


def _teach_bitsandbytes() -> None:
    """4-bit layers by the CPU's kernels, holding what CUDA's hold: with many rows a dequantised copy."""
    import bitsandbytes  # noqa: F401

    ops = torch.ops.bitsandbytes

    def by_cpu(name: str) -> Any:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            return _here(getattr(ops, name)(*map(_alias, args), **{key: _alias(kwargs[key]) for key in kwargs}))

        return kernel

    def product(inputs: torch.Tensor, weight: torch.Tensor, shape: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        dequantised = torch.empty(tuple(shape), dtype=inputs.dtype, device=NAME)
        output = by_cpu("gemm_4bit")(inputs, weight, shape, *args, **kwargs)
        del dequantised
        return output

    for name in ("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"):
        torch.library.register_kernel(f"bitsandbytes::{name}", NAME, by_cpu(name))
    torch.library.register_kernel("bitsandbytes::gemm_4bit", NAME, product)


def _alias(value: Any) -> Any:
    """The CPU's view of a tensor of the device; a tensor of another device is refused."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type != NAME:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and {value.device}")
    return native.alias(value)


def _here(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return native.adopt(value)
    return tuple(map(_here, value)) if isinstance(value, (tuple, list)) else value


def _convolution(*args: Any) -> Any:
    return _here(torch.ops.aten.convolution(*map(_alias, args)))


def _convolution_backward(gradient: Any, input: Any, weight: Any, *settings: Any) -> Any:
    sizes = [gradient.shape[1]]
    return _here(torch.ops.aten.convolution_backward(*map(_alias, (gradient, input, weight)), sizes, *settings))


def _attention(query: Any, key: Any, value: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False,
               debug: bool = False, *, scale: float | None = None) -> Any:  # fmt: skip
    """As CUDA's fused kernels hold it: no matrix of scores; a logarithm per query and head for backward."""
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"Expected one dtype, not {query.dtype}, {key.dtype} and {value.dtype}")
    output, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *map(_alias, (query, key, value)), dropout, causal, attn_mask=_alias(mask), scale=scale
    )
    number = torch.empty((), dtype=torch.long, device=NAME)
    nothing = torch.empty(0, device=NAME)
    return (*_here((output, logarithm)), nothing, nothing, query.shape[2], key.shape[2], number, number, nothing)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, mask: Any, wanted: Any, output: Any,
                        logarithm: Any, _1: Any, _2: Any, _3: int, _4: int, dropout: float, causal: bool, *_: Any,
                        scale: float | None = None) -> Any:  # fmt: skip
    # CUDA's flash attention adds up the query's gradient in float32; nothing else is done with it here.
    total = torch.empty_like(query, dtype=torch.float32)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(_alias, (gradient, query, key, value, output, logarithm)),
        dropout, causal, attn_mask=_alias(mask), scale=scale,
    )  # fmt: skip
    del total
    return (*_here(gradients), None)


def _rms_norm(input: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """CUDA has a fused kernel that keeps one number per row for backward; the CPU's is a sequence of operators."""
    x, axes = _alias(input).float(), [-1 - number for number in range(len(shape))]
    inverse = (x.square().mean(axes, keepdim=True) + (torch.finfo(torch.float32).eps if eps is None else eps)).rsqrt()
    y = x * inverse if weight is None else x * inverse * _alias(weight).float()
    return _here((y.to(input.dtype), inverse))


def _rms_norm_backward(gradient: Any, input: Any, shape: Any, inverse: Any, weight: Any, wanted: Any) -> Any:
    g, x, r = _alias(gradient).float(), _alias(input).float(), _alias(inverse)
    axes, normed = [-1 - number for number in range(len(shape))], x * r
    inner = g if weight is None else g * _alias(weight).float()
    to_input = (inner - normed * (inner * normed).mean(axes, keepdim=True)) * r if wanted[0] else None
    to_weight = None
    if wanted[1] and weight is not None:
        to_weight = (g * normed).reshape(-1, *shape).sum(0).to(weight.dtype)
    return _here((None if to_input is None else to_input.to(input.dtype), to_weight))


_LIBRARY = torch.library.Library("aten", "IMPL")
_KERNELS = {
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": _rms_norm_backward,
}
