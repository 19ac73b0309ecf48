"""An outbox's rows and dead letters in memory, for tests on a virtual clock.

With `stationmaster.state.open_outbox(MemoryOutboxRows(), ...)` the whole outbox runs without a disk.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import attrs
import trio

from stationmaster.batch import KeptBatch
from stationmaster.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stationmaster.batch import DeadLetter, OffsetRange


def _steps(steps: Iterable[StoreError | None]) -> deque[StoreError | None]:
    return deque(steps)


@attrs.define(eq=False)
class Disk:
    """Each write meets one step from the left of `script`, then `otherwise`; None is success."""

    script: deque[StoreError | None] = attrs.field(factory=deque, converter=_steps)
    otherwise: StoreError | None = None
    looks: StoreError | None = None
    """What looking for rows that are due meets."""

    async def write(self) -> None:
        """Take the next step."""
        await trio.lowlevel.checkpoint()
        step = self.script.popleft() if self.script else self.otherwise
        if step is not None:
            raise step

    async def look(self) -> None:
        """Be readable, or not."""
        await trio.lowlevel.checkpoint()
        if self.looks is not None:
            raise self.looks


def _check_room(rows: int, held: int, size: int, max_bytes: int) -> None:
    if rows and held + size > max_bytes:
        raise StoreError(f"full: {held} of {max_bytes} bytes, {size} more", kind="full")


@attrs.define(eq=False)
class _Row:
    kept: KeptBatch
    body: bytes
    next_try: float
    reason: str


@attrs.define(eq=False, kw_only=True)
class MemoryOutboxRows:
    """What `stationmaster.state.open_outbox` works on, in memory: nothing outlives the object."""

    max_bytes: int = 1024 * 1024
    disk: Disk = attrs.field(factory=Disk)
    unreadable: dict[str, StoreError] = attrs.field(factory=dict, init=False)
    """Bodies that cannot be read, by batch id."""
    bodies_read: int = attrs.field(default=0, init=False)
    _rows: dict[str, _Row] = attrs.field(factory=dict, init=False)
    _changed: bool = attrs.field(default=False, init=False)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._rows)

    def holds(self, batch_id: str, /) -> bool:
        """Tell whether this batch is one of them."""
        return batch_id in self._rows

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
        """Keep a batch, once."""
        await self.disk.write()
        if batch_id in self._rows:
            return
        held = sum(len(row.body) for row in self._rows.values())
        _check_room(len(self._rows), held, len(body), self.max_bytes)
        kept = KeptBatch(
            batch_id=batch_id,
            topic=topic,
            partition=ranges[0].partition if ranges else -1,
            offset=ranges[0].first if ranges else -1,
            kept_at=kept_at,
        )
        self._rows[batch_id] = _Row(kept, body, 0.0, reason)

    async def due(self, now: float, /, *, latest: float, limit: int) -> list[KeptBatch]:
        """Return those whose time has come, the longest due first."""
        await self.disk.look()
        due = [row for row in self._rows.values() if not now < row.next_try <= latest]
        return [row.kept for row in sorted(due, key=lambda row: row.next_try)[:limit]]

    async def body(self, batch_id: str, /) -> bytes | None:
        """Return what is to be sent."""
        await self.disk.look()
        if batch_id in self.unreadable:
            raise self.unreadable[batch_id]
        self.bodies_read += 1
        row = self._rows.get(batch_id)
        return None if row is None else row.body

    async def postpone(self, batch_id: str, /, *, until: float, reason: str) -> None:
        """Count a failed attempt."""
        await self.disk.write()
        row = self._rows.get(batch_id)
        if row is not None:
            row.kept = attrs.evolve(row.kept, attempts=row.kept.attempts + 1)
            row.next_try, row.reason = until, reason

    async def delete(self, batch_id: str, /) -> None:
        """Let it go."""
        await self.disk.write()
        self._rows.pop(batch_id, None)

    async def refresh(self) -> bool:
        """Tell whether `retry_all` was called since."""
        await self.disk.look()
        changed, self._changed = self._changed, False
        return changed

    def retry_all(self) -> None:
        """Make every batch due now, as the command line does from another process."""
        self._changed = True
        for row in self._rows.values():
            row.next_try = 0.0

    def next_try(self, batch_id: str) -> float:
        """Return when a batch is due again (wall clock)."""
        return self._rows[batch_id].next_try

    def ids(self) -> list[str]:
        """Return what lies here, oldest first."""
        return list(self._rows)


@attrs.define(eq=False, kw_only=True)
class MemoryDeadLetters:
    """`stationmaster.abc.DeadLetters` in memory: `letters` holds each of them once, in order."""

    max_bytes: int = 1024 * 1024
    disk: Disk = attrs.field(factory=Disk)
    _letters: dict[tuple[object, ...], DeadLetter] = attrs.field(factory=dict, init=False)

    @property
    def letters(self) -> list[DeadLetter]:
        """Return what is kept, oldest first."""
        return list(self._letters.values())

    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        """Keep all of them, or none."""
        await self.disk.write()
        new = {
            key: letter
            for letter in reversed(letters)
            if (key := letter.identity) not in self._letters
        }
        held = sum(map(_size, self._letters.values()))
        _check_room(len(self._letters), held, sum(map(_size, new.values())), self.max_bytes)
        self._letters |= dict(reversed(new.items()))

    def clear(self) -> None:
        """Let all of them go, as an operator does."""
        self._letters.clear()


def _size(letter: DeadLetter) -> int:
    return len(letter.value or b"") + len(letter.detail.encode("utf-8", "backslashreplace"))
