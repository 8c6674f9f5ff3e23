"""Records on disk: what precompute leaves for training, one record per sample.

A store is a folder with a manifest and safetensors shards. Records are found by sample id and only under the
fingerprint of everything they depend on; a store of another run is an error, never a silent reuse.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .monitor import write_json


Record = dict[str, torch.Tensor]
"""One sample's tensors by name, without a batch dimension."""

SCHEMA = 1
_OWN_NAME = re.compile(r"records-[0-9a-f]{32}")


def fingerprint(description: Mapping[str, Any]) -> str:
    """A digest of everything records depend on, given as JSON-able values."""
    canonical = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of tensors on the CPU and their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path, num_blocks: int = 16, block_bytes: int = 1 << 16) -> str:
    """A cheap content digest of a weight file: its size, its head and evenly spaced blocks of it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for position in range(num_blocks):
            file.seek(size * position // num_blocks)
            digest.update(file.read(block_bytes))
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """A cheap digest of a model component: its config and weight files."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".model", ".txt"))
    return hashlib.sha256("".join(f"{p.name}:{file_digest(p)}" for p in files).encode()).hexdigest()


class ResidualStore:
    """Records of one run, in shards that are complete or absent.

    Args:
        directory: The store's folder; made if absent.
        description: What the records depend on, for the manifest and its fingerprint.
        overwrite: Drop records made for something else instead of refusing the folder.

    Raises:
        ValueError: if the folder holds records of something else, or is not a store.
    """

    def __init__(self, directory: Path, description: Mapping[str, Any], overwrite: bool = False) -> None:
        self.directory = directory
        self.fingerprint = self._run_fingerprint = fingerprint(description)
        self._records: dict[str, tuple[Path, list[str]]] = {}
        self._open_files: dict[Path, Any] = {}
        self.records_written = 0
        self.bytes_written = 0
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"--residual_dir {directory} is a file; name a folder.")
        directory.mkdir(parents=True, exist_ok=True)
        manifest = directory / "manifest.json"
        found = _read_manifest(manifest)
        if found is not None:
            if found["fingerprint"] != self.fingerprint:
                if not overwrite:
                    differing = sorted(
                        key for key in description if found["description"].get(key) != _plain(description[key])
                    )
                    raise ValueError(
                        f"--residual_dir {directory} holds records of another run (it differs in "
                        f"{', '.join(differing) or 'its format'}); use another folder or --overwrite_residuals."
                    )
                for path in self._own_files(".safetensors"):
                    path.unlink()
        elif any(directory.iterdir()):
            raise ValueError(f"--residual_dir {directory} is neither empty nor a residual store; use another folder.")
        write_json(
            manifest,
            {"schema": SCHEMA, "fingerprint": self.fingerprint, "description": _plain(dict(description))},
        )
        self._scan()

    def begin_stretch(self, lora: str) -> None:
        """Go on with records that depend on the LoRA as well; those made with another one are dropped.

        Args:
            lora: Digest of the LoRA that the stretch's residuals are computed with.
        """
        self.fingerprint = fingerprint({"run": self._run_fingerprint, "lora": lora})
        self._records, self._open_files = {}, {}
        for path in self._own_files(".safetensors"):
            if _shard_fingerprint(path) != self.fingerprint:
                path.unlink(missing_ok=True)
        self._scan()

    def __getstate__(self) -> dict[str, Any]:
        # Data-loading workers that are started anew open the shards themselves.
        return {**self.__dict__, "_open_files": {}}

    def _own_files(self, suffix: str) -> list[Path]:
        """Shards, or what killed writes left of them, by the names that :meth:`write` gives."""
        return sorted(path for path in self.directory.glob(f"records-*{suffix}") if _OWN_NAME.fullmatch(path.stem))

    def _scan(self) -> None:
        for path in self._own_files(".safetensors"):
            try:
                with safe_open(str(path), framework="pt") as file:
                    if (file.metadata() or {}).get("fingerprint") == self.fingerprint:
                        self._index(path, list(file.keys()))
            except SafetensorError:
                # A shard that a full disk or a crash cut short holds no record; its samples are computed again.
                path.unlink()

    def _index(self, path: Path, keys: Iterable[str]) -> None:
        for key in keys:
            sample_id, _, name = key.partition("/")
            self._records.setdefault(sample_id, (path, []))[1].append(name)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk now."""
        return sum(path.stat().st_size for path in {path for path, _ in self._records.values()})

    def write(self, records: Mapping[str, Record]) -> None:
        """Add records as one shard: written under a temporary name, synced, renamed."""
        path = self.directory / f"records-{uuid.uuid4().hex}.safetensors"
        temporary = path.with_suffix(".tmp")
        tensors = {
            f"{sample_id}/{name}": t.contiguous() for sample_id, rec in records.items() for name, t in rec.items()
        }
        try:
            save_file(tensors, str(temporary), metadata={"fingerprint": self.fingerprint})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._index(path, tensors)
        self.records_written += len(records)
        self.bytes_written += path.stat().st_size

    def read(self, sample_id: str) -> Record:
        """The record of a sample, memory-mapped.

        Raises:
            KeyError: if the store does not have it.
        """
        path, names = self._records[sample_id]
        file = self._open_files.get(path)
        if file is None:
            file = self._open_files[path] = safe_open(str(path), framework="pt").__enter__()
        return {name: file.get_tensor(f"{sample_id}/{name}") for name in names}

    def drop(self, sample_ids: Iterable[str] | None = None) -> None:
        """Delete the shards that hold the given records, or all; nothing else in the folder is touched."""
        ids = set(self._records if sample_ids is None else sample_ids)
        for path in {path for sample_id, (path, _) in self._records.items() if sample_id in ids}:
            self._open_files.pop(path, None)
            path.unlink(missing_ok=True)
        self._records = {i: record for i, record in self._records.items() if record[0].exists()}

    def drop_others(self, sample_ids: Iterable[str]) -> None:
        """Delete the shards that hold none of the given records."""
        wanted = {self._records[sample_id][0] for sample_id in sample_ids if sample_id in self._records}
        self.drop([sample_id for sample_id, (path, _) in self._records.items() if path not in wanted])

    def remove(self) -> None:
        """Delete the whole store, and its folder if nothing else is in it."""
        self.drop()
        for path in self._own_files(".tmp"):
            path.unlink(missing_ok=True)
        (self.directory / "manifest.json").unlink(missing_ok=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """A store's manifest; ``None`` where there is no file, or one that is no store's."""
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("description"), dict):
        return None
    return manifest if "fingerprint" in manifest else None


def _shard_fingerprint(path: Path) -> str | None:
    """What a shard's records depend on; ``None`` if it cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint")
    except (SafetensorError, FileNotFoundError):
        return None


def _plain(value: Any) -> Any:
    """``value`` as it reads back from JSON."""
    return json.loads(json.dumps(value, default=str))
