"""A frozen LoRA beside the one that trains, as is used on distilled models: in training alone, and never exported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from ..families import Family
from ..inference.lora_files import quiet_adapters
from ..loading.checks import check_lora_file
from ..loading.lora_files import WEIGHTS_NAME
from ..lora import ASSISTANT, TRAINED, use_adapters
from ..transformer import DiTBlockSkipTransformer
from ..utils.digests import file_digest
from ..utils.errors import UserError, first_line


_WEIGHT = re.compile(r"transformer\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Assistant:
    """An assistant LoRA, checked against its model.

    Attributes:
        name: What ``--assistant_lora`` says.
        file: Its weights.
        ranks: Rank of each layer that it adapts, by the layer's full name.
    """

    name: str
    file: Path
    ranks: Mapping[str, int]

    @property
    def digest(self) -> str:
        """What tells it from others."""
        return file_digest(self.file)

    def layers(self) -> dict[int, list[str]]:
        """Full names of its layers by their rank."""
        names: dict[int, list[str]] = {}
        for layer, rank in self.ranks.items():
            names.setdefault(rank, []).append(layer)
        return names


def find_assistant(
    name: str, family: Family, transformer: torch.nn.Module, cache_dir: str | None, token: str | None
) -> Assistant:
    """Find or download an assistant LoRA and check that it is one of this model.

    Args:
        name: A file, a folder with ``pytorch_lora_weights.safetensors``, ``owner/name`` of a repository on the hub
            with such a file, or ``owner/name/file.safetensors``.
        family: The model's family.
        transformer: The model; it needs no weights.
        cache_dir: Where downloads are kept; ``None`` for the hub's own cache.
        token: Access token of the hub.

    Raises:
        UserError: one line that names the flag and what is wrong.
    """
    flag = f"--assistant_lora {name}"
    file = _find_file(name, cache_dir, token)
    check_lora_file(file, transformer, flag)
    shapes: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in _read(family, file, flag)["state"].items():
        if (match := _WEIGHT.fullmatch(key)) is None:
            raise UserError(f"{flag} holds {key}, and an assistant is LoRA of the transformer's layers alone.")
        shapes.setdefault(match[1], {})[match[2]] = tensor.shape
    modules = dict(transformer.named_modules())
    for layer, parts in shapes.items():
        module = modules.get(layer)
        linear = isinstance(module, torch.nn.Linear) and parts.keys() == {"A", "B"}
        if not linear or module is None or (*parts["B"][:1], *parts["A"][1:]) != module.weight.shape:
            raise UserError(f"{flag} is of another model: its LoRA of {layer} fits no linear layer of this one.")
    return Assistant(name, file, {layer: parts["A"][0] for layer, parts in shapes.items()})


def add_assistant(model: DiTBlockSkipTransformer, family: Family, assistant: Assistant, dtype: torch.dtype) -> None:
    """Put an assistant LoRA beside the LoRA that trains, frozen and taking part.

    Args:
        model: The transformer, the LoRA that trains added.
        family: Its family.
        assistant: The assistant.
        dtype: Dtype of its weights.
    """
    transformer: Any = model.transformer
    read = _read(family, assistant.file, f"--assistant_lora {assistant.name}")
    state = read.pop("state")
    with quiet_adapters():
        transformer.load_lora_adapter(state, adapter_name=ASSISTANT, low_cpu_mem_usage=True, **read)
    use_adapters(transformer, [TRAINED, ASSISTANT])
    # Of layers whose weights stream peft takes the values away.
    marked = {name: name.replace(f".{ASSISTANT}.", ".") for name, _ in transformer.named_parameters()}
    weights = {name: state[f"transformer.{key}"].to(dtype) for name, key in marked.items() if name != key}
    model.place_frozen_adapter(weights)
    for layer in assistant.ranks:
        # As of the LoRA that trains: autocast does it.
        transformer.get_submodule(layer).cast_input_dtype_enabled = False


def _find_file(name: str, cache_dir: str | None, token: str | None) -> Path:
    path, parts = Path(name), name.split("/")
    if path.exists():
        file = path if path.is_file() else path / WEIGHTS_NAME
        if not file.is_file():
            raise UserError(f"--assistant_lora {name} is a folder without {WEIGHTS_NAME}; name the file.")
        return file
    if len(parts) < 2 or path.is_absolute():
        raise UserError(
            f"--assistant_lora {name} is neither a file or folder nor a repository's owner/name; correct it."
        )
    repository, filename = "/".join(parts[:2]), "/".join(parts[2:]) or WEIGHTS_NAME
    try:
        return Path(hf_hub_download(repository, filename, cache_dir=cache_dir, token=token))
    except Exception as error:
        # The hub client raises many types.
        raise UserError(
            f"--assistant_lora {name}: {filename} of {repository} is neither here nor could be downloaded "
            f"({first_line(error)}); name it as owner/name/file.safetensors, and check your access and the network."
        ) from error


def _read(family: Family, file: Path, flag: str) -> dict[str, Any]:
    """The weights under the names that diffusers' pipelines give them (``state``), and what says their scale."""
    reader = family.pipeline_class.lora_state_dict
    settings: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True, "return_lora_metadata": True}
    if "return_alphas" in inspect.signature(reader).parameters:
        settings["return_alphas"] = True
    try:
        with quiet_adapters():
            state, *alphas, metadata = reader(str(file.parent), **settings)
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{flag} cannot be read as a LoRA of {family.name} ({first_line(error)}).") from error
    return {"state": state, "network_alphas": alphas[0] if alphas else None, "metadata": metadata}
