"""Modules whose tensors are fake: with memory, without memory while they do not run, or quantised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..loading.quantization import QuantizationConfig, as_autocast, as_linear, on_channels


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class QuantizedLinear(torch.nn.Linear):
    """A layer with the bytes of a quantised weight, dequantised for each product, in forward and in backward."""

    def __init__(self, layer: torch.nn.Linear, config: QuantizationConfig) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.product_dtype = config.compute_dtype or layer.weight.dtype
        self.scales_products = config.library == "torchao"
        count = config.weight_bytes(layer.out_features, layer.in_features)
        self.weight = torch.nn.Parameter(torch.empty(count, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input, shape = as_autocast(input), (self.out_features, self.in_features)
        dtype = input.dtype if self.scales_products else self.product_dtype
        return _DequantizedProduct.apply(input, self.bias, shape, dtype, self.scales_products).to(input.dtype)


def quantize_layers(model: torch.nn.Module, names: Sequence[str], config: QuantizationConfig) -> None:
    """Put quantised layers in place of linear ones and convolutions of one pixel."""
    for name in names:
        layer: Any = model.get_submodule(name)
        linear = layer if isinstance(layer, torch.nn.Linear) else as_linear(layer)
        held = QuantizedLinear(linear, config)
        model.set_submodule(name, held if layer is linear else on_channels(held))


class _DequantizedProduct(torch.autograd.Function):
    """A product with a copy of the weight in the dtype of the product.

    torchao casts the 8-bit numbers alone and multiplies the scales with the product, in backward with the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        scales_products: bool,
    ) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.input_dtype, ctx.scales_products = shape, dtype, input.dtype, scales_products
        bias = None if bias is None else bias.to(dtype)
        product = torch.nn.functional.linear(input.to(dtype), torch.empty(shape, dtype=dtype), bias)
        return torch.empty_like(product) if scales_products else product

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        gradient = torch.empty_like(gradient) if ctx.scales_products else gradient
        product = gradient.to(ctx.dtype) @ torch.empty(ctx.shape, dtype=ctx.dtype)
        return product.to(ctx.input_dtype), None, None, None, None


class ValuesAsPlanned(TorchDispatchMode):
    """Answers questions about values, which fake tensors do not have.

    Single numbers that are read are lengths of prompts, all the same. Tensors that are compared are tokens that are
    looked for, and found.
    """

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.value
        if func is torch.ops.aten.equal.default:
            return True
        return func(*args, **(kwargs or {}))


def materialise(module: torch.nn.Module) -> list[tuple[Any, Any, torch.Tensor]]:
    """Give a module's own tensors memory, constants in plain attributes included; returns what undoes it."""
    replaced: list[tuple[Any, Any, torch.Tensor]] = []
    holders: list[tuple[Any, Any]] = [(module._parameters, list(module._parameters))]
    holders += [(module._buffers, list(module._buffers)), (module.__dict__, list(module.__dict__))]
    holders += [(value, range(len(value))) for value in module.__dict__.values() if isinstance(value, list)]
    for holder, keys in holders:
        for key in keys:
            tensor = holder[key]
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
                continue
            value: torch.Tensor = torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
            replaced.append((holder, key, tensor))
            holder[key] = value
    return replaced


@contextlib.contextmanager
def streamed_weights(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within this context a module's weights take memory while it runs, as when they are read from the checkpoint."""
    loaded: list[tuple[Any, Any, torch.Tensor]] = []

    def load(module: torch.nn.Module, args: Any) -> None:
        for part in module.modules():
            loaded.extend(materialise(part))

    def unload(*_: Any) -> None:
        for holder, name, tensor in loaded:
            holder[name] = tensor
        loaded.clear()

    handles = [module.register_forward_pre_hook(load) for module in modules]
    handles += [module.register_forward_hook(unload) for module in modules]
    try:
        yield
    finally:
        # A capture forward leaves its last block by an exception, which skips the forward hook.
        unload()
        for handle in handles:
            handle.remove()
