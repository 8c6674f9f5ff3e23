"""Checkpoints: complete or absent, without pickle, and enough to continue bit for bit on a CPU.

Training draws everything from the sample plan, so a checkpoint needs no random state: the LoRA, the optimiser and a
few numbers are all.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..utils.errors import UserError
from ..utils.files import save_tensors, set_aside, sync, write_json


logger = logging.getLogger(__name__)

SCHEMA = 1
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "training_state.json"
STRETCH_NAME = "stretch.safetensors"
"""The LoRA as it was when the stretch began, for runs whose residuals follow it."""
_BY_FLAGS = (
    *("initial_lr", "betas", "weight_decay", "eps"),
    *("beta3", "decouple", "use_bias_correction", "safeguard_warmup"),
)
"""What flags say of a parameter group; optimisers keep more there."""
_PATTERN = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first; other names beside them do not matter."""
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := _PATTERN.fullmatch(path.name)) and (path / STATE_NAME).is_file()
    }
    return [found[step] for step in sorted(found)]


def summary(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, to tell runs apart by; empty where it cannot be read."""
    try:
        state = read_state(checkpoint)
    except UserError:
        return {}
    return state if isinstance(state, dict) else {}


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means, or ``None`` to start anew.

    Raises:
        UserError: if a named checkpoint is not a complete one.
    """
    if resume_from is None:
        return None
    if resume_from == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            logger.warning("--resume_from_checkpoint latest: no checkpoint in %s, starting anew.", output_dir)
        return checkpoints[-1] if checkpoints else None
    for path in (output_dir / resume_from, Path(resume_from)):
        if (path / STATE_NAME).is_file():
            return path
    raise UserError(f"--resume_from_checkpoint {resume_from} holds no {STATE_NAME}; name a complete checkpoint.")


def begin_checkpoint(output_dir: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; :func:`commit_checkpoint` gives it its name."""
    clear_unfinished(output_dir)
    folder = output_dir / f"checkpoint-{step}.tmp"
    folder.mkdir(parents=True)
    return folder


@contextmanager
def new_checkpoint(output_dir: Path, step: int, total_limit: int | None) -> Iterator[Path]:
    """A folder to write a checkpoint into: committed after the body, gone if the body fails."""
    folder = begin_checkpoint(output_dir, step)
    try:
        yield folder
        commit_checkpoint(folder, total_limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_unfinished(output_dir: Path) -> None:
    """Delete what killed runs left of checkpoints that they were writing or deleting."""
    for left in output_dir.glob("checkpoint-*.tmp"):
        if _PATTERN.fullmatch(left.name.removesuffix(".tmp").removesuffix(".old")):
            shutil.rmtree(left)


def commit_checkpoint(folder: Path, total_limit: int | None) -> Path:
    """Give a written checkpoint its name, then drop the oldest ones of the same run above the limit.

    One of that name that another run left gets a name that does not count.
    """
    final, run = folder.with_suffix(""), summary(folder).get("run")
    sync(folder)
    if final.exists():
        if summary(final).get("run") == run:
            _remove(final)
        else:
            set_aside(final)
    folder.rename(final)
    sync(final.parent)
    if total_limit is not None:
        found = (path for path in list_checkpoints(final.parent) if path != final)
        others = [path for path in found if summary(path).get("run") == run]
        for old in others[: max(len(others) + 1 - total_limit, 0)]:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a half deleted one is none."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def save_training_state(folder: Path, optimizer: Any, scheduler: Any, **numbers: Any) -> None:
    """Write optimiser tensors as safetensors and everything else as JSON.

    Args:
        folder: The checkpoint's folder.
        optimizer: Any torch optimiser.
        scheduler: The LR scheduler.
        **numbers: Further JSON-able values, among them ``step``.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{name}"] = value.detach().cpu().clone().contiguous()
            elif isinstance(value, dict):
                # bitsandbytes' 8-bit state is a dictionary of tensors.
                for part, tensor in value.items():
                    tensors[f"{index}/{name}/{part}"] = tensor.detach().cpu().clone().contiguous()
            else:
                scalars.setdefault(str(index), {})[name] = value
    save_tensors(tensors, folder / OPTIMIZER_NAME)
    groups = [{name: _plain(value) for name, value in group.items()} for group in state["param_groups"]]
    write_json(
        folder / STATE_NAME,
        {
            "schema": SCHEMA,
            **numbers,
            "optimizer": {"scalars": scalars, "param_groups": groups},
            "scheduler": {name: _plain(value) for name, value in scheduler.state_dict().items()},
        },
    )


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--resume_from_checkpoint {folder} cannot be read ({error}); name another one.") from error


def load_training_state(folder: Path, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Restore what :func:`save_training_state` wrote and return the JSON part.

    Raises:
        UserError: if the checkpoint belongs to another optimiser or set of parameters.
    """
    state = read_state(folder)
    try:
        tensors = load_file(str(folder / OPTIMIZER_NAME))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--resume_from_checkpoint {folder} cannot be read ({error}); name another one.") from error
    saved = state["optimizer"]
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in saved["scalars"].items()}
    for key, tensor in tensors.items():
        index, name, *part = key.split("/")
        entry = entries.setdefault(int(index), {})
        if part:
            entry.setdefault(name, {})[part[0]] = tensor
        else:
            entry[name] = tensor
    current = optimizer.state_dict()["param_groups"]
    same = [len(g["params"]) for g in saved["param_groups"]] == [len(g["params"]) for g in current] and all(
        # Prodigy adds entries to its groups as it goes.
        new.keys() <= old.keys()
        for old, new in zip(saved["param_groups"], current)
    )
    if not same:
        raise UserError(
            f"--resume_from_checkpoint {folder} was made with another optimizer or other LoRA layers; use the "
            "settings it was made with."
        )
    groups = [
        {name: _restore(value, new.get(name)) for name, value in old.items()}
        for old, new in zip(saved["param_groups"], current)
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
    scheduler.load_state_dict(state["scheduler"])
    return state


def use_settings(optimizer: Any, wanted: Sequence[Mapping[str, Any]], scheduler: Any) -> None:
    """Let flags decide what they decide in a run that begins, whatever the loaded state says.

    Args:
        optimizer: Its state loaded.
        wanted: Its parameter groups as the flags made them, before anything was loaded.
        scheduler: A torch ``LambdaLR``, its state loaded; its learning rate becomes that of its step by the flags.
    """
    for number, (group, new) in enumerate(zip(optimizer.param_groups, wanted, strict=True)):
        group.update({name: new[name] for name in _BY_FLAGS if name in new})
        scheduler.base_lrs[number] = new["initial_lr"]
        group["lr"] = new["initial_lr"] * scheduler.lr_lambdas[number](scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def load_stretch(folder: Path, parameters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read the LoRA of the checkpoint's stretch, by the number of the parameter.

    Raises:
        UserError: if it is not there, or of other parameters.
    """
    try:
        tensors = load_file(str(folder / STRETCH_NAME))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--resume_from_checkpoint {folder} holds no {STRETCH_NAME} that can be read ({error}); if it was made "
            "without refreshed residuals, add --no-refresh_residuals."
        ) from error
    if {name: t.shape for name, t in tensors.items()} != {str(i): p.shape for i, p in enumerate(parameters)}:
        raise UserError(
            f"--resume_from_checkpoint {folder}: {STRETCH_NAME} is of other LoRA layers; name another one."
        )
    return tensors


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; JSON has no infinity, which Prodigy's growth rate is."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restore(value: Any, like: Any) -> Any:
    """A value from JSON in the type that the optimiser holds."""
    if isinstance(like, tuple):
        return tuple(value)
    return float(value) if isinstance(like, float) else value
