"""What a run ran on: device, system, and builds of libraries. Whoever compares runs of others needs to know."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch

from ..version import __version__


SYSTEM = ("system", "release", "version", "machine", "processor")
"""What ``platform`` is asked for; the machine's name is not part of it."""

LIBRARIES = ("torch", "diffusers", "peft", "transformers", "datasets")


def is_first_process() -> bool:
    """Whether a launcher started this process as the first, or started none besides."""
    return os.environ.get("RANK", "0") == "0"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The ``machine`` part of ``run_report.json``.

    Args:
        device: Where the model trained.
    """
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return {
        "device": device.type,
        # A processor has no name there.
        "device_name": name(device) if name else None,
        "cuda": torch.version.cuda,
        "system": {part: getattr(platform, part)() for part in SYSTEM},
        "pytorch": torch.__config__.show(),
        "datasets": version_of("datasets"),
        "sources": {library: library_source(library) for library in LIBRARIES},
    }


def cache_bytes(wanted: str | int, device: torch.device) -> int:
    """Host memory that a process may keep weights in which it would read again.

    Args:
        wanted: Bytes, ``"none"``, or ``"auto"``: half of what is free, shared by the machine's processes; nothing
            where the device's memory is the host's and the system keeps files in what is free of it.
        device: Where the model runs.
    """
    if wanted == "auto":
        if device.type in ("cpu", "mps"):
            return 0
        return psutil.virtual_memory().available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if wanted == "none" else int(wanted)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries whose change can change a result; None for one not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: version_of(name) for name in ("torch", "diffusers", "peft", "accelerate", "transformers")}
    # A source tree on PYTHONPATH has no metadata, and an editable install may carry that of an older version.
    found["blockskip_hooks"] = __version__
    return found


def library_source(library: str) -> dict[str, str | None] | None:
    """Commit and branch that a library was installed from by a version control system, or ``None`` for a release.

    It is what the installer noted beside the library.
    """
    try:
        noted = metadata.distribution(library).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    source = json.loads(noted).get("vcs_info") if noted else None
    return source and {"commit": source.get("commit_id"), "branch": source.get("requested_revision")}


def version_of(library: str) -> str | None:
    """Version of an installed library; ``None`` for one that is not."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
