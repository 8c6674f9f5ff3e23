"""Flags of the settings, the model and the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...loading.quantization import METHODS
from ...utils.files import expand_home
from .types import flag


@dataclass(frozen=True, kw_only=True)
class SettingsFlags:
    """Where the settings themselves come from."""

    title: ClassVar[str] = "settings"
    config: str | None = flag(
        None,
        "YAML file with flags as keys, or a recipe: configs/NAME. What is typed wins. Default: none.",
        type=expand_home,
    )
    dump_config: bool = flag(False, "Print all settings as such a file, and stop.")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model, and how its weights are read."""

    title: ClassVar[str] = "model"
    pretrained_model_name_or_path: str | None = flag(
        None, "Hub id or folder of a pipeline; default: the embedded model.", type=expand_home
    )
    revision: str | None = flag(None, "Branch, tag or commit of the model on the hub; default: main.")
    variant: str | None = flag(None, "Weight file variant, fp16 say; default: files without one.")
    cache_dir: str | None = flag(
        None, "Where downloaded models and datasets are kept; default: the hub's cache.", type=expand_home
    )
    max_sequence_length: int = flag(512, "Tokens of a prompt that the long text encoder sees.")
    bnb_quantization_config_path: str | None = flag(
        None,
        "JSON file that says how bitsandbytes holds kept blocks' weights; default: as --quantization says.",
        type=expand_home,
    )
    quantization: str = flag("none", "Hold kept blocks in 4 (nf4) or 8 bits (int8).", choices=METHODS)


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """The machine that a run is on."""

    title: ClassVar[str] = "machine"
    mixed_precision: str | None = flag(
        None, "Number format; default: accelerate's setting.", choices=("no", "fp16", "bf16")
    )
    do_fp8_training: bool = flag(False, "Not supported: training in float8.")
    offload: bool = flag(False, "Keep models that are not in use off the device; always so here.")
    enable_vae_tiling: bool = flag(False, "Let the VAE work tile by tile: less memory for it.")
    compile: bool = flag(False, "Compile kept blocks: faster steps after slow first ones.")
    allow_tf32: bool = flag(False, "Let NVIDIA cards multiply matrices in TF32.")
    enable_npu_flash_attention: bool = flag(False, "Flash attention on Ascend NPUs.")
    local_rank: int = flag(-1, "Process number on this machine; LOCAL_RANK takes precedence.")
