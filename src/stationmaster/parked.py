"""What was polled and waits for room: in the order in which it should be opened.

Rules:
1. What is urgent stands before the rest. Within that, records and drafts that are cut by message or poll keep the order
   in which they came; drafts that are cut by timestamp stand with the oldest first, because their other messages come
   from other partitions and are to meet them open.
2. A record that is a batch of its own stays unparsed until it is next: it is smaller so. It is given back if its
   partition leaves.
3. Messages of one time wait together. Those whose batch is open already wait beside the others, for bytes only.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING, Final

import attrs

from stationmaster.batch import Record
from stationmaster.drafts import Draft

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from datetime import datetime


# What a record, or a header, takes beside its bytes: a flood of empty ones must not count as nothing.
_RECORD_BYTES: Final = 256


@attrs.define(eq=False)
class _Row:
    """Those of one urgency."""

    in_order: deque[Record | Draft] = attrs.field(factory=deque)
    by_time: list[tuple[datetime, int, Draft]] = attrs.field(factory=list)
    """A heap; the number keeps the order of arrival and spares comparing drafts."""


@attrs.define(eq=False)
class Parked:
    """Records and drafts that wait for room."""

    size_bytes: int = attrs.field(default=0, init=False)
    _rows: tuple[_Row, _Row] = attrs.field(factory=lambda: (_Row(), _Row()), init=False)
    """The urgent, the others."""
    _joining: dict[tuple[str, datetime], Draft] = attrs.field(factory=dict, init=False)
    _by_key: dict[tuple[str, datetime], Draft] = attrs.field(factory=dict, init=False)
    """Every draft that is cut by timestamp."""
    _arrivals: int = attrs.field(default=0, init=False)

    def __bool__(self) -> bool:
        """Tell whether anything waits."""
        return bool(self._by_key) or any(row.in_order for row in self._rows)

    def add(self, item: Record | Draft, *, urgent: bool) -> None:
        """Let a record, or a draft that is complete, wait in its row."""
        self._row(urgent).in_order.append(item)
        self.size_bytes += _size(item)

    def find(self, key: tuple[str, datetime]) -> Draft | None:
        """Return the draft of this topic and time that waits, if one does. Whoever lets it grow says so (`grew`)."""
        return self._by_key.get(key)

    def grew(self, size_bytes: int) -> None:
        """Take note that a draft has this much more."""
        self.size_bytes += size_bytes

    def add_timed(self, draft: Draft, *, urgent: bool, joins: bool) -> None:
        """Let a draft that may grow wait for a slot, or (`joins`) for bytes of the open batch of its time."""
        self._by_key[draft.key] = draft
        self.size_bytes += draft.size_bytes
        if joins:
            self._joining[draft.key] = draft
        else:
            self._push(draft, urgent=urgent)

    def joining(self) -> tuple[Draft, ...]:
        """Return the drafts that wait to join an open batch."""
        return tuple(self._joining.values())

    def join_no_more(self, draft: Draft, *, urgent: bool) -> None:
        """Let a draft wait for a slot: the batch that it was to join is closed."""
        del self._joining[draft.key]
        self._push(draft, urgent=urgent)

    def records(self) -> Iterator[tuple[Record, bool]]:
        """Yield the first of each row that is a record still, and whether it is urgent."""
        for urgent in (True, False):
            row = self._row(urgent).in_order
            if row and isinstance(row[0], Record):
                yield row[0], urgent

    def parsed(self, draft: Draft | None, *, urgent: bool) -> None:
        """Put what a row's first record became in its place; None: it was refused."""
        row = self._row(urgent).in_order
        self.size_bytes -= _size(row.popleft())
        if draft is not None:
            row.appendleft(draft)
            self.size_bytes += draft.size_bytes

    def remove(self, leaving: Container[tuple[str, int, int]]) -> list[Record]:
        """Remove the records of these generations (topic, partition, generation), and return them in order.

        Not the first of a row: it may be about to be parsed.
        """
        removed: list[Record] = []
        for row in self._rows:
            kept: list[Record | Draft] = []
            for number, item in enumerate(row.in_order):
                if (
                    number
                    and isinstance(item, Record)
                    and (item.topic, item.partition, item.generation) in leaving
                ):
                    removed.append(item)
                    self.size_bytes -= _size(item)
                else:
                    kept.append(item)
            row.in_order = deque(kept)
        return removed

    def heads(self) -> Iterator[Draft]:
        """Yield the drafts that may be opened next, in order of preference; no record may be first in its row."""
        for row in self._rows:
            if row.in_order:
                head = row.in_order[0]
                assert isinstance(head, Draft)  # noqa: S101
                yield head
            if row.by_time:
                yield row.by_time[0][2]

    def take(self, draft: Draft) -> None:
        """Remove one of the heads, or of those that are joining."""
        self.size_bytes -= draft.size_bytes
        if draft.by == "timestamp":
            del self._by_key[draft.key]
            if self._joining.pop(draft.key, None) is not None:
                return
        for row in self._rows:
            if row.in_order and row.in_order[0] is draft:
                row.in_order.popleft()
            elif row.by_time and row.by_time[0][2] is draft:
                heapq.heappop(row.by_time)

    def _push(self, draft: Draft, *, urgent: bool) -> None:
        self._arrivals += 1
        heapq.heappush(self._row(urgent).by_time, (draft.timestamp, self._arrivals, draft))

    def _row(self, urgent: bool) -> _Row:
        return self._rows[0 if urgent else 1]


def _size(item: Record | Draft) -> int:
    return item.size_bytes if isinstance(item, Draft) else record_bytes(item)


def record_bytes(record: Record) -> int:
    """Return what a record counts as while it waits: its value, its headers, and something for itself."""
    size = _RECORD_BYTES + len(record.value or b"")
    for name, value in record.headers:
        size += _RECORD_BYTES + len(name) + len(value or b"")
    return size
