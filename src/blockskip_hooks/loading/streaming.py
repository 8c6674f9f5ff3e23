"""Modules without weights of their own: each reads them when it runs, and lets go of them afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device

from .checkpoint_index import CheckpointWeights


class StreamHook(AlignDevicesHook):
    """accelerate's offloading, without its collection of garbage after each tensor: a block has dozens of them.

    ``.to(device, dtype)`` of a model around the module is followed.
    """

    execution_device: torch.device

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        module = super().init_hook(module)
        module._apply = functools.partial(self._convert, module)  # type: ignore[method-assign]
        return module

    def detach_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        del module._apply
        return super().detach_hook(module)

    def _convert(self, module: torch.nn.Module, convert: Callable[..., Any], recurse: bool = True) -> torch.nn.Module:
        """In place of ``torch.nn.Module._apply``, which cannot move what is not there: weights come as asked for."""
        for parameter in module.parameters():
            like = convert(torch.empty(0, dtype=parameter.dtype, device=self.execution_device))
            parameter.data = parameter.data.to(like.dtype)
            if not like.is_meta:
                self.execution_device = like.device
        for part in module.modules():
            part._buffers.update({n: b if b is None else convert(b) for n, b in part._buffers.items()})
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for name, _ in module.named_parameters():
            set_module_tensor_to_device(
                module, name, self.execution_device, value=self.weights_map[name], clear_cache=False
            )
        if isinstance(self.weights_map, CheckpointWeights):
            self.weights_map.close()
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        for name, _ in module.named_parameters():
            set_module_tensor_to_device(module, name, "meta", clear_cache=False)
        return output


def stream(
    module: torch.nn.Module, device: torch.device | str, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Let a module hold its weights only while it runs.

    Args:
        module: A block, or a layer.
        device: Where it runs.
        weights: Its tensors by name, read at every forward; by default a host copy of what the module holds now.
    """
    hook = StreamHook(execution_device=plain_device(device), offload=True, weights_map=weights, place_submodules=True)
    add_hook_to_module(module, hook)


@contextmanager
def frozen_weights_on_host(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the frozen weights of ``model`` that are resident are in host memory; nothing may run."""
    parameters = dict(model.named_parameters())
    devices = {name: p.device for name, p in parameters.items() if not p.requires_grad and not p.is_meta}
    for name in devices:
        parameters[name].data = parameters[name].data.to("cpu")
    try:
        yield
    finally:
        for name, device in devices.items():
            parameters[name].data = parameters[name].data.to(device)


def plain_device(device: torch.device | str) -> torch.device:
    """``device``, without the number that processes on the CPU are given: ``.to("cpu:0")`` would copy parameters."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "cpu" else device
