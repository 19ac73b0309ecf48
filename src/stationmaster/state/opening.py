"""How the state file is opened: locked, examined, moved aside when it is damaged, brought up to date.

Rules:
1. WAL and `synchronous=FULL`: what a job committed survives the process and the power.
2. A damaged file is never used, mended, overwritten or deleted: it is moved aside whole, with its log, and a new one
   begun. A file of a newer version, or of another program, is not touched at all.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from stationmaster.errors import ConfigError
from stationmaster.events import StateMovedAside
from stationmaster.state import schema
from stationmaster.state.database import Database, is_damage, primary_code, store_errors, with_room
from stationmaster.state.lock import forbidden, locked
from stationmaster.state.reserve import Reserve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.abc import Observer

_CLOSE_S: Final = 10.0
_BUSY_S: Final = 5.0
"""How long another process's write is waited for; those of the command line take milliseconds."""
_WAL_KEPT_BYTES: Final = 4 * 1024 * 1024
"""What the write-ahead log keeps of the disk between two checkpoints: on a full disk this is what deletes live on."""
_SIDES: Final = ("-wal", "-shm")
_MAGIC: Final = b"SQLite format 3\0"

_FORBIDDEN: Final = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}


@asynccontextmanager
async def open_database(path: Path, *, observer: Observer) -> AsyncIterator[Database]:
    """Open the state file for this process alone (the command line may look on), or make a new one.

    Raises:
        ConfigError: the folder is missing, permissions are, another service uses it, or a newer version wrote it.
        StoreError: the disk is full or fails.

    Opening reads the whole file once, to see that it is sound.
    """
    with locked(path):
        reserve = Reserve(Path(f"{path}.reserve"))
        connection, moved = await trio.to_thread.run_sync(_open, path, reserve)
        database = Database(path, connection, reserve)
        try:
            if moved is not None:
                observer.observe(moved)
            yield database
        finally:
            with trio.move_on_after(_CLOSE_S, shield=True):
                await database.close()


def _open(path: Path, reserve: Reserve) -> tuple[sqlite3.Connection, StateMovedAside | None]:
    """Return a connection to a sound file of this version, and what had to be moved aside for it."""
    with store_errors(path):
        try:
            if path.exists() and not path.is_file():
                raise ConfigError([f"outbox.path: {path} is not a file; name another"])
            damage = with_room(reserve, partial(_damage, path))
            if damage is not None and not reserve.exists and not _begins_like_sqlite(path):
                # Never opened by us, and not even a database: a wrong path is likelier than damage.
                raise ConfigError([f"outbox.path: {path} is no state file; name another"])
            moved = None if damage is None else _move_aside(path, damage)
            connection = with_room(reserve, partial(_connect, path))
        except PermissionError as error:
            raise forbidden(path, error) from error
        except sqlite3.Error as error:
            if primary_code(error) in _FORBIDDEN:
                raise forbidden(path, error) from error
            raise
        reserve.set_aside()
    return connection, moved


def _damage(path: Path) -> str | None:
    """Examine a file that is there, without changing a byte of it; return what is wrong, None for nothing.

    Read-only: a connection that may write would carry the log over into the damaged file when it is closed.
    """
    if not path.exists():
        left = Path(f"{path}-wal")
        # A crash in the middle of moving aside; SQLite would delete a log without its file.
        return "its log is there without it" if left.exists() else None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as found:
            found.execute(f"PRAGMA busy_timeout = {_BUSY_S * 1000:.0f}")
            (word,) = found.execute("PRAGMA quick_check(1)").fetchone()
            if word == "ok" and schema.read_version(found) == schema.VERSION:
                schema.read_texts(found)
    except sqlite3.Error as error:
        if is_damage(error):
            return str(error)
        raise
    return None if word == "ok" else str(word)


def _begins_like_sqlite(path: Path) -> bool:
    if not path.exists():
        return True  # its log lies there without it
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _move_aside(path: Path, reason: str) -> StateMovedAside:
    aside = f"{path}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    for side in ("", *_SIDES):  # the log last: see `_damage`
        if os.path.lexists(f"{path}{side}"):
            os.rename(f"{path}{side}", f"{aside}{side}")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return StateMovedAside(path=str(path), moved_to=aside, reason=reason)


def _connect(path: Path) -> sqlite3.Connection:
    # Several threads, one after the other: the limiter of one sees to it.
    connection = sqlite3.connect(
        path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        _check_owner(path, connection)
        # Bodies and messages are nobody else's business; its log takes the mode after it.
        path.chmod(0o600)
        # Of a new file; see `Database`: what it does not need goes back to a full disk.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")
        schema.migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_owner(path: Path, connection: sqlite3.Connection) -> None:
    version = schema.read_version(connection)
    if version > schema.VERSION:
        fault = (
            f"outbox.path: {path} was written by a newer stationmaster (state version {version}, this one knows "
            f"{schema.VERSION}); update this one, or give it a file of its own"
        )
        raise ConfigError([fault])
    if version == 0 and connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
        fault = f"outbox.path: {path} is a database of another program; name another file"
        raise ConfigError([fault])
