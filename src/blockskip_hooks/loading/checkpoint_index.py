"""Where each tensor of a diffusers model folder lies, and reading them one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..utils.errors import UserError


_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What files call the dtypes that are read without a cast."""


def index_safetensors(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Map each tensor name of a model folder to the safetensors file that holds it.

    Args:
        folder: Folder of one pipeline component, ``<model>/transformer`` for example.
        variant: Weight variant in the file names, such as ``"fp16"``.

    Raises:
        UserError: if the folder has no safetensors weights (pickled weights are never read), a shard is missing, or
            a file is truncated.
    """
    files = weight_files(folder, SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors"), variant)
    if not files:
        raise UserError(
            f"{folder} holds no safetensors weights ({SAFETENSORS_WEIGHTS_NAME} or an index of shards); pickled "
            "weights are not read."
        )
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        raise UserError(f"{folder} lacks the weight files {', '.join(missing)} that its index names.")
    return {name: path for path, names in files.items() for name in names or tensor_shapes(path)}


def weight_files(folder: Path, stem: str, variant: str | None = None) -> dict[Path, list[str]]:
    """The files that hold a component's weights, each with the tensors that an index says it holds.

    Args:
        folder: Folder of the component.
        stem: Name of the weights without ending, ``"diffusion_pytorch_model"`` for example.
        variant: Weight variant in the file names, such as ``"fp16"``; files without it are found too.

    Returns:
        The files, some of which may be missing if there is an index; without an index no tensors are named.
    """
    for infix in dict.fromkeys((f".{variant}" if variant else "", "")):
        # diffusers puts a variant before the ending of an index, transformers where that of a file is.
        for name in (f"{stem}{infix}.safetensors.index.json", f"{stem}.safetensors.index{infix}.json"):
            if (folder / name).is_file():
                files: dict[Path, list[str]] = {}
                for tensor, file in read_weight_map(folder / name).items():
                    files.setdefault(folder / file, []).append(tensor)
                return files
        if (folder / f"{stem}{infix}.safetensors").is_file():
            return {folder / f"{stem}{infix}.safetensors": []}
    return {}


def read_weight_map(index_file: Path) -> dict[str, str]:
    """The file of each tensor by an index of shards.

    Raises:
        UserError: if it is no index, or names a file that is not beside it.
    """
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        weight_map = dict(index["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index_file} is no index of weight files; download it again.") from error
    for file in weight_map.values():
        # Whoever made the index must not choose which of this machine's files are read.
        if not isinstance(file, str) or re.search(r"[/\\]", file) or not file.endswith(".safetensors"):
            raise UserError(f"{index_file} names {file!r}, which is no safetensors file beside it; download it again.")
    return weight_map


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file, from its header, which is checked against the file's size.

    Raises:
        UserError: if the file is cut short or no safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = "it is empty" if path.is_file() and path.stat().st_size == 0 else str(error)
        raise UserError(f"{path} is not a whole safetensors file ({reason}); download it again.") from error


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
        self._places: dict[str, _Place] = {}

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

    def read(self, key: str, out: torch.Tensor) -> None:
        """Read a tensor into memory that is there already.

        The interpreter is free meanwhile, and nothing is mapped: a thread that reads holds nobody up.

        Args:
            key: The tensor.
            out: Contiguous, in host memory, of its shape; the tensor is cast to its dtype.

        Raises:
            UserError: if the tensor has another shape.
        """
        place = self._place(key)
        if place.shape != tuple(out.shape):
            raise UserError(
                f"{place.path}: {self._prefix}{key} has shape {place.shape}, but the model's config asks for "
                f"{tuple(out.shape)}."
            )
        if place.dtype == _DTYPE_NAMES.get(out.dtype):
            read_bytes(place.path, place.start, out.view(-1).view(torch.uint8).numpy())
        else:
            out.copy_(self[key])
            self.close()

    def offset(self, key: str, dtype: torch.dtype) -> int:
        """Where a tensor begins in its file, in bytes; 0 for one that is cast to ``dtype``."""
        place = self._place(key)
        return place.start if place.dtype == _DTYPE_NAMES.get(dtype) else 0

    def _place(self, key: str) -> _Place:
        if not self._places:
            headers = {path: _read_header(path) for path in {self._index[f"{self._prefix}{key}"] for key in self}}
            for name in self:
                path = self._index[f"{self._prefix}{name}"]
                start, header = headers[path]
                entry = header[f"{self._prefix}{name}"]
                place = _Place(path, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
                self._places[name] = place
        return self._places[key]

    def close(self) -> None:
        """Close the shards, so that what was read of them does not count as memory of the process any more."""
        self._open.clear()


class _Place(NamedTuple):
    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and its header: files were checked by :func:`tensor_shapes`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def read_bytes(path: Path, start: int, out: NDArray[np.uint8]) -> None:
    """Fill ``out`` with the bytes of a file from ``start`` on.

    Raises:
        OSError: if the file ends before.
    """
    left = out.data
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left:
            count = file.readinto(left)
            if not count:
                raise OSError(f"{path} ended while it was read; it is not the file that was there before.")
            left = left[count:]
