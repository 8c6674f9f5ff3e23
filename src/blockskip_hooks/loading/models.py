"""Models of diffusers from their config, and the part of their weights that stays resident."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device

from ..utils.errors import UserError
from .checkpoint_index import CheckpointWeights, index_safetensors
from .component_config import load_config, model_class
from .quantization import QuantizationConfig, mark_quantized, quantize_layer


if TYPE_CHECKING:
    from diffusers import ModelMixin


# What bitsandbytes, torchao's exporters and scaled fp8 write beside weights that are codes, not numbers.
_SCALES = re.compile(
    r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale|input_scale|absmax|quant_map)$|\.quant_state\."
)


def empty_model(config: Mapping[str, Any], class_of_model: type[ModelMixin] | None = None) -> Any:
    """A diffusers model on the meta device, from its config: its modules and names, without memory.

    Args:
        config: Its config.
        class_of_model: Its class, by default the one that the config names.

    Raises:
        UserError: if the config does not name a model class of diffusers.
    """
    chosen: Any = class_of_model or model_class(config)
    with torch.device("meta"):
        return chosen.from_config(dict(config))


def cast_floating(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype of an empty model's weights; the modules that its class keeps in float32 stay so."""
    # Not the method of diffusers' models: it warns about float32 modules, which the loop below handles.
    torch.nn.Module.to(model, dtype)
    for pattern in getattr(model, "_keep_in_fp32_modules", None) or ():
        for name, module in model.named_modules():
            if pattern in name.split("."):
                module.float()


def check_scales(found: Iterable[str], where: str) -> None:
    """Check that weights are numbers, not codes that mean something with their scales only.

    Args:
        found: Names of the tensors.
        where: What they are called in messages.

    Raises:
        UserError: if there are scales beside them.
    """
    if scales := sorted(name for name in found if _SCALES.search(name)):
        raise UserError(
            f"{where} holds quantised weights, whose scales ({len(scales)} tensors, first {scales[0]}) would be "
            "ignored; name the model in bfloat16 or float16, and let DiTBlockSkipTransformer.quantization make it "
            "small while it is loaded."
        )


def check_surplus(found: Iterable[str], model: torch.nn.Module, where: str) -> None:
    """Check that a checkpoint has no tensors that its model would ignore.

    Args:
        found: Names of the checkpoint's tensors.
        model: The model; it needs no weights.
        where: What the checkpoint is called in messages.

    Raises:
        UserError: naming the first of them.
    """
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    surplus = sorted(name for name in found if name not in known and not any(p.search(name) for p in ignored))
    check_scales(surplus, where)
    if surplus:
        raise UserError(
            f"{where} holds {len(surplus)} tensors that its config's {type(model).__name__} does not have, first "
            f"{surplus[0]}; config and weights are of different models."
        )


class Checkpoint:
    """A transformer's checkpoint, and the model that its config describes, which holds no weights yet.

    Args:
        folder: Folder of the transformer.
        dtype: Dtype of its weights, but for modules that the class keeps in float32.
        variant: Weight variant in the file names, such as ``"fp16"``.
        class_of_model: The model's class, by default the one that its config names.

    Attributes:
        model: The model, frozen; only its buffers have values.

    Raises:
        UserError: if weights of the model are missing, are not safetensors, or are of another model too.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        variant: str | None = None,
        class_of_model: type[ModelMixin] | None = None,
    ) -> None:
        config = load_config(folder)
        chosen: Any = class_of_model or model_class(config)
        with init_empty_weights(include_buffers=False):
            self.model: Any = chosen.from_config(config)
        cast_floating(self.model, dtype)
        self.model.requires_grad_(False).eval()
        self._folder = folder
        self._index = index_safetensors(folder, variant)
        self._tensors = self.model.state_dict(keep_vars=True)
        missing = sorted(set(self._tensors) - set(self._index))
        if missing:
            raise UserError(f"{folder} lacks {len(missing)} tensors of {chosen.__name__}, first {missing[0]}.")
        check_surplus(self._index, self.model, str(folder))
        self._weights = self.weights_of("")

    def weights_of(self, prefix: str) -> CheckpointWeights:
        """The tensors of one module by their names in it, ``prefix`` being its name and a dot."""
        return CheckpointWeights(self._index, {name: tensor.dtype for name, tensor in self._tensors.items()}, prefix)

    def load(
        self,
        device: torch.device | str,
        *,
        without: Collection[str] = (),
        blocks: Sequence[str] = (),
        quantized: Collection[str] = (),
        quantization: QuantizationConfig | None = None,
        shard: Callable[[torch.nn.Module, torch.device | str], None] | None = None,
    ) -> None:
        """Read the weights that stay resident, tensor by tensor: the checkpoint is never whole in memory.

        Args:
            device: Where they live.
            without: Names of modules that are left without weights.
            blocks: Names of the blocks that ``shard`` divides one at a time, before the rest of the model.
            quantized: Names of the layers that are quantised as they are read.
            quantization: How.
            shard: Divides the loaded weights of a module among processes; ``None`` keeps them whole.

        Raises:
            UserError: if a tensor has another shape than the config says.
        """
        left_out = tuple(f"{name}." for name in (*without, *quantized))
        resident = [name for name in self._tensors if not name.startswith(left_out)]
        # One block at a time is in memory in full before it is divided.
        divided = blocks if shard is not None else ()
        for block in divided:
            for name in resident:
                if name.startswith(f"{block}."):
                    self._read(name, device)
            assert shard is not None
            shard(self.model.get_submodule(block), device)
        in_blocks = tuple(f"{name}." for name in divided)
        for name in resident:
            if not name.startswith(in_blocks):
                self._read(name, device)
        self._weights.close()
        if quantization is not None:
            for name in quantized:
                self._quantize(name, quantization, device)
            mark_quantized(self.model, quantization)
        for name, buffer in self.model.named_buffers():
            set_module_tensor_to_device(self.model, name, device, value=buffer)
        if shard is not None:
            shard(self.model, device)

    def _quantize(self, name: str, quantization: QuantizationConfig, device: torch.device | str) -> None:
        """Read a layer and replace it by its quantised form: one layer at a time is in memory in full."""
        layer = self.model.get_submodule(name)
        for part, _ in layer.named_parameters():
            self._read(f"{name}.{part}", "cpu")
        self.model.set_submodule(name, quantize_layer(layer, quantization, device))
        self._weights.close()

    def _read(self, name: str, device: torch.device | str) -> None:
        value, shape = self._weights[name], self._tensors[name].shape
        if value.shape != shape:
            raise UserError(
                f"{self._folder}: {name} has shape {tuple(value.shape)}, but the model's config asks for "
                f"{tuple(shape)}."
            )
        set_module_tensor_to_device(self.model, name, device, value=value, clear_cache=False)
