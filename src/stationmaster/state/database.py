"""The open state file: one thread at a time works on it, and what the disk does is told as `StoreError`.

Rules:
1. All work is done in worker threads behind a limiter of one, never abandoned: a job's outcome is always known.
2. Other processes (the command line) may write as well: `PRAGMA data_version` tells, and the tables read anew what
   they remember. So it is after an error of the disk: the file is asked, not memory.
3. A full disk must not keep rows from leaving: see `stationmaster.state.reserve`.
4. Nothing is added to a file that was removed or replaced under its name: nobody would find it there.
5. Damage that is met while running is a `StoreError` until the next start (see `stationmaster.state.opening`): rows
   that can still be read go on being delivered.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import attrs
import trio

from stationmaster.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stationmaster.state.reserve import Reserve

ResultT = TypeVar("ResultT")

_SHRINK: Final = """
    PRAGMA wal_checkpoint(TRUNCATE); PRAGMA incremental_vacuum(8192); PRAGMA wal_checkpoint(TRUNCATE);
"""

_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_NO_SPACE: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
_PASSING: Final = {
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
}


class Table(Protocol):
    """What remembers something of the file."""

    def load(self, connection: sqlite3.Connection) -> None:
        """Read it anew. Called in the thread that works on the file."""
        ...


@attrs.define(eq=False)
class Database:
    """An open state file; made by `stationmaster.state.opening.open_database`.

    Everything but `run` and `take_changes` belongs to the thread that works on the file: there is one at a time.
    """

    path: Path
    _connection: sqlite3.Connection
    _reserve: Reserve
    _identity: tuple[int, int] = attrs.field(init=False)
    _tables: list[Table] = attrs.field(factory=list, init=False)
    _limiter: trio.CapacityLimiter = attrs.field(
        factory=lambda: trio.CapacityLimiter(1), init=False
    )
    _seen: int | None = attrs.field(default=None, init=False)
    """The `data_version` that the tables have read."""
    _changes: int = attrs.field(default=0, init=False)
    _taken_changes: int = attrs.field(default=0, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        """Remember which file it is."""
        self._identity = self._look()

    async def add(self, table: Table) -> None:
        """Let a table remember, from now on."""
        self._tables.append(table)
        await self.run(table.load)

    async def run(
        self, job: Callable[[sqlite3.Connection], ResultT], *, adds: bool = False
    ) -> ResultT:
        """Do a job in a worker thread; the tables are up to date when it begins.

        It may be done a second time, after a first that met a full disk and was undone; before that, one that `adds`
        to the file lets the log give back what it does not need, any other takes the reserve.
        Once it began, cancellation waits for its end and this returns.

        Raises:
            StoreError: the disk is full or fails; what the job had not committed is undone.
            trio.ClosedResourceError: the file is closed.
        """
        return await trio.to_thread.run_sync(self._do, job, adds, limiter=self._limiter)

    def take_changes(self) -> bool:
        """Tell whether another process wrote since this was asked last (as far as a job has noticed)."""
        seen, self._taken_changes = self._taken_changes, self._changes
        return seen != self._taken_changes

    async def close(self) -> None:
        """Close the file after the job at hand; further jobs raise."""
        await trio.to_thread.run_sync(self._close, limiter=self._limiter)

    def _do(self, job: Callable[[sqlite3.Connection], ResultT], adds: bool) -> ResultT:
        if self._closed:
            raise trio.ClosedResourceError
        with store_errors(self.path):
            if not adds:
                return with_room(self._reserve, partial(self._attempt, job))
            if self._look() != self._identity:
                raise StoreError(
                    f"{self.path} was removed or replaced while it was in use: what is written to it would be lost. "
                    "Restart the service",
                    kind="disk-error",
                )
            if not self._reserve.set_aside():
                self._shrink()
            try:
                return self._attempt(job)
            except sqlite3.Error as error:
                if not _is_full(error):
                    raise
            # The log may hold many times what it has brought; without this every few rows would find the disk full.
            with_room(self._reserve, self._shrink)
            return self._attempt(job)

    def _attempt(self, job: Callable[[sqlite3.Connection], ResultT]) -> ResultT:
        try:
            self._catch_up()
            return job(self._connection)
        except sqlite3.Error as error:
            if primary_code(error) == sqlite3.SQLITE_IOERR:  # a commit may have come through
                self._seen = None
            raise

    def _look(self) -> tuple[int, int]:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return 0, 0
        return found.st_dev, found.st_ino

    def _shrink(self) -> None:
        """Give the disk what the file does not need any more, and set the reserve aside from that."""
        # As a script: `execute` would stop after one page.
        self._connection.executescript(_SHRINK)
        if not self._reserve.set_aside():
            raise full_disk(self.path)

    def _catch_up(self) -> None:
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version == self._seen:
            return
        # Asked before reading: a write in between is noticed by the next job.
        for table in self._tables:
            table.load(self._connection)
        if self._seen is not None:
            self._changes += 1
        self._seen = version

    def _close(self) -> None:
        self._closed = True
        self._connection.close()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write everything in the block, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors have already undone it
            connection.execute("ROLLBACK")
        raise


def with_room(reserve: Reserve, job: Callable[[], ResultT]) -> ResultT:
    """Do a job; if the disk is full, give up the reserve and do it again."""
    try:
        return job()
    except sqlite3.Error as error:
        if not _is_full(error):
            raise
    reserve.give_up()
    return job()


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn what the disk does into errors that a caller can act on; errors of our own SQL stay what they are.

    Raises:
        StoreError: the disk is full or fails, or another process holds the file for too long.
    """
    try:
        yield
    except sqlite3.Error as error:
        code = primary_code(error)
        if _is_full(error):
            raise full_disk(path) from error
        if is_damage(error):
            raise StoreError(
                f"{path} is damaged ({error}). Restart the service: it moves the file aside, whole, "
                "and begins a new one",
                kind="disk-error",
            ) from error
        if code in _PASSING:
            raise _broken_disk(path, error) from error
        raise
    except OSError as error:  # of the reserve
        raise _broken_disk(path, error) from error


def full_disk(path: Path) -> StoreError:
    """Return the error of a disk without room."""
    return StoreError(
        f"{path}: the disk is full. Make room on it: 8 MiB besides what is to be kept",
        kind="disk-full",
    )


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's code, without the details; 0 for the Python module's own complaints."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def is_damage(error: sqlite3.Error) -> bool:
    """Tell whether the file holds what it cannot hold; text that is no UTF-8 too, which only Python notices."""
    return primary_code(error) in _DAMAGE or "decode to UTF-8" in str(error)


def _broken_disk(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{path}: {error}. Check the disk, and who else uses the file", kind="disk-error"
    )


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) in _NO_SPACE
