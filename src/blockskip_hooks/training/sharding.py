"""Frozen weights of kept blocks divided among processes by torch's FSDP2; the LoRA stays whole in each of them.

Nearly all of a model's memory is frozen weights. Each process holds its part of them and gathers a block when it runs.
The LoRA and its optimiser are small and learn as in any run of several processes, so checkpoints, resuming and the
exported file are the same with and without.
"""

from __future__ import annotations

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import disable_fsdp_ram_efficient_loading
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..transformer import DiTBlockSkipTransformer
from ..utils.launcher import FSDP_SWITCH, is_set


def asks_for_sharding() -> bool:
    """Whether accelerate's config asks for FSDP and there is more than one process."""
    if not is_set(FSDP_SWITCH):
        return False
    # It has transformers load text encoders in parts only, for accelerate to send the rest, and nothing does.
    disable_fsdp_ram_efficient_loading()
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def shard(module: torch.nn.Module, device: torch.device | str) -> None:
    """Divide the weights of ``module`` that are there among the processes, but for those of parts divided before.

    Args:
        module: Loaded on ``device``; streamed parts of it hold no weights and are left alone.
        device: Where it runs. All processes of the run must call this with the same module.
    """
    # Models that split their last block's output, as FLUX does, would be warned of in every process; nothing here or
    # in them writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    absent = {parameter for parameter in module.parameters() if parameter.is_meta}
    fully_shard(module, mesh=mesh, ignored_params=absent)


def prepare_model(accelerator: Accelerator, model: DiTBlockSkipTransformer) -> torch.nn.Module:
    """What ``accelerator.prepare`` makes of a model whose LoRA trains and whose other weights stay where they are.

    Every process has the frozen weights already, and they cannot all be sent: those of skipped blocks are not there,
    quantised ones and parts of divided ones are no plain tensors.

    Args:
        accelerator: Gives autocast, and DDP where there are several processes.
        model: With its kept blocks in place.
    """
    if not model.is_sharded:
        return accelerator.prepare(model, device_placement=[False])
    # accelerate lets no model with any divided weight train by DDP, also where DDP is told to leave those alone.
    under_autocast = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    device_ids = None if accelerator.device.type == "cpu" else [accelerator.local_process_index]
    return DistributedDataParallel(under_autocast, device_ids=device_ids)
