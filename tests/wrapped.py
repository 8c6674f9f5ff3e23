"""A tiny transformer in the wrapper, for tests of what can be done with it."""

from __future__ import annotations

from pathlib import Path

import torch

from blockskip_hooks import BlockSkipConfig
from tests.tiny import TINY_FAMILIES


TINY = TINY_FAMILIES[0]
CONFIG = BlockSkipConfig(leading=1, trailing=1)
RECORDED = "transformer_blocks.1.norm1.linear"


def save_transformer(folder: Path) -> Path:
    """Write the tiny transformer as a checkpoint, and return its pipeline's folder."""
    TINY.make_transformer().save_pretrained(folder / "transformer")
    return folder


def predict(model: torch.nn.Module, inputs: dict | None = None, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or TINY.make_inputs(2)), **kwargs, return_dict=False)[0]


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}
