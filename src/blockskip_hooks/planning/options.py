"""What ``--memory_budget`` may switch on. Without imports, so that ``--help`` is quick."""

from __future__ import annotations

from typing import Any


MEMORY_OPTIONS: dict[str, tuple[str, Any]] = {
    "checkpointing": ("gradient_checkpointing", True),
    "8bit_adam": ("use_8bit_adam", True),
    "int8": ("quantization", "int8"),
    "patches": ("patch_sampling", "dynamic"),
    "nf4": ("quantization", "nf4"),
}
"""What ``--memory_budget`` may switch on beside skipping: by name, a flag and its value. The first costs least."""

LAST_MEMORY_OPTIONS = ("nf4",)
"""These cost the result more than skipping half of the blocks does."""

QUANTIZING_OPTIONS = frozenset(name for name, (flag, _) in MEMORY_OPTIONS.items() if flag == "quantization")
