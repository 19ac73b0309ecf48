"""Rows that wait for a call. Nothing here waits or wakes; who may put what is the admission's business.

Rules:
1. The queue is sorted by rank at all times, equal ranks by arrival. Ranks nearly always come in order (equal deadlines,
   or none), then putting is an append; else it is a binary search and an insert, which a bounded queue can afford.
2. `rows`, `size_bytes` and `tokens` count live entries only. Dead ones are dropped when they are met, and all at once
   when they outnumber the live: cancelling is O(1) over time and a crowd that comes and goes cannot fill the memory.
3. While `len(fresh) < free`, a caller with one text and no deadline may append itself to `fresh`, and nothing more. The
   first also notes the time. Whoever looks at the queue settles them first: then all of them get that time and join
   the order behind everybody (nobody ranks behind a row that came later without a deadline).
"""

from __future__ import annotations

from bisect import insort_left, insort_right
from collections import deque
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from stationmaster.batcher.bulks import Segment
from stationmaster.batcher.callers import Single, size_of
from stationmaster.batcher.calls import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stationmaster.batcher.callers import Caller, Entry
    from stationmaster.batcher.policy import BatchPolicy

_TOMBSTONES: Final = 64  # dead entries that are tolerated in any case

_by_rank = attrgetter("rank")
_arrival = attrgetter("arrived")


