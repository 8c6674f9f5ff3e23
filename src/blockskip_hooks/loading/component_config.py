"""Config files of model components."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from ..utils.errors import UserError, first_line


if TYPE_CHECKING:
    from diffusers import ModelMixin


MODULAR_INDEX = "modular_model_index.json"


def load_config(folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a pipeline component, its class name included.

    Raises:
        OSError: if the file is missing or is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise OSError(f"{path} is not a JSON object")
    return config


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline is made of: its class as ``_class_name``, and library and class of each component.

    Pipelines are saved with a ``model_index.json``. Modular ones have an index of their own, which also says where
    components come from, and of which class they are loaded: that counts.

    Raises:
        OSError: if the folder has neither.
        ValueError: if it is not a JSON object, or a component has no class.
    """
    file, modular = folder / "model_index.json", folder / MODULAR_INDEX
    index = json.loads((modular if modular.is_file() and not file.is_file() else file).read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise ValueError("no JSON object")
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict):
            if "type_hint" not in entry[2]:
                raise ValueError(f"no type_hint of {name}")
            index[name] = entry[2]["type_hint"] or entry[:2]
    return index


def is_absent(index: Mapping[str, Any], component: str) -> bool:
    """Whether a pipeline's index gives a component no class, as pipelines save what they were made without."""
    return (index.get(component) or [None])[0] is None


def diffusers_class(name: str) -> Any:
    """A class of diffusers, which is imported when it is asked for.

    Raises:
        UserError: if the installed version has no class of this name, or cannot import it.
    """
    try:
        return getattr(diffusers, name)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise UserError(
            f"This model needs {name}, which diffusers {diffusers.__version__} does not have "
            f"({first_line(error)}); install a version that has it, or name another model."
        ) from error


def defining_module(name: str) -> Any:
    """The module that defines a class of diffusers, for what else it holds.

    Raises:
        UserError: as :func:`diffusers_class`.
    """
    return sys.modules[diffusers_class(name).__module__]


def model_class(config: Mapping[str, Any]) -> type[ModelMixin]:
    """The class of diffusers that a component's config names.

    Raises:
        UserError: if there is none of this name.
    """
    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None)
    if found is None:
        raise UserError(
            f"The model names the class {name}, which diffusers "
            f"{diffusers.__version__} does not have; update diffusers or name another model."
        )
    return found
