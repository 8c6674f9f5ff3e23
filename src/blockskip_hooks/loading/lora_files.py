"""Files of LoRA weights as diffusers' pipelines read and write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError

from ..utils.errors import UserError
from ..utils.files import replacing


if TYPE_CHECKING:
    from ..families import Family


WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def save_lora(
    folder: Path,
    family: type[Family],
    transformer: torch.nn.Module,
    text_encoders: Mapping[str, torch.nn.Module] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``pytorch_lora_weights.safetensors`` as the stock pipeline reads it, with the LoRA metadata.

    Only the adapters are read; the base weights are neither copied nor cast.

    Args:
        folder: Where to; made if absent.
        family: Whose pipeline class writes the file.
        transformer: The diffusers transformer with the adapter (not the wrapper: keys are the full model's).
        text_encoders: The trained text encoders by pipeline component, if any.
        dtype: Cast the LoRA to this dtype; ``None`` keeps float32.
    """
    modules = {"transformer": transformer, **(text_encoders or {})}
    layers = {}
    for name, module in modules.items():
        state = get_peft_model_state_dict(module)
        layers[f"{name}_lora_layers"] = {
            key: value.detach().to("cpu", dtype or value.dtype).contiguous() for key, value in state.items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for part in layers.values() for tensor in part.values())
    with replacing(folder / WEIGHTS_NAME, needed) as temporary:
        family.pipeline_class.save_lora_weights(
            str(folder), **layers, weight_name=temporary.name, **_collate_lora_metadata(modules)
        )


def copy_lora(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give the adapter of a model the values of another model's, whose layers must be the same."""
    set_peft_model_state_dict(target, get_peft_model_state_dict(source), adapter_name="default")


def load_lora(
    folder: Path,
    family: type[Family],
    transformer: torch.nn.Module,
    text_encoders: Mapping[str, torch.nn.Module] | None = None,
) -> None:
    """Read weights that :func:`save_lora` wrote into adapters that are in place.

    Raises:
        UserError: if the file belongs to other layers.
    """
    try:
        state = family.pipeline_class.lora_state_dict(str(folder), weight_name=WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume_from_checkpoint {folder}: {WEIGHTS_NAME} cannot be read; name another.") from error
    for prefix, module in {"transformer": transformer, **(text_encoders or {})}.items():
        part = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
        part = convert_unet_state_dict_to_peft(part)
        expected = get_peft_model_state_dict(module)
        if part.keys() != expected.keys() or any(part[k].shape != v.shape for k, v in expected.items()):
            raise UserError(
                f"--resume_from_checkpoint {folder} was made with other LoRA layers or another rank than this run; "
                "use the settings it was made with, or start anew in another --output_dir."
            )
        set_peft_model_state_dict(module, part, adapter_name="default")
