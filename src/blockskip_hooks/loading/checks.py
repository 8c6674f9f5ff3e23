"""Whether a model's files are whole and belong together: from configs and file headers, before any weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers

from ..utils.errors import UserError, first_line
from .checkpoint_index import tensor_shapes, weight_files
from .component_config import load_config, model_class, read_index
from .download import check_weights, has_weights
from .models import check_scales, check_surplus, empty_model
from .text_encoders import empty_text_encoder


if TYPE_CHECKING:
    from ..families import Family


Shapes = Mapping[str, tuple[int, ...]]

_LIBRARIES = ("diffusers", "transformers")
_LORA_A = re.compile(r"transformer\.(.+)\.lora_A\.weight")
_TOKENIZER_CONFIG = "tokenizer_config.json"


def check_model(model_path: Path, family: type[Family], variant: str | None, *, plan_only: bool = False) -> None:
    """Check the files of every component that a run will load; none of their weights is read.

    Args:
        model_path: Folder of a pipeline of the family.
        family: The model's family.
        variant: Weight variant in the file names.
        plan_only: Whether weights and tokenizers, which a plan does without, may be missing altogether.

    Raises:
        UserError: naming the first component that is damaged, or no part of this model.
    """
    configs_only = plan_only and not has_weights(model_path)
    if not configs_only:
        check_weights(model_path, family.text_components, variant)
    where = f"--pretrained_model_name_or_path {model_path}"
    index = read_index(model_path)
    present = {name for name in family.text_components if (model_path / name).is_dir()}
    used = ("scheduler", "transformer", "vae", *sorted(present), *family.image_components)
    for name in (name for name in used if (model_path / name).is_dir()):
        entry = index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in _LIBRARIES):
            raise UserError(f"{where}: its index says that its {name} is {entry}, no class of a known library.")
    if (model_path / "scheduler").is_dir():
        _check_scheduler(model_path / "scheduler", where)
    for name in ("transformer", "vae", *family.image_components):
        if (model_path / name).is_dir():
            _check_diffusers_part(model_path / name, variant, where, configs_only)
    for name in sorted(present):
        if not name.startswith(("tokenizer", "processor")):
            _check_text_encoder(model_path / name, index[name][1], variant, where, configs_only)
        elif not configs_only:
            _check_tokenizer(model_path / name, index[name][1], where)


def lora_layers(shapes: Shapes) -> Shapes:
    """Shapes of the first matrices of a LoRA's file by the names of the transformer's layers that they adapt."""
    return {match[1]: shape for name, shape in shapes.items() if (match := _LORA_A.fullmatch(name))}


def check_lora_file(file: Path, transformer: torch.nn.Module, flag: str) -> None:
    """Check that a LoRA's file is whole and, if it has the layers' names of diffusers, that it is of this model.

    Args:
        file: The file.
        transformer: The model; it needs no weights.
        flag: Flag and value that named the LoRA, for the messages.

    Raises:
        UserError: if not.
    """
    if file.suffix != ".safetensors":
        raise UserError(f"{flag}: {file.name} is no safetensors file; pickled weights are not read.")
    try:
        found = tensor_shapes(file)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error
    layers = lora_layers(found)
    modules = dict(transformer.named_modules())
    for name, shape in layers.items():
        wanted = getattr(modules.get(name), "in_features", None)
        if wanted != shape[1]:
            there = "does not have that layer" if wanted is None else f"has {wanted} there"
            raise UserError(
                f"{flag} is of another model: its LoRA of {name} takes {shape[1]} features, and this model {there}."
            )
    # LoKr is another form of it, which diffusers reads for some families.
    if not layers and not any(kind in name for name in found for kind in ("lora", "lokr")):
        raise UserError(f"{flag} holds no LoRA.")


def _check_scheduler(folder: Path, where: str) -> None:
    try:
        config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
        chosen = getattr(diffusers, config["_class_name"])
        scheduler = chosen.from_config(config)
    except Exception as error:  # a class may raise anything for a config it does not expect
        raise UserError(
            f"{where}: scheduler/scheduler_config.json does not describe a scheduler ({_what(error)}); "
            "download it again."
        ) from error
    if len(scheduler.timesteps) == 0:
        raise UserError(f"{where}: scheduler/scheduler_config.json describes a schedule of no steps.")


def _check_diffusers_part(folder: Path, variant: str | None, where: str, configs_only: bool) -> None:
    try:
        config = load_config(folder)
    except OSError as error:
        raise UserError(f"{where}: {first_line(error)}; download it again.") from error
    chosen = model_class(config)
    try:
        model = empty_model(config)
        expected = _shapes(model)
    except Exception as error:  # a class may raise anything for a config it does not expect
        raise UserError(
            f"{where}: {folder.name}/config.json does not describe a {chosen.__name__} ({_what(error)}); "
            "download it again."
        ) from error
    if configs_only:
        return
    found = _found_shapes(folder, "diffusion_pytorch_model", variant, where)
    _check_shapes(expected, found, folder.name, where)
    # Attention layers of old autoencoders had other names; diffusers translates them.
    missing = [name for name in expected if name not in found and ".attentions." not in name]
    if missing:
        raise UserError(
            f"{where}: the weights of {folder.name} lack {len(missing)} tensors of its config, first {missing[0]}; "
            "they are of another model."
        )
    check_scales(found, f"{where}: {folder.name}")
    # Other parts are read by diffusers, which translates old names.
    if "transformer" in folder.name:
        check_surplus(found, model, f"{where}: {folder.name}")


def _check_text_encoder(folder: Path, class_name: str, variant: str | None, where: str, configs_only: bool) -> None:
    try:
        config = load_config(folder)
    except OSError as error:
        raise UserError(f"{where}: {first_line(error)}; download it again.") from error
    found = {} if configs_only else _found_shapes(folder, "model", variant, where)
    if "quantization_config" in config:
        return  # Packed weights have shapes of their own.
    check_scales(found, f"{where}: {folder.name}")
    try:
        expected = _shapes(empty_text_encoder({**config, "architectures": [class_name]}, torch.float32))
    except Exception as error:  # a class may raise anything for a config it does not expect
        raise UserError(
            f"{where}: {folder.name}/config.json does not describe a {class_name} ({_what(error)}); download it again."
        ) from error
    if configs_only:
        return
    _check_shapes(expected, found, folder.name, where)
    # transformers renames and joins weights while loading, so of the names only the ends count.
    ends = [{(name.rpartition(".")[2], shape) for name, shape in shapes.items()} for shapes in (expected, found)]
    if ends[0].isdisjoint(ends[1]):
        raise UserError(f"{where}: {folder.name} has none of the tensors that its config asks for.")


def _check_tokenizer(folder: Path, class_name: str, where: str) -> None:
    chosen = getattr(transformers, class_name, None)
    if chosen is None:
        raise UserError(f"{where}: {folder.name} is a {class_name}, which transformers does not have; update it.")
    files = dict(getattr(chosen, "vocab_files_names", None) or {})
    whole = files.pop("tokenizer_file", "tokenizer.json")
    missing = sorted(name for name in files.values() if not (folder / name).is_file())
    # transformers makes tokenizers that lack these files all the same, of no words or without a limit.
    if not (folder / whole).is_file() and (missing or not files):
        raise UserError(f"{where}: {folder.name} lacks {' and '.join(missing) or whole}; download it again.")
    if not (folder / _TOKENIZER_CONFIG).is_file():
        raise UserError(f"{where}: {folder.name} lacks {_TOKENIZER_CONFIG}; download it again.")


def _found_shapes(folder: Path, stem: str, variant: str | None, where: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a component's weight files, every file checked against its header."""
    try:
        files = weight_files(folder, stem, variant) or {path: [] for path in sorted(folder.glob("*.safetensors"))}
        shapes = {path.name: tensor_shapes(path) for path in files if path.is_file()}
    except ValueError as error:
        raise UserError(f"--pretrained_model_name_or_path: {error}") from error
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt"))
        what = " but pickles, which are not read" if pickled else ""
        raise UserError(f"{where}: {folder.name} holds no safetensors weights{what}; download them.")
    absent = sorted(path.name for path in files if not path.is_file())
    if absent:
        raise UserError(f"{where}: {folder.name} lacks the weight files {', '.join(absent)} that its index names.")
    for path, names in files.items():
        lost = sorted(set(names) - set(shapes[path.name]))
        if lost:
            raise UserError(f"{where}: {folder.name}/{path.name} lacks {lost[0]}, which the index says it holds.")
    return {name: shape for part in shapes.values() for name, shape in part.items()}


def _check_shapes(expected: Shapes, found: Shapes, component: str, where: str) -> None:
    for name, shape in expected.items():
        if found.get(name, shape) != shape:
            raise UserError(
                f"{where}: {component}'s {name} has the shape {found[name]}, but its config asks for {shape}; config "
                "and weights are of different models."
            )


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    # Without buffers that are never saved.
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _what(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
