"""Flags of the model and of the machine that it runs on."""

from __future__ import annotations

import argparse

from ...loading.quantization import METHODS
from ...utils.files import expand_home


def add_source_flags(parser: argparse._ActionsContainer) -> None:
    """Where the model comes from, in training and in other scripts."""
    flag = parser.add_argument
    flag(
        "--pretrained_model_name_or_path",
        type=expand_home,
        help="Hub id or folder of a pipeline; default: the embedded model.",
    )
    flag("--revision", help="Branch, tag or commit of the model on the hub; default: main.")
    flag("--variant", help="Weight file variant, fp16 say; default: files without one.")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add_source_flags(group)
    flag = group.add_argument
    flag(
        "--cache_dir",
        type=expand_home,
        help="Where downloaded models and datasets are kept; default: the hub's cache.",
    )
    flag("--max_sequence_length", type=int, default=512, help="Tokens of a prompt that the long text encoder sees.")
    flag(
        "--bnb_quantization_config_path",
        type=expand_home,
        help="JSON file that says how bitsandbytes holds kept blocks' weights; default: as --quantization says.",
    )
    flag("--quantization", choices=METHODS, default="none", help="Hold kept blocks in 4 (nf4) or 8 bits (int8).")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("machine").add_argument
    flag("--mixed_precision", choices=("no", "fp16", "bf16"), help="Number format; default: accelerate's setting.")
    flag("--do_fp8_training", action="store_true", help="Not supported: training in float8.")
    flag("--offload", action="store_true", help="Keep models that are not in use off the device; always so here.")
    flag("--enable_vae_tiling", action="store_true", help="Let the VAE work tile by tile: less memory for it.")
    flag("--compile", action="store_true", help="Compile kept blocks: faster steps after slow first ones.")
    flag("--allow_tf32", action="store_true", help="Let NVIDIA cards multiply matrices in TF32.")
    flag("--enable_npu_flash_attention", action="store_true", help="Flash attention on Ascend NPUs.")
    flag("--local_rank", type=int, default=-1, help="Process number on this machine; LOCAL_RANK takes precedence.")
