"""Norms that autocast leaves alone."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)


def keep_norm_dtypes(model: torch.nn.Module) -> None:
    """Let the norms of a model return what they are given under autocast, as in inference and as on CPUs.

    A GPU's autocast casts the input of every norm to float32, keeps that copy for backward and hands float32 on. The
    kernels compute the statistics of half precision in float32 anyhow.
    """
    for module in model.modules():
        if isinstance(module, NORMS) and "forward" not in vars(module):
            module.forward = MethodType(_in_own_dtype, module)  # type: ignore[method-assign]


def free_norm_dtypes(model: torch.nn.Module) -> None:
    """Undo :func:`keep_norm_dtypes`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _in_own_dtype:
            del module.forward


def _in_own_dtype(module: torch.nn.Module, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    weight: Any = module.weight
    # The kernels want input and weight of one dtype.
    casts = weight is not None and weight.dtype != input.dtype and torch.is_autocast_enabled(input.device.type)
    with torch.autocast(input.device.type, enabled=casts):
        return type(module).forward(module, input, *args, **kwargs)
