"""Where each tensor of a diffusers model folder lies, and reading them one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
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


class CheckpointWeights(Mapping[str, torch.Tensor]):
    """Tensors of a checkpoint, read from disk when asked for and cast to the model's dtypes.

    A shard that was opened stays open until :meth:`close`; its tensors stay valid afterwards.

    Args:
        index: File of each tensor, from :func:`index_safetensors`.
        dtypes: Dtype of each tensor that the model wants.
        prefix: Keys are the names behind this prefix; others are left out.
    """

    def __init__(self, index: Mapping[str, Path], dtypes: Mapping[str, torch.dtype], prefix: str = "") -> None:
        self._index = index
        self._prefix = prefix
        self._dtypes = {name.removeprefix(prefix): d for name, d in dtypes.items() if name.startswith(prefix)}
        self._open: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        name = f"{self._prefix}{key}"
        path = self._index[name]
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
        return self._open[path].get_tensor(name).to(self._dtypes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)

    def close(self) -> None:
        """Close the shards, so that what was read of them does not count as memory of the process any more."""
        self._open.clear()
