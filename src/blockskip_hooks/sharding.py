"""Frozen weights of kept blocks divided among processes by torch's FSDP2; the LoRA stays whole in each of them.

Nearly all of a model's memory is frozen weights. Each process holds its part of them and gathers a block when it runs.
The LoRA and its optimiser are small and learn as in any run of several processes, so checkpoints, resuming and the
exported file are the same with and without.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, disable_fsdp_ram_efficient_loading
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard


SWITCH = "ACCELERATE_USE_FSDP"
"""What accelerate's launcher sets for a config with ``distributed_type: FSDP``."""


@dataclass(frozen=True)
class Sharding:
    """How frozen weights are divided.

    Attributes:
        reshard_after_forward: Give gathered weights up between forward and backward, and gather them again.
        offload: Keep this process's part in host memory.
    """

    reshard_after_forward: bool = True
    offload: bool = False

    def shard(self, module: torch.nn.Module, device: torch.device | str) -> None:
        """Divide the weights of ``module`` that are there, but for those of parts that were divided before.

        Args:
            module: Loaded on ``device``; streamed parts of it hold no weights and are left alone.
            device: Where it runs. All processes of the run must call this with the same module.
        """
        # Models that split their last block's output, as FLUX does, would be warned of in every process; nothing here
        # or in them writes into it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
        absent = {parameter for parameter in module.parameters() if parameter.is_meta}
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=self.reshard_after_forward,
            offload_policy=CPUOffloadPolicy() if self.offload else OffloadPolicy(),
            ignored_params=absent,
        )

    def bytes_elsewhere(self, block_bytes: Sequence[int], num_processes: int) -> int:
        """What the other processes hold of frozen weights at a process's peak.

        Args:
            block_bytes: Of each kept block's resident weights. One block runs and the next is gathered meanwhile; what
                is outside of blocks stays gathered and counts as whole.
            num_processes: Processes that share them.
        """
        if not self.reshard_after_forward:
            return 0
        whole = sum(block_bytes)
        at_peak = whole // num_processes + sum(sorted(block_bytes)[-2:])
        return max(whole - at_peak, 0)


def read_sharding() -> Sharding | None:
    """What accelerate's config asks for.

    Returns:
        ``None`` if it does not ask for FSDP, or if there is one process only.

    Raises:
        ValueError: if it asks for what is not supported.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "accelerate's config asks for DeepSpeed, which is not supported; use configs/fsdp2.yaml, which divides "
            "frozen weights among processes, or configs/multi_gpu.yaml."
        )
    if not _is_set(SWITCH):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"accelerate's config asks for FSDP in version {version}; set fsdp_version: 2 in it.")
    # It has transformers leave parts of text encoders empty in all but the first process, for accelerate to send.
    disable_fsdp_ram_efficient_loading()
    plugin = FullyShardedDataParallelPlugin()
    if plugin.activation_checkpointing:
        raise ValueError(
            "accelerate's config has fsdp_activation_checkpointing; take it out and give --gradient_checkpointing."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return Sharding(
        reshard_after_forward=bool(plugin.reshard_after_forward),
        offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    )


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Within this context an accelerator is made as if nothing were sharded: what it prepares is the LoRA alone."""
    asked = os.environ.pop(SWITCH, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[SWITCH] = asked


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
