"""The state file as other processes see it: for operators' commands, beside a service that is running.

    with open_state_file(path) as state:
        for row in state.outbox(): ...

Rules:
1. The file is the service's: nothing here creates, migrates or moves it.
2. No transaction outlives a call, and none is open while the caller looks at a row: a reader that stands still holds
   up neither the service's writes nor the end of its write-ahead log.
3. Memory is bounded by a page (`PAGE_ROWS`, `PAGE_BYTES`) or by one row, whichever is more.
4. What is walked over ends with the last row there was when the walk began. What comes meanwhile is not in it: a walk
   ends, though the service goes on writing.

Everything here blocks for up to `BUSY_S` where another process writes.
"""

from __future__ import annotations

import fcntl
import sqlite3
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import attrs
import orjson

from stationmaster.errors import ConfigError, StoreError
from stationmaster.state.bounds import Tally, check_room
from stationmaster.state.rows import Chosen, LetterRow, Move, OutboxRow, Summary
from stationmaster.state.schema import VERSION, read_version

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

BUSY_S: Final = 5.0
"""How long another process's transaction is waited for."""
PAGE_ROWS: Final = 500
PAGE_BYTES: Final = 4 * 1024 * 1024


@attrs.frozen
class StateFile:
    """An open state file; made by `open_state_file`. For one thread.

    Raises (each method and each step of an iteration):
        StoreError: busy for too long, or the disk fails: nothing was changed by this call, try again.
        ConfigError: the file is damaged, or this user lacks permission.
    """

    path: Path
    _connection: sqlite3.Connection

    # ----------------------------------------------------------------------------------------------------- outbox

    def outbox(self) -> Iterator[OutboxRow]:
        """Walk over the outbox, oldest first."""
        last = self._last("outbox")
        columns = (
            "seq, batch_id, topic, ranges, length(body), kept_at, attempts, next_try, last_error"
        )
        query = f"SELECT {columns} FROM outbox WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?"  # noqa: S608
        for page in self._pages(query, (last,)):
            for values in page:
                yield OutboxRow(**dict(zip(_OUTBOX_FIELDS, values, strict=True)))

    def body(self, seq: int) -> bytes:
        """Return the body of an outbox row.

        Raises:
            KeyError: the row is gone: it was delivered meanwhile.
        """
        body: bytes = self._one("SELECT body FROM outbox WHERE seq = ?", seq)
        return body

    def summarize_outbox(self) -> Summary:
        """Return how much the outbox holds."""
        with self._words():
            rows, size, oldest = self._connection.execute(
                "SELECT count(*), coalesce(sum(length(body)), 0), min(kept_at) FROM outbox"
            ).fetchone()
        return Summary(rows=rows, body_bytes=size, oldest=oldest)

    def retry(self, batch_ids: Iterable[str]) -> list[str]:
        """Make these batches due now, each in a transaction; return those that the outbox holds."""
        return [batch_id for batch_id in batch_ids if self._make_due([batch_id])]

    def retry_all(self) -> int:
        """Make every batch due now, a page in a transaction; return how many there are."""
        total = size = 0
        page: list[str] = []
        for row in self.outbox():
            total += 1
            if not row.next_try:
                continue
            page.append(row.batch_id)
            size += row.body_bytes  # another number of digits moves the whole row
            if len(page) >= PAGE_ROWS or size >= PAGE_BYTES:
                self._make_due(page)
                page, size = [], 0
        if page:
            self._make_due(page)
        return total

    def _make_due(self, batch_ids: Sequence[str]) -> int:
        with self._transaction():
            query = "UPDATE outbox SET next_try = 0 WHERE batch_id = ?"
            done = self._connection.executemany(query, [(batch_id,) for batch_id in batch_ids])
            return done.rowcount

    # ----------------------------------------------------------------------------------------------- dead letters

    def letters(self, chosen: Chosen | None = None) -> Iterator[LetterRow]:
        """Walk over dead letters, oldest first."""
        chosen = chosen or Chosen()
        where, values = chosen.where(self._last("dead_letters"))
        columns = (
            'seq, reason, detail, topic, partition, "offset", timestamp_ms, headers, batch_id, first_seen, '
            "coalesce(length(value), 0)"
        )
        query = f"SELECT {columns} FROM dead_letters WHERE seq > ? AND {where} ORDER BY seq LIMIT ?"  # noqa: S608
        for page in self._pages(query, values, after=chosen.since):
            for row in page:
                yield LetterRow(**dict(zip(_LETTER_FIELDS, row, strict=True)))

    def value(self, seq: int) -> bytes | None:
        """Return a dead letter's value; None is a tombstone.

        Raises:
            KeyError: the letter is gone.
        """
        value: bytes | None = self._one("SELECT value FROM dead_letters WHERE seq = ?", seq)
        return value

    def summarize_letters(self, chosen: Chosen | None = None) -> dict[tuple[str, str], Summary]:
        """Return how many dead letters there are: (reason, topic) -> summary."""
        chosen = chosen or Chosen()
        where, values = chosen.where(self._last("dead_letters"))
        query = (
            "SELECT reason, topic, count(*), coalesce(sum(length(value)), 0), min(first_seen) "  # noqa: S608
            f"FROM dead_letters WHERE seq > ? AND {where} GROUP BY reason, topic ORDER BY reason, topic"
        )
        with self._words():
            rows = self._connection.execute(query, (chosen.since, *values)).fetchall()
        return {
            (reason, topic): Summary(rows=count, body_bytes=size, oldest=oldest)
            for reason, topic, count, size, oldest in rows
        }

    def delete_letters(self, seqs: Sequence[int]) -> int:
        """Delete these dead letters, in one transaction; return how many there still were."""
        with self._transaction():
            done = self._connection.executemany(
                "DELETE FROM dead_letters WHERE seq = ?", [(seq,) for seq in seqs]
            )
            return done.rowcount

    def move_to_outbox(self, seq: int, *, max_bytes: int) -> Move:
        """Move a rejected upload into the outbox, due now, in one transaction: it is always in one of both.

        Not while the outbox still holds this batch: the service, which made the letter from that row, is about to
        delete it, and would delete what was moved.

        Args:
            seq: of the dead letter.
            max_bytes: how much the outbox may hold.

        Returns:
            What became of it; a letter that is none of an upload counts as gone.

        Raises:
            StoreError: the outbox has no room for it, or see the class.
        """
        with self._transaction():
            query = "SELECT value, partition, \"offset\", batch_id FROM dead_letters WHERE seq = ? AND batch_id <> ''"
            found = self._connection.execute(query, (seq,)).fetchone()
            if found is None or found[0] is None:
                return Move.GONE
            body, partition, offset, batch_id = found
            query = "SELECT 1 FROM outbox WHERE batch_id = ?"
            if self._connection.execute(query, (batch_id,)).fetchone():
                return Move.HELD
            rows, held = self._connection.execute(
                "SELECT count(*), coalesce(sum(length(body)), 0) FROM outbox"
            ).fetchone()
            tally = Tally(rows=rows, bytes=held)
            check_room("outbox", tally, len(body), max_bytes=max_bytes)
            self._connection.execute(
                "INSERT INTO outbox (batch_id, topic, ranges, body, kept_at, last_error) "
                "SELECT batch_id, topic, ?, value, ?, detail FROM dead_letters WHERE seq = ?",
                (_ranges(body, partition, offset), time.time(), seq),
            )
            self._connection.execute("DELETE FROM dead_letters WHERE seq = ?", (seq,))
            return Move.DONE

    # ------------------------------------------------------------------------------------------------------ steps

    def _last(self, table: str) -> int:
        with self._words():
            query = f"SELECT coalesce(max(seq), 0) FROM {table}"  # noqa: S608 (our own words)
            (last,) = self._connection.execute(query).fetchone()
        return int(last)

    def _one(self, query: str, seq: int) -> Any:  # noqa: ANN401 (the column's type)
        with self._words():
            row = self._connection.execute(query, (seq,)).fetchone()
        if row is None:
            raise KeyError(seq)
        return row[0]

    def _pages(
        self, query: str, values: tuple[object, ...], *, after: int = 0
    ) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the query's rows in pages; its first value is the `seq` to begin after, its last one the limit."""
        while True:
            page: list[tuple[Any, ...]] = []
            size = 0
            with (
                self._words(),
                closing(self._connection.execute(query, (after, *values, PAGE_ROWS))) as rows,
            ):
                for row in rows:
                    page.append(row)
                    size += sum(len(value) for value in row if isinstance(value, str))
                    if size >= PAGE_BYTES:
                        break
            if not page:
                return
            after = page[-1][0]
            yield page

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._words():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _words(self) -> Iterator[None]:
        with _in_our_words(self.path):
            yield


