"""Disk space set aside, so that rows can leave a full disk.

SQLite needs room even to delete: for its log, and to carry the log over into the file. A disk that the outbox itself
has filled would keep it full for ever. So a file of zeros lies beside the state file: it is given up when a deletion
meets a full disk, and nothing is added until it is back.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from pathlib import Path

RESERVE_BYTES: Final = 8 * 1024 * 1024
"""About twice of what SQLite's log holds between two checkpoints."""


@attrs.define(eq=False)
class Reserve:
    """The file of zeros; it may be whole or given up."""

    _path: Path
    is_whole: bool = attrs.field(default=False, init=False)

    @property
    def exists(self) -> bool:
        """Whether the file is there, whole or given up: then the state file was opened before."""
        return self._path.exists()

    def set_aside(self) -> bool:
        """Set the space aside, and tell whether it could be.

        Raises:
            OSError: the disk fails otherwise than by being full.
        """
        if not self.is_whole:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
                self.is_whole = True
            except OSError as error:
                os.ftruncate(descriptor, 0)  # not half
                if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
            finally:
                os.close(descriptor)
        return self.is_whole

    def give_up(self) -> None:
        """Let the disk have it."""
        self.is_whole = False
        with suppress(FileNotFoundError):
            os.truncate(self._path, 0)
