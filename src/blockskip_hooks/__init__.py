"""Memory-efficient personalisation of diffusion transformers: DiT-BlockSkip (CVPR 2026) as diffusers hooks."""

from .config import BlockSkipConfig, PatchSamplingConfig
from .hooks import SkipMode, SpanResiduals, apply_block_skip, remove_block_skip
from .transformer import DiTBlockSkipTransformer
from .version import __version__


__all__ = [
    "BlockSkipConfig",
    "DiTBlockSkipTransformer",
    "PatchSamplingConfig",
    "SkipMode",
    "SpanResiduals",
    "__version__",
    "apply_block_skip",
    "remove_block_skip",
]
