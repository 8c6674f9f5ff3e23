"""Kept blocks compiled by torch: the regional compilation of diffusers, without the blocks that are skipped."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from ..state import BlockSkipState, SkipMode
from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import UserError


VARIANTS = 8
"""Graphs of one block: for batches of other sizes, and for a leftover batch."""


def check_compiler(device: torch.device) -> None:
    """Check that torch can compile for a device.

    Raises:
        UserError: naming what is missing.
    """
    if device.type in ("cuda", "xpu"):
        missing = None if importlib.util.find_spec("triton") else "the package triton, which comes with torch for GPUs"
    else:
        compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
        missing = None if any(name and shutil.which(name) for name in compilers) else "a C++ compiler"
    if missing:
        raise UserError(f"--compile needs {missing} here ({device.type}); install it, or leave the flag out.")


def compile_kept_blocks(model: DiTBlockSkipTransformer, **options: Any) -> int:
    """Compile every kept block in place for training; records stay inputs, so no step compiles anything again.

    Blocks of one class share their graphs, as with diffusers' ``compile_repeated_blocks``. A block with recorded
    layers has hooks of its own inside and is compiled by itself, which takes as much longer as there are blocks.
    Forwards of the whole model, which stream weights into some of these layers, run as without this.

    Args:
        model: The transformer, LoRA added. Names of its parameters stay.
        **options: For ``torch.compile``.

    Returns:
        Number of the blocks.
    """
    import torch._dynamo as dynamo

    kept = model.spans.kept
    # Counted for all blocks of a class together; beyond it blocks would run as they are, without a word.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VARIANTS * len(kept))
    for block in kept:
        forward = block.module.forward
        compiled = torch.compile(forward, **options)
        block.module.forward = functools.wraps(forward)(functools.partial(_run, model.skip_state, compiled, forward))
    return len(kept)


def _run(
    state: BlockSkipState, compiled: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return (compiled if state.mode is SkipMode.INJECT else forward)(*args, **kwargs)
