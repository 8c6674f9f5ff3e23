"""The LoRA as ComfyUI reads it, made from the file that diffusers reads.

ComfyUI matches a LoRA's keys with a list of names per architecture (``comfy/lora.py``) and knows nothing of the
metadata in diffusers' file, in which alpha is: unless alpha equals the rank, that file has another strength there. The
file made here has the scale in its tensors, under names that both programs read: diffusers' own names of the layers,
behind the prefix that each family of :attr:`~blockskip_hooks.families.Family.comfyui` states, ``lora_A`` and
``lora_B`` for the matrices. The names that fuse query, key and value (``lora_unet_..._qkv``) are not used: diffusers'
converters give the three parts back with one another's rank, or not at all where only some of them have LoRA.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open

from ..families import ComfyUIFormat, Family
from ..loading.lora_files import WEIGHTS_NAME
from ..utils.errors import UserError
from ..utils.files import save_tensors


# Not an ending of diffusers' name: its loaders would take this file for theirs.
COMFYUI_NAME = "comfyui_lora_weights.safetensors"


def check_comfyui(family: type[Family], *, trains_text: bool) -> ComfyUIFormat:
    """The family's format.

    Raises:
        UserError: if there is none that diffusers reads back, or none for trained text encoders.
    """
    if family.comfyui is None:
        raise UserError(
            f"--save_format comfyui is not available for {family.name}: no names of its layers are read by both "
            "ComfyUI and diffusers; leave the flag out."
        )
    if trains_text:
        raise UserError(
            "--save_format comfyui is for the transformer's LoRA alone; leave it or --train_text_encoder out."
        )
    return family.comfyui


def write_comfyui(folder: Path, family: type[Family]) -> None:
    """Write ``comfyui_lora_weights.safetensors`` beside ``pytorch_lora_weights.safetensors``.

    Args:
        folder: The folder of the latter, as :func:`~blockskip_hooks.loading.lora_files.save_lora` wrote it.
        family: The model's family.

    Raises:
        UserError: if the family has no such format.
    """
    form = check_comfyui(family, trains_text=False)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(str(folder / WEIGHTS_NAME), framework="pt") as file:
        settings = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
        rank, alpha = settings["transformer.r"], settings["transformer.lora_alpha"]
        for name in file.keys():  # noqa: SIM118
            tensor, renamed = file.get_tensor(name), f"{form.prefix}{name.removeprefix('transformer.')}"
            if renamed.endswith(".lora_B.weight"):
                if form.writes_alpha:
                    tensors[f"{renamed.removesuffix('.lora_B.weight')}.alpha"] = torch.tensor(float(alpha))
                else:
                    tensor = (tensor.float() * (alpha / rank)).to(tensor.dtype)
            tensors[renamed] = tensor
    save_tensors(tensors, folder / COMFYUI_NAME, metadata={"format": "pt"})
