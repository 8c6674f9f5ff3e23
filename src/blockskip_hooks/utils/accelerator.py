"""An accelerator of this package: its precision, the dtype of frozen weights, and no weights that it divides."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, patch_environment

from .errors import UserError
from .launcher import FSDP_SWITCH, check_launcher, use_all_cores


PATIENCE = timedelta(days=1)
"""How long processes wait for one that works alone: it merges, writes and uploads at the speed of a disk and a
network, which no plan knows, and backends give up after ten to thirty minutes. A process that died is noticed without
it: gloo's connection breaks, and launchers end the others."""
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Number formats by the names that flags have for them."""


def start_accelerator(mixed_precision: str | None, *, plan_only: bool = False, **settings: Any) -> Accelerator:
    """Make the accelerator of a process.

    Args:
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"``; ``None`` for that of accelerate's config.
        plan_only: Whether nothing is computed on this machine.
        **settings: Further arguments of ``Accelerator``.

    Raises:
        UserError: if this machine cannot compute in that precision, or accelerate's config asks for what no run does.
    """
    check_launcher(mixed_precision)
    try:
        # As if no weights were divided: what it prepares is the LoRA alone.
        with patch_environment(**{FSDP_SWITCH: "false"}):
            handlers = [InitProcessGroupKwargs(timeout=PATIENCE)]
            accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers, **settings)
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision} cannot be used here: {error}") from error
    # accelerate itself would go on without autocast. A plan is for another machine.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and not plan_only:
        raise UserError("--mixed_precision fp16 needs a GPU, and there is none here; give bf16 or no.")
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        use_all_cores()
    return accelerator


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """Dtype of frozen weights under the accelerator's mixed precision."""
    return PRECISIONS.get(accelerator.mixed_precision, torch.float32)
