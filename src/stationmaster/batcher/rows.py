"""Rows that wait and rows that travel: the queue, the calls, and the deadlines that the batcher keeps.

Rules:
1. The queue is sorted by rank at all times, equal ranks by arrival. Ranks nearly always come in order (equal deadlines,
   or none), then putting is an append; else it is a binary search and an insert, which a bounded queue can afford.
2. `rows` and `size_bytes` count live entries only. Dead ones are dropped when they are met, and all at once when they
   outnumber the live: cancelling is O(1) over time and a crowd that comes and goes cannot fill the memory.
3. The last caller that leaves a call in flight cancels it.
"""

from __future__ import annotations

from bisect import insort_left, insort_right
from collections import deque
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from stationmaster.batcher.callers import Segment, Single

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import trio

    from stationmaster.batcher.callers import Caller, Entry

_TOMBSTONES: Final = 64  # dead entries that are tolerated in any case
GRAIN_S: Final = 0.01
"""Of the deadlines kept here: so late they may strike."""

_by_rank = attrgetter("rank")


class Call:
    """Rows that travel together."""

    __slots__ = ("answered", "live", "oldest", "parts", "rows", "scope", "started", "texts")

    def __init__(self, parts: list[Entry], texts: list[str], *, oldest: float) -> None:
        self.parts: list[Entry] = parts
        self.texts: list[str] = texts
        self.rows: int = len(texts)
        self.live: int = len(parts)
        """Parts whose callers wait."""
        self.oldest: float = oldest
        """Arrival of its oldest row."""
        self.answered: bool = False
        self.scope: trio.CancelScope | None = None
        """While it is in flight."""
        self.started: float = oldest
        """When it was sent, last."""
        for part in parts:
            part.call = self

    def leave(self) -> None:
        """One part fewer is wanted."""
        self.live -= 1
        if not self.live and self.scope is not None:
            self.scope.cancel()

    def prune(self) -> None:
        """Drop what nobody waits for any more."""
        self._load([part for part in self.parts if part.task is not None])

    def fail_late(self, instant: float, make_error: Callable[[], Exception]) -> int:
        """Fail the parts that are due before this instant, and drop what nobody waits for.

        Returns:
            How many rows failed.
        """
        failed = sum(part.fail(make_error) for part in self.parts if part.due < instant)
        self._load([part for part in self.parts if part.due >= instant and part.task is not None])
        return failed

    def split(self) -> Call:
        """Split off the first half of the rows."""
        room = self.rows // 2
        half: list[Entry] = []
        rest = deque(self.parts)
        while room:
            part = rest.popleft()
            if isinstance(part, Segment) and part.rows > room:
                rest.appendleft(part)
                part = part.cut(room)
            half.append(part)
            room -= part.rows
        self._load(list(rest))
        return Call(half, _texts(half), oldest=self.oldest)

    def _load(self, parts: list[Entry]) -> None:
        self.parts = parts
        self.texts = _texts(parts)
        self.rows = len(self.texts)
        self.live = len(parts)


def _texts(parts: list[Entry]) -> list[str]:
    return [text for part in parts for text in part.texts()]


