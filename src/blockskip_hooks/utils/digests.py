"""Digests of files and descriptions: models whose weights differ in one tensor are never taken for each other."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO


# Tensors up to this size are read whole; of larger ones so many blocks, from the first bytes to the last.
_WHOLE_BYTES = 1 << 20
_BLOCKS = 8
_BLOCK_BYTES = 1 << 15
_MODEL_FILES = (".json", ".safetensors", ".model", ".txt")


def file_digest(path: Path) -> str:
    """A digest of a file: of all of its bytes, or, of safetensors, of its header and a part of every tensor.

    Names, dtypes, shapes and places of tensors are in the header. A file of the same size and time of change is read
    once in a process.
    """
    status = path.stat()
    return _digest(path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns)


def folder_digest(folder: Path) -> str:
    """A digest of a model component: its config and weight files."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in _MODEL_FILES)
    return hashlib.sha256("".join(f"{path.name}:{file_digest(path)}" for path in files).encode()).hexdigest()


def component_digests(model: Path, components: Iterable[str]) -> dict[str, str]:
    """Digests of those of a model's components that it has, by name."""
    return {name: folder_digest(model / name) for name in components if (model / name).is_dir()}


def fingerprint(description: Mapping[str, Any]) -> str:
    """A digest of everything that a result depends on, given as JSON-able values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, inode: int, size: int, changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        parts = _tensors(file, size) if path.suffix == ".safetensors" else None
        for begin, end in parts or [(0, size)]:
            whole = end - begin <= _WHOLE_BYTES or parts is None
            length = end - begin if whole else _BLOCK_BYTES
            for block in range(1 if whole else _BLOCKS):
                _add(digest, file, begin + (end - begin - length) * block // (_BLOCKS - 1), length)
    return digest.hexdigest()


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]] | None:
    """Where the header and each tensor of a safetensors file begin and end; ``None`` if it is damaged."""
    start = 8 + int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(start - 8)) if start <= size else {}
        header.pop("__metadata__", None)
        places = [tuple(start + offset for offset in header[name]["data_offsets"]) for name in sorted(header)]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    sound = places and all(len(place) == 2 and start <= place[0] <= place[1] <= size for place in places)
    return [(0, start), *places] if sound else None


def _add(digest: Any, file: BinaryIO, begin: int, length: int) -> None:
    file.seek(begin)
    while length > 0 and (content := file.read(min(length, _WHOLE_BYTES))):
        digest.update(content)
        length -= len(content)
