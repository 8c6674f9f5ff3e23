"""Records on disk: what precompute leaves for training.

Each sample has a record. Modulation has records of its own, which samples of one prompt and timestep share, and so has
text that no block has brought together with the image, which samples of one prompt share.

A store is a folder with a manifest and safetensors shards. Records are found by id and only under the fingerprint of
everything they depend on; a store of another run is an error, never a silent reuse.

Every record has a checksum, which is compared whenever the record is read: records that were found on disk are read
once before their stretch begins, and all are in training, where a disk may still go bad. A record that fails is
forgotten with its shard, which is what one forward wrote, and made again by the same forward; on a CPU to the same
bits.

Several processes may use one folder. Shards have names of their own and never change; a shard that another process
deleted is as good as a damaged one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..utils.digests import fingerprint
from ..utils.errors import UserError
from ..utils.files import save_tensors, write_json


Record = dict[str, torch.Tensor]
"""One sample's tensors by name, without a batch dimension."""

SCHEMA = 1
STALE_SECONDS = 3600
"""Age at which a temporary file is what a killed write left: no shard takes so long."""
_OWN_NAME = re.compile(r"records-[0-9a-f]{32}")


class DamagedRecord(Exception):
    """A record that cannot be trusted: changed, cut short or gone since it was written."""


