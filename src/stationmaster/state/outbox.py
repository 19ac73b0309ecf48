"""The outbox's rows: what the replay asks of them, and how they lie on the state file.

What is remembered (ids, sizes, the tally) changes only in the thread that works on the file, after the commit, and is
read from anywhere: every look is at one whole value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import attrs
import orjson

from stationmaster.batch import KeptBatch
from stationmaster.state.bounds import Tally, check_room, shortened
from stationmaster.state.database import transaction

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from stationmaster.batch import OffsetRange
    from stationmaster.state.database import Database


_LARGEST: Final = 2**63 - 1
"""Of SQLite's integers."""


class OutboxRows(Protocol):
    """Where the batches lie. What waits may raise StoreError; once it began, cancellation waits for its end."""

    def __len__(self) -> int:
        """Return how many there are. Never waits."""
        ...

    def holds(self, batch_id: str, /) -> bool:
        """Tell whether this batch is one of them. Never waits."""
        ...

    async def put(
        self,
        batch_id: str,
        /,
        *,
        topic: str,
        ranges: Sequence[OffsetRange],
        body: bytes,
        kept_at: float,
        reason: str,
    ) -> None:
        """Keep a batch, due at once: durable when this returns, not there when this raises. An id is kept once."""
        ...

    async def due(self, now: float, /, *, latest: float, limit: int) -> Sequence[KeptBatch]:
        """Return those whose time is `now` or before, or beyond `latest`: the first `limit` of them in order of it.

        So those that were never tried come first, oldest first, and those that fail again and again hold up no other.
        """
        ...

    async def body(self, batch_id: str, /) -> bytes | None:
        """Return what is to be sent; None if it is gone."""
        ...

    async def postpone(self, batch_id: str, /, *, until: float, reason: str) -> None:
        """Count a failed attempt; the batch is due again at `until`."""
        ...

    async def delete(self, batch_id: str, /) -> None:
        """Let it go; it may be gone already."""
        ...

    async def refresh(self) -> bool:
        """Take note of what other processes wrote, and tell whether they did since the last call."""
        ...


@attrs.define(eq=False)
class OutboxTable:
    """Batches that wait for delivery: `OutboxRows` on disk.

    Every method that waits raises StoreError when the disk is full or fails; once its work began, cancellation waits
    for the end of it and the method returns.
    """

    _database: Database
    _max_bytes: int
    _sizes: dict[str, int] = attrs.field(factory=dict, init=False)
    """Batch id -> bytes of its body."""
    tally: Tally = attrs.field(factory=Tally, init=False)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.tally.rows

    def holds(self, batch_id: str, /) -> bool:
        """Tell whether this batch lies here, without looking at the disk."""
        return batch_id in self._sizes

    async def put(
        self,
        batch_id: str,
        /,
        *,
        topic: str,
        ranges: Sequence[OffsetRange],
        body: bytes,
        kept_at: float,
        reason: str,
    ) -> None:
        """Keep a batch, due at once; an id that is held is kept once. `reason` (for people): why it lies here.

        Raises:
            StoreError: there is no room, or the disk fails.
        """
        where = [{"partition": r.partition, "first": r.first, "last": r.last} for r in ranges]
        row = batch_id, topic, orjson.dumps(where).decode(), body, kept_at, shortened(reason)
        insert = (
            "INSERT OR IGNORE INTO outbox (batch_id, topic, ranges, body, kept_at, last_error)"
            " VALUES (?, ?, ?, ?, ?, ?)"
        )

        def work(connection: sqlite3.Connection) -> None:
            if batch_id in self._sizes:
                return
            check_room("outbox", self.tally, len(body), max_bytes=self._max_bytes)
            with transaction(connection):
                taken = connection.execute(insert, row).rowcount
                tally = _grown(self.tally, connection, rows=taken, size=taken * len(body))
            self._sizes[batch_id] = len(body)
            self.tally = tally

        await self._database.run(work, adds=True)

    async def due(self, now: float, /, *, latest: float, limit: int) -> list[KeptBatch]:
        """Return batches whose time has come, longest due first: it is over, or beyond `latest` (a clock jumped)."""
        select = (
            "SELECT batch_id, topic, ranges, kept_at, attempts FROM outbox"
            " WHERE next_try <= ? OR next_try > ? ORDER BY next_try, seq LIMIT ?"
        )

        def work(connection: sqlite3.Connection) -> list[KeptBatch]:
            return [_kept_batch(*row) for row in connection.execute(select, (now, latest, limit))]

        return await self._database.run(work)

    async def body(self, batch_id: str, /) -> bytes | None:
        """Return what is to be sent; None if it does not lie here any more."""
        select = "SELECT body FROM outbox WHERE batch_id = ?"

        def work(connection: sqlite3.Connection) -> bytes | None:
            row = connection.execute(select, (batch_id,)).fetchone()
            return None if row is None else bytes(row[0])

        return await self._database.run(work)

    async def postpone(self, batch_id: str, /, *, until: float, reason: str) -> None:
        """Count an attempt that failed for `reason`; the batch is due again at `until` (wall clock)."""
        update = (
            "UPDATE outbox SET attempts = min(attempts, 1000000) + 1, next_try = ?, last_error = ?"
            " WHERE batch_id = ?"
        )
        values = until, shortened(reason), batch_id

        def work(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                connection.execute(update, values)

        await self._database.run(work)

    async def delete(self, batch_id: str, /) -> None:
        """Let a batch go; one that is gone already is fine."""

        def work(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                gone = connection.execute(
                    "DELETE FROM outbox WHERE batch_id = ?", (batch_id,)
                ).rowcount
                size = self._sizes.get(batch_id, 0)
                tally = _grown(self.tally, connection, rows=-gone, size=-size)
            self._sizes.pop(batch_id, None)
            self.tally = tally

        await self._database.run(work)

    async def refresh(self) -> bool:
        """Take note of what other processes changed, and tell whether they did since this was called last."""
        await self._database.run(lambda _: None)
        return self._database.take_changes()

    def load(self, connection: sqlite3.Connection) -> None:
        """See `stationmaster.state.database.Table`."""
        sizes = dict(connection.execute("SELECT batch_id, length(body) FROM outbox"))
        self.tally = _grown(Tally(), connection, rows=len(sizes), size=sum(sizes.values()))
        self._sizes = sizes


def _grown(before: Tally, connection: sqlite3.Connection, *, rows: int, size: int) -> Tally:
    oldest = connection.execute("SELECT kept_at FROM outbox ORDER BY seq LIMIT 1").fetchone()
    return Tally(
        rows=before.rows + rows,
        bytes=before.bytes + size,
        oldest_at=None if oldest is None else oldest[0],
    )


def _kept_batch(batch_id: str, topic: str, ranges: str, kept_at: float, attempts: int) -> KeptBatch:
    partition, offset = _beginning(ranges)
    return KeptBatch(
        batch_id=batch_id,
        topic=topic,
        partition=partition,
        offset=offset,
        kept_at=kept_at,
        attempts=attempts,
    )


def _beginning(ranges: str) -> tuple[int, int]:
    """Return partition and offset where a batch begins; -1 for both if its row does not say in our words.

    It is sent all the same: its body says it too, and one row must not hold up the others.
    """
    try:
        told = orjson.loads(ranges)
    except orjson.JSONDecodeError:
        told = None
    match told:
        case [{"partition": int(partition), "first": int(first)}, *_] if (
            max(partition, first) <= _LARGEST
        ):
            return partition, first
    return -1, -1
