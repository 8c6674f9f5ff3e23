"""Memory of the accelerator that this process computes on, of whatever kind: CUDA, ROCm, XPU, MPS."""

from __future__ import annotations

import psutil
import torch


def in_use() -> bool:
    """Whether this process uses an accelerator."""
    # Being available is not enough: a CPU run leaves a GPU untouched, and reading its statistics would create a
    # context of several hundred MiB.
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and getattr(torch.get_device_module(device), "is_initialized", lambda: True)()


def device_memory() -> tuple[int, int] | None:
    """Bytes on the device that tensors take, and that torch holds for them, now; ``None`` without a device."""
    return (torch.accelerator.memory_allocated(), torch.accelerator.memory_reserved()) if in_use() else None


def device_peak() -> tuple[int, int] | None:
    """The most of both since :func:`reset_device_peak`."""
    return (torch.accelerator.max_memory_allocated(), torch.accelerator.max_memory_reserved()) if in_use() else None


def reset_device_peak() -> None:
    """Let peaks be those from now on."""
    if in_use():
        torch.accelerator.reset_peak_memory_stats()


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that are free on a device, or in the host's memory for the CPU."""
    return psutil.virtual_memory().available if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]


def total_memory_bytes() -> int | None:
    """Bytes that the accelerator has in all, or ``None`` if there is none."""
    return torch.accelerator.get_memory_info()[1] if torch.accelerator.is_available() else None
