"""One service per state file: a lock that the kernel frees when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from stationmaster.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HANDLES: Final = 4
"""File, log, the log's index, and one that SQLite uses in passing."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `<path>.lock`, with this process's id in it. Blocks for half a second at most.

    Raises:
        ConfigError: another one holds it, the folder is missing, or permissions are.
        StoreError: the disk is full or fails.
    """
    if not path.parent.is_dir():
        raise ConfigError(
            [f"outbox.path: the folder {path.parent} does not exist; make it, or name another"]
        )
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    # It is never removed: a third process could lock a new file of this name while a second one holds the old.
    try:
        _take(path, descriptor)
        yield
    finally:
        os.close(descriptor)


def forbidden(path: Path, error: Exception) -> ConfigError:
    """Return what an operator can act on."""
    if getattr(error, "errno", None) not in {errno.EACCES, errno.EPERM} and _out_of_handles():
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        fault = (
            f"outbox.path: {path} cannot be opened: this process may have {limit} files open, and nearly has; "
            "raise LimitNOFILE (ulimit -n)"
        )
        return ConfigError([fault])
    fault = (
        f"outbox.path: {path} cannot be opened for writing ({error}); "
        "this user needs write permission on it and on its folder"
    )
    return ConfigError([fault])


def _out_of_handles() -> bool:
    """Tell whether there are fewer than a database needs: SQLite itself does not say why it cannot open a file."""
    with ExitStack() as stack:
        try:
            for _ in range(_HANDLES):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            return error.errno == errno.EMFILE
    return False


def _take(path: Path, descriptor: int) -> None:
    if not _lock(descriptor):
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "?"
        fault = (
            f"outbox.path: {path} is in use by process {holder}; "
            "give every instance a file of its own"
        )
        raise ConfigError([fault])
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise _unusable(path, error) from error


def _lock(descriptor: int) -> bool:
    """Take the lock; more than one try, because whoever asks whether a service runs shares it for an instant."""
    for pause_s in (*(0.05,) * 10, 0.0):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(pause_s)
        else:
            return True
    return False


def _unusable(path: Path, error: OSError) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StoreError(f"{path}: the disk is full. Make room on it", kind="disk-full")
    if error.errno == errno.EIO:
        return StoreError(f"{path}: {error}. Check the disk", kind="disk-error")
    return forbidden(path, error)
