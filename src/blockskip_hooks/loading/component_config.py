"""Config files of model components."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin


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


def model_class(config: Mapping[str, Any]) -> type[ModelMixin]:
    """The class of diffusers that a component's config names.

    Raises:
        ValueError: if there is none of this name.
    """
    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None)
    if found is None:
        raise ValueError(
            f"--pretrained_model_name_or_path: the model names the class {name}, which diffusers "
            f"{diffusers.__version__} does not have; update diffusers or name another model."
        )
    return found
