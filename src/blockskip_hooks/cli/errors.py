"""What is said when a run cannot go on: one line for bad input and for the environment; bugs keep their traceback."""

from __future__ import annotations

import errno
import os
import re
import traceback

import torch
from safetensors import SafetensorError

from ..training.stop_signals import is_lost_process
from ..utils.errors import UserError, first_line, one_line
from .flag_names import with_flags


_OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|No executable batch size found",
    re.IGNORECASE,
)
_WORKER_KILLED = re.compile(r"DataLoader worker .* (is killed|exited unexpectedly)")
_COMPILER = "torch._dynamo", "torch._inductor"
_FROM_WORKER = re.compile(r"Caught UserError in DataLoader worker process")


def explain(error: BaseException, stage: str | None = None, secret: str | None = None) -> str | None:
    """One line that tells a person what went wrong, or ``None`` for what only a traceback can tell.

    Lines are told of a :class:`~blockskip_hooks.utils.errors.UserError`, of files and the disk, of memory that ran
    out, of processes that are gone and of compilers. Anything else is taken for a bug.

    Args:
        error: What was raised.
        stage: The stage it was raised in, if any.
        secret: Text that must not be shown, a token say.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and is_lost_process(error):
        line = (
            f"Another process of this run ended or cannot be reached, so process {os.environ.get('RANK', '0')} ends "
            "too; the same command with --resume_from_checkpoint latest goes on from the last checkpoint."
        )
    elif _ran_out_of_memory(error) and stage in ("select", "evaluate"):
        more = ", or give --stream_blocks" if stage == "select" else ""
        line = f"Memory ran out in stage {stage} ({first_line(error)}); lower --images_at_once or --resolution{more}."
    elif _ran_out_of_memory(error):
        line = (
            f"Memory ran out in stage {stage or 'plan'} ({first_line(error)}); give --memory_budget with what "
            "there is, so that blocks are skipped until it fits, or lower --resolution or the batch size."
        )
    elif any(base.__module__.startswith(_COMPILER) for base in type(error).__mro__):
        line = f"The kept blocks cannot be compiled here ({first_line(error)}); leave out --compile."
    elif isinstance(error, RuntimeError) and _WORKER_KILLED.search(text):
        line = f"A process of --dataloader_num_workers was killed ({first_line(error)}); give fewer, or 0."
    elif isinstance(error, OSError) or isinstance(error, SafetensorError) and "IoError" in text:
        line = _of_files(error)
    elif isinstance(error, SafetensorError):
        line = f"A safetensors file cannot be read ({first_line(error)}); make or download it again."
    elif isinstance(error, UserError):
        # Of a worker's error the text ends with its message, behind the name of its type.
        line = re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1]) if _FROM_WORKER.match(text) else text
        line = with_flags(line)
    else:
        return None
    return one_line(line.replace(secret, "***") if secret else line)


def in_full(secret: str | None = None) -> str:
    """The traceback of the error that is being handled, for ``--log_level debug``, without ``secret``."""
    text = traceback.format_exc()
    return text.replace(secret, "***") if secret else text


def _ran_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def _of_files(error: BaseException) -> str:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "StorageFull" in text or "No space left" in text:
        return f"The disk is full ({first_line(error)}); free some of it, or bound records by --residual_budget."
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return text.strip() or type(error).__name__