def checksum(record: Record) -> int:
    """CRC-32 of a record's tensors, in the order of their names."""
    value = 0
    for name in sorted(record):
        data = record[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        value = zlib.crc32(data, zlib.crc32(f"{name} {record[name].dtype}".encode(), value))
    return value


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of tensors on the CPU and their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_store_folder(directory: Path) -> None:
    """Check that a folder is a store, or can become one.

    Raises:
        UserError: if it is a file, or holds others' files.
    """
    # Listed before the manifest is read: another process may be writing it, and shards after it.
    foreign = directory.exists() and (
        not directory.is_dir() or any(not _OWN_NAME.fullmatch(path.stem) for path in directory.iterdir())
    )
    if foreign and _read_manifest(directory / "manifest.json") is None:
        raise UserError(
            f"The records' folder {directory} is neither empty nor a residual store; give another --residual_dir, or "
            "another --output_dir without it."
        )


class ResidualStore:
    """Records of one run, in shards that are complete or absent.

    Args:
        directory: The store's folder; made if absent.
        description: What the records depend on, for the manifest and its fingerprint.
        overwrite: Drop records made for something else instead of refusing the folder.

    Raises:
        UserError: if the folder holds records of something else, or is not a store.
    """

    def __init__(self, directory: Path, description: Mapping[str, Any], overwrite: bool = False) -> None:
        self.directory = directory
        self.fingerprint = self._run_fingerprint = fingerprint(description)
        self._records: dict[str, tuple[Path, list[str], int]] = {}
        self._shards: dict[Path, int] = {}
        self._written: set[Path] = set()
        self._open_files: dict[Path, Any] = {}
        self.bytes_written = 0
        check_store_folder(directory)
        directory.mkdir(parents=True, exist_ok=True)
        manifest = directory / "manifest.json"
        found = _read_manifest(manifest)
        if found is not None and found["fingerprint"] != self.fingerprint:
            if not overwrite:
                differing = sorted(
                    key for key in description if found["description"].get(key) != _plain(description[key])
                )
                raise UserError(
                    f"--residual_dir {directory} holds records of another run (it differs in "
                    f"{', '.join(differing) or 'its format'}); use another folder or --overwrite_residuals."
                )
            for path in self._own_files(".safetensors"):
                path.unlink(missing_ok=True)
        if found is None or found["fingerprint"] != self.fingerprint:
            write_json(
                manifest,
                {"schema": SCHEMA, "fingerprint": self.fingerprint, "description": _plain(dict(description))},
                temporary=self._new_file(".tmp"),
            )
        self._scan()

    def begin_stretch(self, lora: str) -> None:
        """Go on with records that depend on the LoRA as well; those made with another one are dropped.

        Args:
            lora: Digest of the LoRA that the stretch's residuals are computed with.
        """
        self.fingerprint = fingerprint({"run": self._run_fingerprint, "lora": lora})
        self._records, self._shards, self._open_files = {}, {}, {}
        self._scan(drops_others=True)

    def __getstate__(self) -> dict[str, Any]:
        # Data-loading workers that are started anew open the shards themselves.
        return {**self.__dict__, "_open_files": {}}

    def _own_files(self, suffix: str) -> list[Path]:
        """Shards, or what killed writes left of them, by the names that :meth:`write` gives."""
        return sorted(path for path in self.directory.glob(f"records-*{suffix}") if _OWN_NAME.fullmatch(path.stem))

    def _new_file(self, suffix: str) -> Path:
        return self.directory / f"records-{uuid.uuid4().hex}{suffix}"

    def _scan(self, *, drops_others: bool = False) -> None:
        """Find the records that are there, and delete what is none of them any more."""
        for path in self._own_files(".tmp"):
            try:
                stale = time.time() - path.stat().st_mtime > STALE_SECONDS
            except FileNotFoundError:
                continue
            if stale:
                path.unlink(missing_ok=True)
        for path in self._own_files(".safetensors"):
            try:
                with _open(path) as file:
                    metadata = file.metadata() or {}
                    is_wanted = metadata.get("fingerprint") == self.fingerprint
                    if is_wanted:
                        self._index(path, list(file.keys()), json.loads(metadata["checksums"]))
            except FileNotFoundError:
                continue  # Another process dropped it.
            except (SafetensorError, KeyError, ValueError):
                # A shard that a full disk or a crash cut short holds no record; its samples are computed again.
                path.unlink(missing_ok=True)
            else:
                if drops_others and not is_wanted:
                    path.unlink(missing_ok=True)

    def _index(self, path: Path, keys: Iterable[str], checksums: Mapping[str, int]) -> None:
        names: dict[str, list[str]] = {}
        for key in keys:
            sample_id, _, name = key.partition("/")
            names.setdefault(sample_id, []).append(name)
        found = {sample_id: (path, tensors, checksums[sample_id]) for sample_id, tensors in names.items()}
        self._shards[path] = path.stat().st_size
        # Two processes may have made the same record; either will do.
        self._records = {**found, **self._records}

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards that are in use."""
        return sum(self._shards.values())

    def write(self, records: Mapping[str, Record]) -> None:
        """Add records as one shard: written under a temporary name, synced, renamed.

        Raises:
            OSError: if it cannot be written; nothing of it is left then.
        """
        path = self._new_file(".safetensors")
        tensors = {
            f"{sample_id}/{name}": t.contiguous() for sample_id, rec in records.items() for name, t in rec.items()
        }
        checksums = {sample_id: checksum(record) for sample_id, record in records.items()}
        metadata = {"fingerprint": self.fingerprint, "checksums": json.dumps(checksums)}
        save_tensors(tensors, path, metadata, temporary=path.with_suffix(".tmp"))
        self._index(path, tensors, checksums)
        self._written.add(path)
        self.bytes_written += self._shards[path]

    def read(self, sample_id: str) -> Record:
        """The record of a sample, memory-mapped, its checksum compared.

        Raises:
            KeyError: if the store does not have it.
            DamagedRecord: if it is not what was written; the message names the file.
        """
        path, names, expected = self._records[sample_id]
        try:
            # Reading a mapping behind the end of its file would end the process.
            if path.stat().st_size != self._shards[path]:
                raise DamagedRecord(f"{path} has another size than when it was written")
            file = self._open_files.get(path)
            if file is None:
                file = self._open_files[path] = _open(path)
            record = {name: file.get_tensor(f"{sample_id}/{name}") for name in names}
        except (OSError, SafetensorError, KeyError) as error:
            raise DamagedRecord(f"{path} cannot be read ({error})") from error
        if checksum(record) != expected:
            raise DamagedRecord(f"{path} holds a record of {sample_id} with a wrong checksum")
        return record

    def verify(self, sample_ids: Iterable[str]) -> list[str]:
        """Read those of the records that were found on disk, and :meth:`forget` the shards of bad ones.

        Returns:
            What was wrong, one line per shard.
        """
        problems: list[str] = []
        for sample_id in sample_ids:
            if sample_id in self._records and self._records[sample_id][0] not in self._written:
                try:
                    self.read(sample_id)
                except DamagedRecord as error:
                    problems.append(str(error))
                    self.forget(sample_id)
        return problems

    def forget(self, sample_id: str) -> None:
        """Delete the shard of a damaged record: all of it came out of one forward, which will be done again."""
        if sample_id in self._records:
            self._delete({self._records[sample_id][0]})

    def drop(self) -> None:
        """Delete the shards that are in use; nothing else in the folder is touched."""
        self._delete(set(self._shards))

    def drop_others(self, sample_ids: Iterable[str]) -> None:
        """Delete the shards that hold none of the given records."""
        wanted = {self._records[sample_id][0] for sample_id in sample_ids if sample_id in self._records}
        self._delete(set(self._shards) - wanted)

    def _delete(self, shards: set[Path]) -> None:
        self._records = {key: record for key, record in self._records.items() if record[0] not in shards}
        for path in shards:
            self._open_files.pop(path, None)
            self._shards.pop(path, None)
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the whole store, what other processes wrote included, and its folder if nothing else is in it."""
        self.drop()
        for path in (*self._own_files(".safetensors"), *self._own_files(".tmp")):
            path.unlink(missing_ok=True)
        (self.directory / "manifest.json").unlink(missing_ok=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()


def _open(path: Path) -> Any:
    """A shard, memory-mapped.

    Raises:
        FileNotFoundError: if it is not there, or another process drops it meanwhile.
    """
    try:
        return safe_open(str(path), framework="pt")
    except RuntimeError as error:
        # torch's own words for a file that safetensors still saw.
        if path.exists():
            raise
        raise FileNotFoundError(errno.ENOENT, "another process dropped it", str(path)) from error


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """A store's manifest; ``None`` where there is no file, or one that is no store's."""
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("description"), dict):
        return None
    return manifest if "fingerprint" in manifest else None


def recorded_seed(directory: Path) -> int | None:
    """The seed of the sample plan that a folder's records follow, if it is a store."""
    found = _read_manifest(directory / "manifest.json")
    seed = str((found or {}).get("description", {}).get("samples", {}).get("seed"))
    return int(seed) if seed.isdecimal() else None


def _plain(value: Any) -> Any:
    """``value`` as it reads back from JSON."""
    return json.loads(json.dumps(value, default=str))
