"""What a model's folder asks of a run: defaults of flags and arguments of its pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..utils.errors import UserError


# What a model's folder may ask for. Where files go, what is uploaded and what is read are the user's alone.
_MODEL_FLAGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("resolution", "max_sequence_length", "rank", "lora_alpha"), (int,)),
    **dict.fromkeys(("max_train_steps", "train_batch_size", "lr_warmup_steps"), (int,)),
    "learning_rate": (int, float),
    **dict.fromkeys(("weighting_scheme", "lr_scheduler", "patch_positions"), (str,)),
}


def model_defaults(model_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flag defaults and pipeline arguments that a model folder asks for in ``blockskip_defaults.json``.

    Returns:
        Defaults by flag name, and keyword arguments of the pipeline call; both empty without the file.

    Raises:
        UserError: if the file cannot be read, or asks for what a model has no say in.
    """
    file = model_path / "blockskip_defaults.json"
    if not file.is_file():
        return {}, {}
    try:
        defaults = dict(json.loads(file.read_text(encoding="utf-8")))
        pipeline_kwargs = dict(defaults.pop("pipeline_kwargs", {}))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no JSON object of flags; correct or remove it.") from error
    defaults.pop("schema", None)
    for name, value in defaults.items():
        if name not in _MODEL_FLAGS:
            raise UserError(f"{file} sets {name}, which is not for a model to say; remove it there.")
        if type(value) not in _MODEL_FLAGS[name]:
            raise UserError(f"{file} sets {name} to {value!r}, which has the wrong type; correct it there.")
    for name, value in pipeline_kwargs.items():
        items = value if isinstance(value, list) else [value]
        plain = all(isinstance(item, (bool, int, float, str, type(None))) for item in items)
        if not plain or name.startswith("callback"):
            raise UserError(
                f"{file} gives the pipeline {name} = {value!r}, which is no plain value; correct it there."
            )
    return defaults, pipeline_kwargs
