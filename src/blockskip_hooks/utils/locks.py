"""A folder that one run at a time works in."""

from __future__ import annotations

import errno
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError


logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"
_HELD_BY_ANOTHER = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


class FolderLock:
    """Within this context, once :meth:`take` was called, no other process can take the same folder.

    The system holds the lock for the process and drops it with the process, however that ends; the empty file that a
    killed one leaves locks nothing. Processes that are forked meanwhile, to load data say, have no part in it: they
    may outlive a killed run for seconds, and would keep a lock that belongs to the open file.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._path is not None:
            # While it is held: what is removed is the file that others would have to lock. Windows keeps open ones.
            with suppress(OSError):
                self._path.unlink()
            self._file.close()
        self._file = None

    def take(self, folder: Path) -> None:
        """Take the folder, which is made if absent.

        Raises:
            UserError: if another process has it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOCK_NAME
        while True:
            file = self._path.open("ab")
            try:
                _lock(file)
            except OSError as error:
                file.close()
                if error.errno in _HELD_BY_ANOTHER:
                    raise UserError(
                        f"--output_dir {folder} is in use by another run; wait until it ends, or name another folder."
                    ) from None
                logger.warning(
                    "%s cannot be locked (%s): see to it that no other run writes to this folder.", self._path, error
                )
                return
            self._file = file
            if _is_at(file, self._path):
                return
            # A run that ended in between has removed what was opened here.
            file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one that is found under a name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO) -> None:
    """Lock an open file for this process, or raise at once."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