_OUTBOX_FIELDS: Final = tuple(field.name for field in attrs.fields(OutboxRow))
_LETTER_FIELDS: Final = tuple(field.name for field in attrs.fields(LetterRow))


@contextmanager
def open_state_file(path: str | os.PathLike[str], *, writable: bool = False) -> Iterator[StateFile]:
    """Open the state file of a service that may be running, to look at it or to change it as well.

    Raises:
        ConfigError: there is no such file, it is not one of ours, of another version, or this user lacks permission.
        StoreError: busy for too long, or the disk fails.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _wrong(
            path, f"cannot be opened ({error.strerror}); the service makes it when it starts"
        ) from error
    if not path.is_file() or not size:
        raise _wrong(path, "is no state file of stationmaster")
    mode = "rw" if writable else "ro"
    with _in_our_words(path):
        # SQLite's own mode would make a file that is missing.
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode={mode}",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
        )
    with closing(connection):
        with _in_our_words(path):
            connection.execute("PRAGMA synchronous = FULL")
            version = read_version(connection)
            (tables,) = connection.execute(
                "SELECT count(*) FROM sqlite_schema WHERE name IN ('outbox', 'dead_letters')"
            ).fetchone()
        if not version or tables != 2:
            raise _wrong(path, "is no state file of stationmaster")
        if version != VERSION:
            if version < VERSION:
                todo = "start the service once: it brings the file up to date"
            else:
                todo = "it is a newer stationmaster's: use that one's command"
            raise _wrong(path, f"has schema version {version}, not {VERSION}; {todo}")
        state = StateFile(path, connection)
        if writable:
            # SQLite opens what may only be read without a word, and lets a transaction begin: only a write tells.
            with _in_our_words(path):
                connection.execute("DELETE FROM outbox WHERE seq < 0")
        yield state


@contextmanager
def one_at_a_time(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep others out who ask for this as well; enter it before `open_state_file` and leave it after.

    The file itself carries the lock, a kind that SQLite does not use. (Closing any of a process's descriptors of a
    file ends SQLite's locks on it: therefore the order.) A file that cannot be opened is `open_state_file`'s to name.

    Raises:
        StoreError: somebody else is at it.
    """
    with ExitStack() as opened:
        try:
            file = opened.enter_context(Path(path).open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"{path} is being requeued from by another process; try again when it is done"
            raise StoreError(text, kind="disk-error") from error
        except OSError:
            pass  # `open_state_file` finds the words
        yield


def is_in_use(path: str | os.PathLike[str]) -> bool:
    """Tell whether a service has this state file now: it holds a lock on `<path>.lock` for as long as it runs.

    To find out, the lock is shared for an instant. A lock file that this user may not read counts as held.
    """
    try:
        with Path(f"{path}.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    return False


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError([f"outbox.path: {path} {what}"])


@contextmanager
def _in_our_words(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if primary == sqlite3.SQLITE_NOTADB:
            raise _wrong(path, "is no SQLite database") from error
        if primary == sqlite3.SQLITE_CORRUPT:
            raise _wrong(path, f"is damaged ({error})") from error
        if primary == sqlite3.SQLITE_READONLY:
            words = (
                f"needs write permission, on it and on its folder ({error}); use the service's user"
            )
            raise _wrong(path, words) from error
        if primary == sqlite3.SQLITE_CANTOPEN:
            raise _wrong(path, f"cannot be opened ({error})") from error
        if primary in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            text = f"{path} was busy for {BUSY_S:g} s: another process writes; try again"
            raise StoreError(text, kind="disk-error") from error
        kind = "disk-full" if primary == sqlite3.SQLITE_FULL else "disk-error"
        raise StoreError(f"{path}: {error}; look at its disk, then try again", kind=kind) from error


def _ranges(body: bytes, partition: int, offset: int) -> str:
    """Return the offset ranges that stand in an upload, or as much as its dead letter knows of them."""
    try:
        return orjson.dumps(orjson.loads(body)["ranges"]).decode()
    except (ValueError, KeyError, TypeError):  # of writing too: it nests 254 deep at most
        return orjson.dumps([{"partition": partition, "first": offset, "last": offset}]).decode()
