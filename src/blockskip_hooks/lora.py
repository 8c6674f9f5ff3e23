"""LoRA on the kept blocks: where it goes, how it is added, read back and exported, and whether it learns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .data.sample_plan import derived_seed
from .families import Family
from .transformer import DiTBlockSkipTransformer
from .utils.files import replacing


WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def lora_targets(
    model: DiTBlockSkipTransformer,
    layers: Sequence[str],
    text_stream_layers: Sequence[str] = (),
    blocks: Sequence[str] | None = None,
) -> list[str]:
    """Full names of the linear layers that get LoRA: those that match ``layers``, in kept blocks if any are skipped.

    With a skipped leading span nothing before the kept blocks could learn: their input is a stored tensor.

    Args:
        model: The transformer.
        layers: Names or name endings, as in ``--lora_layers``.
        text_stream_layers: Layers that only act on the text. Nothing reads the text after the last block that trains,
            be it the model's last or one before a trailing span, so there they would never learn and are left out.
        blocks: Names of the only blocks that are to train, as from ``--lora_blocks``; ``None`` for no limit.

    Raises:
        ValueError: if nothing matches outside the skipped blocks, or a name matches nothing at all.
    """
    kept = tuple(f"{block.name}." for block in model.spans.kept)
    last_kept = f"{model.spans.kept[-1].name}."
    names = [name for name, module in model.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    targets: list[str] = []
    for layer in layers:
        matches = [name for name in names if name == layer or name.endswith(f".{layer}")]
        if not matches:
            raise ValueError(f"--lora_layers '{layer}' is the name of no linear layer of this model; correct it.")
        targets += [name for name in matches if not model.spans.skipped or name.startswith(kept)]
    if not targets:
        raise ValueError(
            f"--lora_layers '{','.join(layers)}' matches no layer of a kept block; name layers that the kept "
            f"blocks ({model.spans.kept[0].name} to {model.spans.kept[-1].name}) have, or skip fewer blocks."
        )
    if blocks is not None:
        targets = [name for name in targets if name.startswith(tuple(f"{block}." for block in blocks))]
        if not targets:
            raise ValueError(f"--lora_blocks: none of {', '.join(blocks)} has a layer of --lora_layers; name others.")
    targets = [name for name in targets if not (name.startswith(last_kept) and _ends_with(name, text_stream_layers))]
    if not targets:
        raise ValueError(
            f"--lora_layers '{','.join(layers)}' names text layers of {model.spans.kept[-1].name} only, whose output "
            "nothing reads; name further layers or skip fewer trailing blocks."
        )
    return list(dict.fromkeys(targets))


def _ends_with(name: str, layers: Sequence[str]) -> bool:
    return any(name.endswith(f".{layer}") for layer in layers)


def add_lora(
    module: ModelMixin | PreTrainedModel, targets: Sequence[str], *, rank: int, alpha: int, dropout: float, seed: int
) -> list[torch.nn.Parameter]:
    """Freeze ``module``, add LoRA in float32 and return its parameters. Weights start the same for the same seed."""
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(derived_seed(seed, "lora"))
        # peft could not merge LoRA into weights of torchao; nothing here merges.
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass", category=UserWarning)
        module.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                init_lora_weights="gaussian",
                target_modules=list(targets),
            )
        )
    cast_training_params(module, dtype=torch.float32)
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            # Half precision trains under autocast, which casts the weights; a float32 copy of each layer's input
            # would only be kept for backward.
            layer.cast_input_dtype_enabled = False
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


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


def load_lora(
    folder: Path,
    family: type[Family],
    transformer: torch.nn.Module,
    text_encoders: Mapping[str, torch.nn.Module] | None = None,
) -> None:
    """Read weights that :func:`save_lora` wrote into adapters that are in place.

    Raises:
        ValueError: if the file belongs to other layers.
    """
    try:
        state = family.pipeline_class.lora_state_dict(str(folder), weight_name=WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--resume_from_checkpoint {folder}: {WEIGHTS_NAME} cannot be read; name another.") from error
    for prefix, module in {"transformer": transformer, **(text_encoders or {})}.items():
        part = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
        part = convert_unet_state_dict_to_peft(part)
        expected = get_peft_model_state_dict(module)
        if part.keys() != expected.keys() or any(part[k].shape != v.shape for k, v in expected.items()):
            raise ValueError(
                f"--resume_from_checkpoint {folder} was made with other LoRA layers or another rank than this run; "
                "use the settings it was made with, or start anew in another --output_dir."
            )
        set_peft_model_state_dict(module, part, adapter_name="default")


def check_gradients(model: torch.nn.Module) -> None:
    """After the first backward: every LoRA must be reached (its B has a gradient; A's is zero while B is).

    Raises:
        ValueError: naming the first layer that is not.
    """
    for name, parameter in _lora_b(model).items():
        if parameter.grad is None or not bool(parameter.grad.any()):
            raise ValueError(
                f"The LoRA of {_layer(name)} receives no gradient, so it would never learn; leave the layer out of "
                "--lora_layers, or report this as a bug."
            )


def check_learned(model: torch.nn.Module) -> None:
    """Before saving: no LoRA may still be at zero, or hold a value that is not finite.

    Raises:
        ValueError: naming the first layer.
    """
    for name, parameter in _lora_b(model).items():
        if not bool(parameter.any()):
            raise ValueError(f"The LoRA of {_layer(name)} is still zero after training; nothing was learnt there.")
    check_finite(model)


def check_finite(model: torch.nn.Module) -> None:
    """Before anything is saved: no LoRA may hold a value that is not finite.

    Raises:
        ValueError: naming the first layer.
    """
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise ValueError(
                f"The LoRA of {_layer(name)} is not finite; lower --learning_rate. Checkpoints written so far are "
                "intact."
            )


def _lora_b(model: torch.nn.Module) -> Mapping[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad}


def _layer(parameter_name: str) -> str:
    return parameter_name.partition(".lora_")[0]


def describe_trainable(model: DiTBlockSkipTransformer, targets: Sequence[str]) -> str:
    """One line that says what trains in the transformer: how many parameters, in how many layers of which blocks.

    Args:
        model: The transformer, LoRA added.
        targets: Full names of the layers with LoRA.
    """
    blocks = [block for block in model.spans.kept if any(name.startswith(f"{block.name}.") for name in targets)]
    stacks: dict[str, list[int]] = {}
    for block in blocks:
        stack, _, number = block.name.rpartition(".")
        stacks.setdefault(stack, []).append(int(number))
    places = [f"{stack} {_ranges(numbers)}" for stack, numbers in stacks.items()]
    inside = tuple(f"{block.name}." for block in blocks)
    outside = sum(not name.startswith(inside) for name in targets)
    places += [f"{outside} layers outside the blocks"] if outside else []
    total = len(model.spans.kept) + len(model.spans.skipped)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (
        f"{count:,} LoRA parameters in {len(targets)} layers of {len(blocks)} of {total} blocks: {', '.join(places)}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, runs of them as ranges: ``0-4, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