class RowQueue:
    """Rows that wait for a call. Nothing here waits or wakes; the bounds are the owner's business."""

    __slots__ = (
        "_dead",
        "_earliest_due",
        "_entries",
        "_oldest",
        "_on_empty",
        "_stale",
        "cancelled",
        "rows",
        "size_bytes",
    )

    def __init__(self, *, on_empty: Callable[[], None]) -> None:
        self._entries: deque[Entry] = deque()
        self._on_empty = on_empty
        """Called when a leaving caller leaves the queue empty."""
        self.rows: int = 0
        """Live rows."""
        self.size_bytes: int = 0
        """Their text."""
        self.cancelled: int = 0
        """Rows whose callers were cancelled, here or in a call."""
        self._dead = 0
        self._oldest = inf
        self._earliest_due = inf
        self._stale = False  # the two above are to be computed anew

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over a snapshot of the live entries, in order."""
        return iter([entry for entry in self._entries if entry.task is not None])

    @property
    def oldest(self) -> float:
        """Arrival of the oldest row; infinity if there is none."""
        if self._stale:
            self._look()
        return self._oldest

    @property
    def earliest_due(self) -> float:
        """When the most urgent row is due; infinity if there is none."""
        if self._stale:
            self._look()
        return self._earliest_due

    def put(self, entry: Entry) -> None:
        """Queue an entry behind those of its rank."""
        if entry.arrived < self._oldest:  # noqa: PLR1730 - `min` is ten times as dear, here and below
            self._oldest = entry.arrived
        if entry.due < self._earliest_due:  # noqa: PLR1730
            self._earliest_due = entry.due
        entries = self._entries
        if entries and entry.rank < entries[-1].rank:
            insort_right(entries, entry, key=_by_rank)
        else:
            entries.append(entry)
        self.rows += entry.rows
        self.size_bytes += entry.size_bytes

    def put_back(self, call: Call) -> None:
        """Queue the parts of a pruned call again, before those of their ranks, with the age they have."""
        for part in reversed(call.parts):
            part.call = None
            insort_left(self._entries, part, key=_by_rank)
            self.rows += part.rows
            self.size_bytes += part.size_bytes
        self._stale = True

    def take(self, *, max_rows: int, max_bytes: int) -> Call:
        """Take the next rows, in order, as many as fit. There is at least one; the first always fits.

        What does not fit stays where it is and heads the next call.
        """
        entries = self._entries
        parts: list[Entry] = []
        texts: list[str] = []
        oldest = inf
        room = max_bytes
        while entries and len(texts) < max_rows:
            entry = entries.popleft()
            if entry.task is None:
                self._dead -= 1
                continue
            if isinstance(entry, Single):
                if entry.size_bytes > room:
                    entries.appendleft(entry)
                    break
                texts.append(entry.text)
            else:
                fitting = entry.fitting(rows=max_rows - len(texts), size_bytes=room)
                if fitting < entry.rows:
                    entries.appendleft(entry)
                    if not fitting:
                        break
                    entry = entry.cut(fitting)
                texts += entry.texts()
            parts.append(entry)
            room -= entry.size_bytes
            if entry.arrived < oldest:  # noqa: PLR1730
                oldest = entry.arrived
        self.rows -= len(texts)
        self.size_bytes -= max_bytes - room
        self._stale = True
        return Call(parts, texts, oldest=oldest)

    def withdraw(self, caller: Caller) -> None:
        """Count a caller's entries no more, here or in their calls: nobody waits for them."""
        for entry in caller.entries():
            if entry.call is None:
                self.rows -= entry.rows
                self.size_bytes -= entry.size_bytes
                self._dead += 1
            else:
                entry.call.leave()
        caller.release()
        self._stale = True
        if self._dead > _TOMBSTONES and self._dead * 2 > len(self._entries):
            self._entries = deque(self)
            self._dead = 0
        if not self.rows:
            self._on_empty()

    def _look(self) -> None:
        live = list(self)
        self._oldest = min((entry.arrived for entry in live), default=inf)
        self._earliest_due = min((entry.due for entry in live), default=inf)
        self._stale = False


class Expiries:
    """Deadlines that no scope of the caller keeps, in buckets: each strikes at most 10 ms late, and costs no scope."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: dict[int, dict[Caller, None]] = {}

    def add(self, caller: Caller, deadline: float) -> float:
        """Keep a caller's deadline; return the instant at which it will strike."""
        key = int(deadline / GRAIN_S) + 1
        self._buckets.setdefault(key, {})[caller] = None
        return key * GRAIN_S

    def discard(self, caller: Caller, deadline: float) -> None:
        """Keep it no more; fine if it struck."""
        key = int(deadline / GRAIN_S) + 1
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.pop(caller, None)
            if not bucket:
                del self._buckets[key]

    def next(self) -> float:
        """Return the next instant at which a deadline strikes; infinity if none is kept."""
        return min(self._buckets, default=inf) * GRAIN_S

    def pop(self, now: float) -> Sequence[Caller]:
        """Take the callers whose instant has come, earliest bucket first."""
        due = sorted(key for key in self._buckets if key * GRAIN_S <= now)
        return [caller for key in due for caller in self._buckets.pop(key)]
