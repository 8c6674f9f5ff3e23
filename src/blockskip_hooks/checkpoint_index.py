"""Where each tensor of a diffusers model folder lies, without reading any of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def _with_variant(filename: str, variant: str | None) -> str:
    stem, separator, rest = filename.partition(".safetensors")
    return filename if variant is None else f"{stem}.{variant}{separator}{rest}"


def index_safetensors(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Map each tensor name of a model folder to the safetensors file that holds it.

    Args:
        folder: Folder of one pipeline component, ``<model>/transformer`` for example.
        variant: Weight variant in the file names, such as ``"fp16"``.

    Raises:
        ValueError: if the folder has no safetensors weights (pickled weights are never read), a shard is missing, or
            a file is truncated.
    """
    for candidate in dict.fromkeys((variant, None)):
        index_file = folder / _with_variant(SAFE_WEIGHTS_INDEX_NAME, candidate)
        if index_file.is_file():
            weight_map = json.loads(index_file.read_text())["weight_map"]
            missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
            if missing:
                raise ValueError(f"{folder} lacks the weight files {', '.join(missing)} that its index names.")
            return {name: folder / file for name, file in weight_map.items()}
        weights = folder / _with_variant(SAFETENSORS_WEIGHTS_NAME, candidate)
        if weights.is_file():
            try:
                with safe_open(str(weights), framework="pt") as file:
                    return dict.fromkeys(file.keys(), weights)  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{weights} is not a whole safetensors file: {error}.") from error
    raise ValueError(
        f"{folder} holds no safetensors weights ({SAFETENSORS_WEIGHTS_NAME} or an index of shards); pickled weights "
        "are not read."
    )


def weights_loader(index: dict[str, Path], dtypes: dict[str, torch.dtype]) -> OffloadedWeightsLoader:
    """A mapping that reads tensors from disk when asked for, cast to the model's dtypes."""
    return OffloadedWeightsLoader(
        index={
            name: {
                "safetensors_file": str(index[name]),
                "weight_name": name,
                "dtype": str(dtype).removeprefix("torch."),
            }
            for name, dtype in dtypes.items()
        }
    )