class RowQueue:
    """Rows that wait for a call."""

    __slots__ = (
        "_dead",
        "_earliest_due",
        "_entries",
        "_in_order",
        "_oldest",
        "_on_empty",
        "_policy",
        "_quick_rows",
        "_rows",
        "_segments",
        "_size_bytes",
        "_stale",
        "_tokens",
        "cancelled",
        "free",
        "fresh",
        "fresh_bytes",
        "fresh_since",
        "home",
    )

    def __init__(self, policy: BatchPolicy, *, on_empty: Callable[[], None]) -> None:
        self._policy = policy
        self._on_empty = on_empty
        """Called when a leaving caller leaves the queue empty."""
        self.home: RowQueue = self
        self.cancelled: int = 0
        """Rows whose callers were cancelled, here or in a call."""
        self.fresh: list[Single] = []
        """See rule 3; always the same list."""
        self.fresh_since: float = inf
        """When the first of them came."""
        self.fresh_bytes: int = max(
            min(policy.max_batch_bytes, policy.max_queue_bytes // policy.max_queue_rows), 1
        )
        """The longest text that may come this way: as many as there is room for must fit."""
        self.free: int = 0
        """How many of them there may be."""
        self._quick_rows = 0
        self._entries: deque[Entry] = deque()
        self._rows = 0
        self._size_bytes = 0
        self._tokens = 0
        self._segments = 0
        """Entries that are segments, dead ones too."""
        self._dead = 0
        self._oldest = inf
        self._earliest_due = inf
        self._stale = False  # the two above are to be computed anew
        self._in_order = True  # for sure: the first row is the oldest and the most urgent

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over a snapshot of the live entries, in order."""
        self._settle()
        return iter([entry for entry in self._entries if entry.task is not None])

    @property
    def rows(self) -> int:
        """Live rows."""
        return self._rows + len(self.fresh)

    @property
    def size_bytes(self) -> int:
        """Their text."""
        self._settle()
        return self._size_bytes

    @property
    def tokens(self) -> int:
        """Their tokens, if they are counted."""
        return self._tokens

    @property
    def oldest(self) -> float:
        """Arrival of the oldest row; infinity if there is none."""
        self._look()
        return self._oldest

    @property
    def earliest_due(self) -> float:
        """When the most urgent row is due; infinity if there is none."""
        self._look()
        return self._earliest_due

    def ahead_of(self, rank: float) -> int:
        """Count the rows before a new one with that rank, if they are all that there are; else say 0."""
        self._settle()
        return self._rows if not self._entries or rank >= self._entries[-1].rank else 0

    def quicken(self, rows: int) -> None:
        """Let callers append themselves to `fresh` while fewer rows than that wait."""
        if rows != self._quick_rows:
            self._settle()
            self._quick_rows = rows
            self._set_free()

    def put(self, entry: Entry, arrived: float, due: float, rank: float) -> None:
        """Queue an entry behind those of its rank."""
        self._settle()
        entry.arrived = arrived
        entry.due = due
        entry.rank = rank
        self._oldest = min(self._oldest, arrived)
        self._earliest_due = min(self._earliest_due, due)
        entries = self._entries
        if entries and rank < entries[-1].rank:
            insort_right(entries, entry, key=_by_rank)
            self._in_order = False
        else:
            entries.append(entry)
        if rank < due:
            self._in_order = False
        self._count(entry)
        self._set_free()

    def put_back(self, call: Call) -> None:
        """Queue the parts of a pruned call again, before those of their ranks, with the age they have."""
        self._settle()
        for part in reversed(call.parts):
            part.place = self
            insort_left(self._entries, part, key=_by_rank)
            self._count(part)
        self._stale = True
        self._in_order = False
        self._set_free()

    def take(self) -> Call:
        """Take the next rows, in order, as many as fit into a call. There is at least one; the first always fits.

        What does not fit stays where it is and heads the next call.
        """
        self._settle()
        call = self._take_singles() or self._take_mixed()
        self._set_free()
        return call

    def withdraw(self, caller: Caller) -> None:
        """Count a caller's entries no more, here or in their calls: nobody waits for them."""
        self._settle()
        for entry in caller.entries():
            if isinstance(entry.place, Call):
                entry.place.leave()
            else:
                self._discount(entry)
                self._dead += 1
        caller.release()
        self._stale = True
        self._set_free()
        if self._dead > _TOMBSTONES and self._dead * 2 > len(self._entries):
            self._entries = deque(self)
            self._segments = sum(isinstance(entry, Segment) for entry in self._entries)
            self._dead = 0
        if not self._rows:
            self._on_empty()

    def _take_singles(self) -> Call | None:
        """Take rows of which nothing needs to be known: the quick way. None if there is something to be known."""
        policy = self._policy
        entries = self._entries
        if self._dead or self._segments or self._tokens or policy.share_identical:
            return None
        everything = len(entries) <= policy.max_batch_rows
        if everything:
            if self._size_bytes > policy.max_batch_bytes:
                return None
            oldest = self.oldest
            parts = list(entries)
            texts = [part.text for part in parts]  # type: ignore[union-attr]  # there are no segments
            entries.clear()
            self._rows = self._size_bytes = 0
            self._oldest = self._earliest_due = inf
            self._stale = False
            self._in_order = True
        else:
            parts = [entries.popleft() for _ in range(policy.max_batch_rows)]
            texts = [part.text for part in parts]  # type: ignore[union-attr]
            size_bytes = size_of("".join(texts))
            if size_bytes > policy.max_batch_bytes:
                entries.extendleft(reversed(parts))
                return None
            self._rows -= len(parts)
            self._size_bytes -= size_bytes
            if self._in_order:
                oldest = parts[0].arrived
                first = entries[0]
                self._oldest, self._earliest_due = first.arrived, first.due
            else:
                oldest = min(map(_arrival, parts))
                self._stale = True
        return Call(parts, texts, home=self, oldest=oldest, share=False)

    def _take_mixed(self) -> Call:
        policy = self._policy
        entries = self._entries
        share = policy.share_identical
        parts: list[Entry] = []
        texts: list[str] = []
        different: set[str] = set()
        oldest = inf
        rows = policy.max_batch_rows
        size_bytes = policy.max_batch_bytes
        tokens = inf if policy.max_batch_tokens is None else policy.max_batch_tokens
        while entries and rows > 0:
            entry = entries.popleft()
            if entry.task is None:
                self._forget(entry)
                continue
            if isinstance(entry, Single):
                if share and entry.text in different:
                    self._discount(entry)
                    parts.append(entry)
                    texts.append(entry.text)
                    oldest = min(oldest, entry.arrived)
                    continue
                if entry.size_bytes > size_bytes or entry.tokens > tokens:
                    entries.appendleft(entry)
                    break
                texts.append(entry.text)
            else:
                fitting = entry.fitting(rows=rows, size_bytes=size_bytes, tokens=tokens)
                if fitting < entry.rows:
                    entries.appendleft(entry)
                    if not fitting:
                        break
                    entry = entry.cut(fitting)
                else:
                    self._segments -= 1
                texts += entry.texts()
            if share:
                different.update(entry.texts())
            parts.append(entry)
            self._discount(entry)
            rows -= entry.rows
            size_bytes -= entry.size_bytes
            tokens -= entry.tokens
            oldest = min(oldest, entry.arrived)
        self._stale = True
        return Call(parts, texts, home=self, oldest=oldest, share=share)

    def _settle(self) -> None:
        """Put the fresh in their order (rule 3)."""
        fresh = self.fresh
        if not fresh:
            return
        since = self.fresh_since
        due = since + self._policy.patience_s
        for single in fresh:
            single.arrived = since
            single.due = single.rank = due
        self._entries.extend(fresh)
        self._rows += len(fresh)
        self._size_bytes += size_of("".join([single.text for single in fresh]))
        fresh.clear()
        self._oldest = min(self._oldest, since)
        self._earliest_due = min(self._earliest_due, due)
        self._set_free()

    def _set_free(self) -> None:
        free = self._quick_rows - self._rows
        if free > 0:
            spare = (self._policy.max_queue_bytes - self._size_bytes) // self.fresh_bytes
            if spare < free:  # noqa: PLR1730 - `min` is ten times as dear, here and below
                free = spare
        self.free = free

    def _count(self, entry: Entry) -> None:
        self._rows += entry.rows
        self._size_bytes += entry.size_bytes
        self._tokens += entry.tokens
        if isinstance(entry, Segment):
            self._segments += 1

    def _discount(self, entry: Entry) -> None:
        self._rows -= entry.rows
        self._size_bytes -= entry.size_bytes
        self._tokens -= entry.tokens

    def _forget(self, entry: Entry) -> None:
        """Drop a dead entry."""
        self._dead -= 1
        if isinstance(entry, Segment):
            self._segments -= 1

    def _look(self) -> None:
        self._settle()
        if self._stale:
            live = list(self)
            self._oldest = min([entry.arrived for entry in live], default=inf)
            self._earliest_due = min([entry.due for entry in live], default=inf)
            self._stale = False
