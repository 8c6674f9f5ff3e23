"""Where each tensor of a diffusers model folder lies, and reading them one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def _with_variant(filename: str, variant: str | None) -> str:
    stem, separator, rest = filename.partition(".safetensors")
    return filename if variant is None else f"{stem}.{variant}{separator}{rest}"


def _index_names(variant: str | None) -> tuple[str, ...]:
    """Names of an index of shards; diffusers puts a variant before the ending, others where a file's is."""
    stem, ending = SAFE_WEIGHTS_INDEX_NAME.rsplit(".", 1)
    return (_with_variant(SAFE_WEIGHTS_INDEX_NAME, variant), *([f"{stem}.{variant}.{ending}"] if variant else []))


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
        for index_file in (folder / name for name in _index_names(candidate) if (folder / name).is_file()):
            weight_map = read_weight_map(index_file)
            missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
            if missing:
                raise ValueError(f"{folder} lacks the weight files {', '.join(missing)} that its index names.")
            return {name: folder / file for name, file in weight_map.items()}
        weights = folder / _with_variant(SAFETENSORS_WEIGHTS_NAME, candidate)
        if weights.is_file():
            return dict.fromkeys(tensor_shapes(weights), weights)
    raise ValueError(
        f"{folder} holds no safetensors weights ({SAFETENSORS_WEIGHTS_NAME} or an index of shards); pickled weights "
        "are not read."
    )


def read_weight_map(index_file: Path) -> dict[str, str]:
    """The file of each tensor by an index of shards.

    Raises:
        ValueError: if it is no index, or names a file that is not beside it.
    """
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        weight_map = dict(index["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index_file} is no index of weight files; download it again.") from error
    for file in weight_map.values():
        # Whoever made the index must not choose which of this machine's files are read.
        if not isinstance(file, str) or re.search(r"[/\\]", file) or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index_file} names {file!r}, which is no safetensors file beside it; download it again."
            )
    return weight_map


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file, from its header, which is checked against the file's size.

    Raises:
        ValueError: if the file is cut short or no safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = "it is empty" if path.is_file() and path.stat().st_size == 0 else str(error)
        raise ValueError(f"{path} is not a whole safetensors file ({reason}); download it again.") from error


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
