"""Memory-efficient personalisation of diffusion transformers: DiT-BlockSkip (CVPR 2026) as diffusers hooks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Names only: families announce which transformers they know, and load when one of them is met.
from . import families as _families  # noqa: F401
from .version import __version__


if TYPE_CHECKING:
    from .blocks import Block, BlockSpans, list_blocks
    from .config import BlockSkipConfig, PatchSamplingConfig
    from .embedded import embedded_model, embedded_photos, embedded_pipeline, embedded_subjects
    from .hooks import apply_block_skip, remove_block_skip
    from .loading.quantization import QuantizationConfig
    from .lora import lora_targets
    from .patch_sampling import patch_size_for
    from .state import BlockSkipState, CaptureDone, SkipMode, SpanResiduals
    from .transformer import DiTBlockSkipTransformer
    from .utils.errors import UserError

# Read when a name is first used: importing the package alone loads neither torch nor diffusers.
_MODULES = {
    "Block": "blocks",
    "BlockSkipConfig": "config",
    "BlockSkipState": "state",
    "BlockSpans": "blocks",
    "CaptureDone": "state",
    "DiTBlockSkipTransformer": "transformer",
    "PatchSamplingConfig": "config",
    "QuantizationConfig": "loading.quantization",
    "SkipMode": "state",
    "SpanResiduals": "state",
    "UserError": "utils.errors",
    "apply_block_skip": "hooks",
    "embedded_model": "embedded",
    "embedded_photos": "embedded",
    "embedded_pipeline": "embedded",
    "embedded_subjects": "embedded",
    "list_blocks": "blocks",
    "lora_targets": "lora",
    "patch_size_for": "patch_sampling",
    "remove_block_skip": "hooks",
}

__all__ = [
    "Block",
    "BlockSkipConfig",
    "BlockSkipState",
    "BlockSpans",
    "CaptureDone",
    "DiTBlockSkipTransformer",
    "PatchSamplingConfig",
    "QuantizationConfig",
    "SkipMode",
    "SpanResiduals",
    "UserError",
    "__version__",
    "apply_block_skip",
    "embedded_model",
    "embedded_photos",
    "embedded_pipeline",
    "embedded_subjects",
    "list_blocks",
    "lora_targets",
    "patch_size_for",
    "remove_block_skip",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
