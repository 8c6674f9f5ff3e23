"""Text encoders that are never whole in memory: their layers are read from the checkpoint while they run."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, send_to_device, set_module_tensor_to_device

from ..utils.errors import UserError
from ..utils.logs import errors_only
from .streaming import Streamer, plain_device, stream


LARGE_TABLE_BYTES = 2**28
"""Smaller tables of token embeddings stay on the device."""

LARGE_PART = 0.1
"""An encoder with less than this part of all encoders' weights is not worth reading layer by layer."""


def empty_text_encoder(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A text encoder of transformers on the meta device.

    Args:
        config: Its config, with ``model_type`` and ``architectures``.
        dtype: Dtype of its weights.

    Raises:
        UserError: if the config names no model class of transformers.
    """
    settings = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    encoder_class = getattr(transformers, (settings.get("architectures") or [""])[0], None)
    if encoder_class is None:
        raise UserError(
            f"A text encoder's config names the architectures {settings.get('architectures')}, which transformers "
            f"{transformers.__version__} does not have."
        )
    model_config = encoder_class.config_class.from_dict(settings)
    with torch.device("meta"):
        encoder = torch.nn.Module.to(encoder_class(model_config), dtype)
    return encoder.requires_grad_(False).eval()


def layer_stacks(encoder: torch.nn.Module) -> list[str]:
    """Names of the lists of layers that an encoder is made of, of text and of images, without lists inside them."""
    stacks: list[str] = []
    for name, module in encoder.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, torch.nn.ModuleList) and len(module) and not inside:
            stacks.append(name)
    return stacks


def large_tables(encoder: torch.nn.Module) -> list[str]:
    """Names of the tables of token embeddings that are looked up in host memory when an encoder is streamed.

    A prompt needs a few hundred rows of a quarter of a million. Tables that another layer shares are not among them,
    nor are those that do not stand beside a list of layers: what is around them is loaded in one piece.
    """
    stacks = layer_stacks(encoder)
    users: dict[int, int] = {}
    for module in encoder.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and any(stack.rpartition(".")[0] == name.rpartition(".")[0] for stack in stacks)
        and users[id(module.weight)] == 1
        and module.weight.numel() * module.weight.element_size() >= LARGE_TABLE_BYTES
    ]


def large_encoders(configs: Mapping[Any, Mapping[str, Any]]) -> list[Any]:
    """The encoders, by their keys, that are worth streaming when memory is short.

    Args:
        configs: Configs of all encoders.
    """
    sizes = {
        key: sum(parameter.numel() for parameter in empty_text_encoder(config, torch.float32).parameters())
        for key, config in configs.items()
    }
    return [key for key, size in sizes.items() if size >= LARGE_PART * sum(sizes.values())]


def load_streamed_encoder(
    source: str | Path, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device | str, **settings: Any
) -> Any:
    """Load a text encoder without its layers, which are read one at a time when they run.

    Of large tables of token embeddings only the rows in use are read, in host memory.

    transformers itself loads the rest of the model and says where each weight of a layer is, so renamed and converted
    weights are those of an ordinary load.

    Args:
        source: Folder of the encoder, or a hub id.
        config: As for :func:`empty_text_encoder`.
        dtype: Dtype of its weights, but for those that the class keeps in float32.
        device: Where it runs.
        **settings: Further arguments of ``from_pretrained``.
    """
    empty = empty_text_encoder(config, dtype)
    stacks, tables = layer_stacks(empty), large_tables(empty)
    place = str(plain_device(device))
    # Only for weights that transformers stores otherwise than the checkpoint does: mixtures of experts.
    converted = tempfile.TemporaryDirectory(prefix="text-encoder-", ignore_cleanup_errors=True)
    # accelerate warns about offloading, which is intended here.
    with errors_only("accelerate.big_modeling"):
        encoder = type(empty).from_pretrained(
            source,
            dtype=dtype,
            device_map=_device_map(empty, stacks, tables, place),
            offload_folder=converted.name,
            use_safetensors=True,
            **settings,
        )
    weakref.finalize(encoder, converted.cleanup)
    encoder.requires_grad_(False).eval()
    weights = _offloaded_weights(encoder)
    in_float32 = _kept_in_float32(encoder, dtype)
    for name, parameter in list(encoder.named_parameters()):
        if parameter.device.type == "meta" and in_float32 & set(name.split(".")):
            weights.index[name]["dtype"] = "float32"
            set_module_tensor_to_device(encoder, name, "meta", dtype=torch.float32)
    remove_hook_from_module(encoder, recurse=True)
    for stack in stacks:
        for number, layer in encoder.get_submodule(stack).named_children():
            stream(layer, Streamer(place, reads_ahead=False), PrefixedDataset(weights, f"{stack}.{number}."))
    for table in tables:
        hook = HostLookupHook(PrefixedDataset(weights, f"{table}."), place)
        add_hook_to_module(encoder.get_submodule(table), hook)
    return encoder


class HostLookupHook(ModelHook):
    """Looks embeddings up in a table in host memory, which is mapped and not read, and sends them back.

    Between forwards the table is empty but on ``device``, where others look for the encoder's inputs to go.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], device: str) -> None:
        self.weights, self.device = weights, device

    def init_hook(self, module: Any) -> Any:
        # A table may come with a factor, which transformers has put on the device.
        for name, buffer in module.named_buffers():
            set_module_tensor_to_device(module, name, "cpu", value=buffer)
        self.absent = torch.nn.Parameter(torch.empty(0, dtype=module.weight.dtype, device=self.device), False)
        module.weight = self.absent
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        module.weight = torch.nn.Parameter(self.weights["weight"].to(self.absent.dtype), requires_grad=False)
        return send_to_device(args, "cpu"), send_to_device(kwargs, "cpu")

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        module.weight = self.absent
        return send_to_device(output, self.device)


def _device_map(model: torch.nn.Module, stacks: list[str], tables: list[str], device: str) -> dict[str, str]:
    """Where each part of a model goes: layers and large tables to disk, all else to ``device``."""
    places: dict[str, str] = {}

    def place(module: torch.nn.Module, prefix: str) -> None:
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            places[f"{prefix}{name}"] = device
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in stacks:
                places.update({f"{full}.{number}": "disk" for number in range(len(child))})  # type: ignore[arg-type]
            elif full in tables:
                places[full] = "disk"
            elif any(part.startswith(f"{full}.") for part in (*stacks, *tables)):
                place(child, f"{full}.")
            else:
                places[full] = device

    place(model, "")
    return places


def _offloaded_weights(encoder: torch.nn.Module) -> OffloadedWeightsLoader:
    """The weights that are not in memory, by name: what accelerate's hooks read them from."""
    for module in encoder.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if isinstance(part, AlignDevicesHook) and isinstance(part.weights_map, PrefixedDataset):
                return part.weights_map.dataset
    raise UserError(f"{type(encoder).__name__} was loaded whole, so there is nothing to stream.")


def _kept_in_float32(encoder: Any, dtype: torch.dtype) -> set[str]:
    """Names of modules whose weights the class keeps in float32 when the others have ``dtype``."""
    names: set[str] = set()
    if dtype == torch.float16:
        names |= set(encoder._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(encoder._keep_in_fp32_modules_strict or ())
    return names
