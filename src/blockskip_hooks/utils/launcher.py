"""What accelerate's config asks of a run: every entry that its launcher passes on, honoured or refused by name.

``accelerate launch`` turns the entries of its config into environment variables. Those that accelerate itself acts on
are honoured; an entry that a run here cannot follow would be dropped without a word, so it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import psutil
import torch

from .errors import UserError


FSDP_SWITCH = "ACCELERATE_USE_FSDP"
"""What the launcher sets for a config with ``distributed_type: FSDP``."""
_FALSE = ("false", "0", "no", "")
_NO_DIVIDING = "frozen weights are divided by fsdp_config, and nothing else; use configs/fsdp2.yaml or multi_gpu.yaml"
_BY_BLOCK = "every block is divided by itself; take it out"


class Entry(NamedTuple):
    """An entry of accelerate's config.

    Attributes:
        name: What the config calls it.
        honoured: The values that a run follows, in lower case; ``None`` for every value, or where it cannot matter.
        instead: What to do about any other value.
        switch: The variable without which the entry means nothing.
        default: Its value where the launcher passes none.
    """

    name: str
    honoured: tuple[str, ...] | None = None
    instead: str = ""
    switch: str | None = None
    default: str | None = None


ENTRIES: Mapping[str, Entry] = {
    # accelerate, torch or the system act on these.
    "ACCELERATE_USE_CPU": Entry("use_cpu"),
    "ACCELERATE_DEBUG_MODE": Entry("debug"),
    "ACCELERATE_CPU_AFFINITY": Entry("enable_cpu_affinity"),
    "ACCELERATE_DYNAMO_BACKEND": Entry("dynamo_backend"),
    "ACCELERATE_DYNAMO_MODE": Entry("dynamo_mode"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": Entry("dynamo_use_fullgraph"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": Entry("dynamo_use_dynamic"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": Entry("dynamo_use_regional_compilation"),
    "OMP_NUM_THREADS": Entry("num_cpu_threads_per_process"),
    "CUDA_VISIBLE_DEVICES": Entry("gpu_ids"),
    "MASTER_ADDR": Entry("main_process_ip"),
    "MASTER_PORT": Entry("main_process_port"),
    "KMP_AFFINITY": Entry("use_cpu"),
    "KMP_BLOCKTIME": Entry("use_cpu"),
    # Number formats. A typed --mixed_precision takes the place of the first.
    "ACCELERATE_MIXED_PRECISION": Entry(
        "mixed_precision", ("no", "fp16", "bf16"), "training in it is not supported; give --mixed_precision bf16"
    ),
    "XLA_USE_BF16": Entry("distributed_type: XLA, mixed_precision", _FALSE, "TPUs are not supported"),
    "XLA_DOWNCAST_BF16": Entry("distributed_type: XLA, downcast_bf16", _FALSE, "TPUs are not supported"),
    "ACCELERATE_DOWNCAST_BF16": Entry("downcast_bf16", _FALSE, "TPUs are not supported"),
    "ACCELERATE_IN_TPU_POD": Entry("tpu_use_cluster", _FALSE, "TPUs are not supported"),
    # Flags of the script.
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Entry(
        "gradient_accumulation_steps", ("1",), "take it out and give --gradient_accumulation_steps"
    ),
    "ACCELERATE_GRADIENT_CLIPPING": Entry("gradient_clipping", (), "take it out and give --max_grad_norm"),
    # Other ways to divide a model, or to rent machines.
    "ACCELERATE_USE_DEEPSPEED": Entry("distributed_type: DEEPSPEED", _FALSE, _NO_DIVIDING),
    "ACCELERATE_USE_MEGATRON_LM": Entry("distributed_type: MEGATRON_LM", _FALSE, _NO_DIVIDING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Entry("parallelism_config", _FALSE, _NO_DIVIDING),
    "ACCELERATE_USE_SAGEMAKER": Entry("compute_environment: AMAZON_SAGEMAKER"),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": Entry(
        "distributed_type", ("no",), "on SageMaker one process trains; set distributed_type: NO"
    ),
    # FSDP, of which version 2 divides the frozen weights of kept blocks.
    FSDP_SWITCH: Entry("distributed_type: FSDP"),
    "FSDP_VERSION": Entry("fsdp_version", ("2",), "set fsdp_version: 2", FSDP_SWITCH, "1"),
    "FSDP_RESHARD_AFTER_FORWARD": Entry(
        "fsdp_reshard_after_forward",
        ("true", "full_shard"),
        "it needs more memory than whole weights; set it to true, or use configs/multi_gpu.yaml",
        FSDP_SWITCH,
    ),
    "FSDP_OFFLOAD_PARAMS": Entry(
        "fsdp_offload_params", _FALSE, "take it out and skip more blocks: those leave the device", FSDP_SWITCH
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": Entry(
        "fsdp_activation_checkpointing", _FALSE, "take it out and give --gradient_checkpointing", FSDP_SWITCH
    ),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": Entry(
        "fsdp_activation_checkpointing_offload", _FALSE, "take it out; activations stay on the device", FSDP_SWITCH
    ),
    "FSDP_AUTO_WRAP_POLICY": Entry("fsdp_auto_wrap_policy", ("transformer_based_wrap",), _BY_BLOCK, FSDP_SWITCH),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": Entry("fsdp_transformer_layer_cls_to_wrap", (), _BY_BLOCK, FSDP_SWITCH),
    "FSDP_MIN_NUM_PARAMS": Entry("fsdp_min_num_params", ("100000000",), _BY_BLOCK, FSDP_SWITCH),
    "FSDP_IGNORED_MODULES": Entry("fsdp_ignored_modules", (), _BY_BLOCK, FSDP_SWITCH),
    "FSDP_SHARDING_STRATEGY": Entry(
        "fsdp_sharding_strategy", ("full_shard", "1"), "it is of fsdp_version: 1; take it out", FSDP_SWITCH
    ),
    # How version 1 loads, orders and saves: version 2 has no such choice, and checkpoints hold a LoRA that is whole.
    "FSDP_BACKWARD_PREFETCH": Entry("fsdp_backward_prefetch", switch=FSDP_SWITCH),
    "FSDP_FORWARD_PREFETCH": Entry("fsdp_forward_prefetch", switch=FSDP_SWITCH),
    "FSDP_USE_ORIG_PARAMS": Entry("fsdp_use_orig_params", switch=FSDP_SWITCH),
    "FSDP_SYNC_MODULE_STATES": Entry("fsdp_sync_module_states", switch=FSDP_SWITCH),
    "FSDP_STATE_DICT_TYPE": Entry("fsdp_state_dict_type", switch=FSDP_SWITCH),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": Entry("fsdp_cpu_ram_efficient_loading", switch=FSDP_SWITCH),
}
"""Every entry by the variable that the launcher of accelerate 1.15 passes it in."""


def check_launcher(mixed_precision: str | None = None) -> None:
    """Refuse what accelerate's config asks for and a run cannot follow; it takes no time and loads nothing.

    Args:
        mixed_precision: The flag of that name, if it was typed.

    Raises:
        UserError: naming the entry, its value and what to do.
    """
    for variable, entry in ENTRIES.items():
        value = os.environ.get(variable, entry.default)
        means_nothing = value is None or (entry.switch is not None and not is_set(entry.switch))
        typed = variable == "ACCELERATE_MIXED_PRECISION" and mixed_precision is not None
        if means_nothing or typed or entry.honoured is None or str(value).lower() in entry.honoured:
            continue
        said = entry.name if ":" in entry.name else f"{entry.name}: {value}"
        raise UserError(f"accelerate's config has {said}, which no run can follow: {entry.instead}.")


def use_all_cores() -> None:
    """Let a process that is alone on a CPU compute on every core where the launcher allows it a single one.

    That is what ``accelerate launch`` does unless it is told a number; one, told, looks the same. A process that may
    run on fewer cores (by ``taskset``, say) gets those.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
        torch.set_num_threads(max(1, min(allowed or 1, psutil.cpu_count(logical=False) or 1)))


def is_set(variable: str) -> bool:
    """Whether a switch of the launcher is on."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
