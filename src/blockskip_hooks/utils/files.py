"""Files that are whole or absent: written under a temporary name, synced, renamed; full disks in one line."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


SCHEMA = 1

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def expand_home(text: str) -> str:
    """A path with the home folder in place of a ``~`` at its start: a shell leaves one behind ``=`` or in quotes."""
    return os.path.expanduser(text)


def home_path(text: str) -> Path:
    """The same as a path."""
    return Path(expand_home(text))


def existing_parent(path: Path) -> Path:
    """``path`` itself, or the nearest folder above it that is there."""
    return next(part for part in (path, *path.absolute().parents) if part.exists())


def set_aside(path: Path) -> Path:
    """Rename a file or folder whose name is needed, ``a.md`` to ``a.earlier-1.md``, and return its new path."""
    names = (path.with_name(f"{path.stem}.earlier-{number}{path.suffix}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's names, outlast a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, needed: int | None = None, temporary: Path | None = None) -> Iterator[Path]:
    """A name to write a file under, which takes the place of ``path`` once the body is done.

    Killed at any moment, the old file or the new one is there, and whole. A body that fails leaves no file behind.

    Args:
        path: The file to be.
        needed: Bytes that it will take, for the message when there is no room.
        temporary: The name to write under, if several processes may write this file at once; by default a hidden one
            beside ``path``, which the next run writes over where one was killed.

    Raises:
        OSError: if the file cannot be written. The message for a full disk says what is needed and what is free.
    """
    # In the same folder, because a rename is atomic only inside one file system.
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(error, path, needed) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    temporary: Path | None = None,
) -> None:
    """Write a safetensors file in one step; see :func:`replacing`."""
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with replacing(path, needed, temporary) as file:
        save_file(dict(tensors), str(file), metadata=dict(metadata or {}) or None)


def write_error(error: Exception, path: Path, needed: int | None = None) -> Exception:
    """What went wrong with writing ``path``: a full disk in one line, what safetensors says as an OSError."""
    code = getattr(error, "errno", None)
    if code is None and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    if code not in _FULL:
        return OSError(f"{path} cannot be written: {error}") if isinstance(error, SafetensorError) else error
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    wanted = "" if needed is None else f"{needed / 1e6:.3f} MB are needed and "
    return OSError(
        f"No room for {path}: {wanted}{shutil.disk_usage(folder).free / 1e6:.3f} MB are free ({os.strerror(code)}). "
        "What was written before is whole: make room and run the same command with --resume_from_checkpoint latest."
    )


def write_json(path: str | Path, data: Mapping[str, Any], temporary: Path | None = None) -> None:
    """Write ``data`` as JSON with ``"schema"`` as its first key; after a failure the old file is still whole.

    Numbers that JSON does not have (NaN, infinities) become null, so that one diverged loss does not make the whole
    file unreadable for strict parsers.

    Raises:
        TypeError: if ``data`` holds something that JSON cannot express. Nothing is written then.
    """
    document = {"schema": data.get("schema", SCHEMA), **{key: data[key] for key in data if key != "schema"}}
    write_text(path, json.dumps(_finite(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n", temporary)


def write_text(path: str | Path, text: str, temporary: Path | None = None) -> None:
    """Replace a text file in one step, so that a reader or a crash never meets half of it; see ``replacing``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    with replacing(path, len(data), temporary) as file:
        file.write_bytes(data)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
