"""A module's weights in one buffer of memory, by their names in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from .checkpoint_index import CheckpointWeights


ALIGNMENT = 64
"""Bytes that tensors in a buffer begin at a multiple of, as torch's own allocations do."""


def num_bytes(module: torch.nn.Module) -> int:
    """Size of a buffer that holds a module's parameters wherever in it they have to begin."""
    return sum(_padded(parameter.nbytes) + ALIGNMENT for _, parameter in own_parameters(module))


def own_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """A module's parameters by their names in the checkpoint, without those of adapters that it has got since."""
    for name, parameter in module.named_parameters():
        if ".lora_" not in name:
            yield name_in_checkpoint(name), parameter


def name_in_checkpoint(name: str) -> str:
    # An adapter's layer holds the one that it stands for.
    return name.replace(".base_layer.", ".")


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _allocate(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def buffer_for(
    module: torch.nn.Module, device: torch.device, offsets: Mapping[str, int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One buffer for all parameters of a module, and its parts by name.

    Args:
        module: The module.
        device: Where the buffer is.
        offsets: Bytes behind a multiple of :data:`ALIGNMENT` that parameters begin at, by name.
    """
    buffer, start, views = _allocate(num_bytes(module), device), 0, {}
    for name, parameter in own_parameters(module):
        first = start + offsets.get(name, 0)
        views[name] = buffer[first : first + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        start += _padded(parameter.nbytes) + ALIGNMENT
    return buffer, views


def read_buffer(module: torch.nn.Module, weights: CheckpointWeights) -> dict[str, torch.Tensor]:
    """The weights of a module in one buffer of host memory.

    They are aligned as in a mapped file, as resident weights are: a processor's products depend on it in the last bit.
    """
    offsets = {name: weights.offset(name, p.dtype) % ALIGNMENT for name, p in own_parameters(module)}
    _, views = buffer_for(module, torch.device("cpu"), offsets)
    for name, view in views.items():
        weights.read(name, view)
    return views
