"""The dead letters on the state file."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, TypeAlias

import attrs
import orjson

from stationmaster.state.bounds import Tally, check_room, legal, shortened
from stationmaster.state.database import transaction

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    from stationmaster.batch import DeadLetter
    from stationmaster.state.database import Database

_Row: TypeAlias = tuple[str, str, str, int, int, int, str, bytes | None, str, float]

_HELD = """
    SELECT 1 FROM dead_letters
    WHERE topic = ? AND partition = ? AND "offset" = ? AND timestamp_ms = ? AND batch_id = ?
        AND (batch_id <> '' OR value IS ?)
"""
_INSERT = """
    INSERT OR IGNORE INTO dead_letters
        (reason, detail, topic, partition, "offset", timestamp_ms, headers, value, batch_id, first_seen)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_COUNT = """
    SELECT count(*),
        coalesce(sum(coalesce(length(value), 0) + length(headers) + length(CAST(detail AS BLOB))), 0),
        (SELECT first_seen FROM dead_letters ORDER BY seq LIMIT 1)
    FROM dead_letters
"""


@attrs.define(eq=False)
class DeadLettersTable:
    """`stationmaster.abc.DeadLetters` on disk. The bytes counted are those of values, headers and details."""

    _database: Database
    _max_bytes: int
    _clock: Callable[[], float] = time.time
    tally: Tally = attrs.field(factory=Tally, init=False)
    """Changes in the thread that works on the file, after the commit."""

    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        """Keep all of them in one transaction; a letter that is held already is kept once.

        It is held if one from the same place and time is, of the same batch, or of a message with the same value.

        Raises:
            StoreError: there is no room for all, or the disk is full or fails; none of them is kept.

        Once it began, cancellation waits for its end and this returns.
        """
        first_seen = self._clock()

        def work(connection: sqlite3.Connection) -> None:
            rows = size = 0
            with transaction(connection):
                for letter in letters:
                    if connection.execute(_HELD, letter.identity).fetchone():
                        continue
                    row = _row(letter, first_seen)
                    # Files that were made before letters were told apart by their value hold one of each place.
                    if connection.execute(_INSERT, row).rowcount:
                        rows += 1
                        size += _size(row)
                check_room("dead-letter store", self.tally, size, max_bytes=self._max_bytes)
            oldest_at = self.tally.oldest_at
            self.tally = Tally(
                rows=self.tally.rows + rows,
                bytes=self.tally.bytes + size,
                oldest_at=first_seen if oldest_at is None and rows else oldest_at,
            )

        await self._database.run(work, adds=True)

    def load(self, connection: sqlite3.Connection) -> None:
        """See `stationmaster.state.database.Table`."""
        rows, size, oldest_at = connection.execute(_COUNT).fetchone()
        self.tally = Tally(rows=rows, bytes=size, oldest_at=oldest_at)


def _row(letter: DeadLetter, first_seen: float) -> _Row:
    headers = [
        [legal(name), None if value is None else base64.b64encode(value).decode()]
        for name, value in letter.headers
    ]
    return (
        letter.reason,
        shortened(letter.detail),
        letter.topic,
        letter.partition,
        letter.offset,
        letter.timestamp_ms,
        orjson.dumps(headers).decode(),
        letter.value,
        letter.batch_id,
        first_seen,
    )


def _size(row: _Row) -> int:
    """Return the bytes that count: the same as `_COUNT` would."""
    _, detail, _, _, _, _, headers, value, _, _ = row
    return len(value or b"") + len(headers) + len(detail.encode())
