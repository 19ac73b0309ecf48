"""Callers with many texts, and the segments they are cut into. The laws are those of `callers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio.lowlevel import Abort, reschedule

from stationmaster.batcher.callers import Failure, leave, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio.lowlevel import Task

    from stationmaster.abc import Vector
    from stationmaster.batcher.callers import Caller, Entry, Home, Place


class Bulk:
    """A caller with a list of texts."""

    __slots__ = (
        "all_texts",
        "all_tokens",
        "home",
        "missing",
        "results",
        "return_errors",
        "segments",
        "task",
    )

    def __init__(
        self,
        all_texts: Sequence[str],
        all_tokens: Sequence[int] | None,
        task: Task,
        home: Home,
        return_errors: bool,
    ) -> None:
        self.all_texts: Sequence[str] = all_texts
        self.all_tokens: Sequence[int] | None = all_tokens
        """If they are counted."""
        self.task: Task | None = task
        self.home: Home = home
        self.return_errors: bool = return_errors
        self.missing: int = len(all_texts)
        """Rows that have neither vector nor error yet."""
        self.results: Sequence[Vector | Exception | None] = ()
        """Empty until the first are here."""
        self.segments: list[Segment] = []

    def __call__(self, _raise_cancel: object) -> Abort:
        """Take note that the caller is cancelled (trio's abort callback)."""
        return leave(self)

    def unwrap(self) -> list[Vector | Exception]:
        """Return each row's result, in the caller's task."""
        return self.results  # type: ignore[return-value]  # no None is left in it, and `take` made it a list

    def entries(self) -> Iterable[Entry]:
        """Return what of it is in the queue or in calls."""
        return self.segments

    def take(self, segment: Segment, results: Sequence[Vector | Exception]) -> None:
        """Take the results of a segment; the last one wakes the caller."""
        self.segments.remove(segment)
        self.missing -= segment.rows
        if segment.rows == len(self.all_texts):
            self.results = results if isinstance(results, list) else list(results)
        else:
            self._all_results()[segment.low : segment.low + segment.rows] = results
        task = self.task
        if not self.missing and task is not None:
            self.task = None
            reschedule(task, self)  # type: ignore[arg-type]  # see `callers`

    def fail(self, make_error: Callable[[], Exception]) -> int:
        """Wake the caller with an error for what it misses; return how many rows failed."""
        task = self.task
        if task is None:
            return 0
        self.task = None
        outcome: object
        if self.return_errors:
            self.results = [
                make_error() if result is None else result for result in self._all_results()
            ]
            outcome = self
        else:
            outcome = Failure(make_error())
        self.home.withdraw(self)
        reschedule(task, outcome)  # type: ignore[arg-type]  # see `callers`
        return self.missing

    def release(self) -> None:
        """Forget texts and segments: a dead entry in the queue must not hold them."""
        self.all_texts = ()
        self.segments.clear()

    def _all_results(self) -> list[Vector | Exception | None]:
        if not isinstance(self.results, list):
            self.results = [None] * len(self.all_texts)
        return self.results


class Segment:
    """Some rows of a bulk that follow each other: its entry in the queue or in a call."""

    __slots__ = (
        "arrived",
        "bulk",
        "due",
        "low",
        "place",
        "rank",
        "rows",
        "size_bytes",
        "tokens",
    )

    arrived: float
    due: float
    """Its deadline, or what counts as such."""
    rank: float
    """Lower is sent first. These three are set when it is put in its order."""

    def __init__(  # noqa: PLR0917 - keywords would cost as much as all the rest
        self, bulk: Bulk, low: int, rows: int, size_bytes: int, tokens: int, place: Place
    ) -> None:
        self.bulk: Bulk = bulk
        self.low: int = low
        """Where its rows begin in the bulk."""
        self.rows: int = rows
        self.size_bytes: int = size_bytes
        self.tokens: int = tokens
        self.place: Place = place
        bulk.segments.append(self)

    @property
    def caller(self) -> Caller:
        """Who waits for it."""
        return self.bulk

    @property
    def task(self) -> Task | None:
        """Its task, or None if it waits no more."""
        return self.bulk.task

    def texts(self) -> Sequence[str]:
        """Return its texts."""
        return self.bulk.all_texts[self.low : self.low + self.rows]

    def fitting(self, *, rows: int, size_bytes: int, tokens: float) -> int:
        """Count how many of the first rows fit into this room."""
        rows = min(rows, self.rows)
        if self.size_bytes <= size_bytes and self.tokens <= tokens:
            return rows
        bulk = self.bulk
        for at in range(rows):
            size_bytes -= size_of(bulk.all_texts[self.low + at])
            if bulk.all_tokens is not None:
                tokens -= bulk.all_tokens[self.low + at]
            if size_bytes < 0 or tokens < 0:
                return at
        return rows

    def cut(self, rows: int) -> Segment:
        """Split off the first rows."""
        bulk = self.bulk
        low = self.low
        middle = low + rows
        size_bytes = sum(map(size_of, bulk.all_texts[low:middle]))
        tokens = 0 if bulk.all_tokens is None else sum(bulk.all_tokens[low:middle])
        head = Segment(bulk, low, rows, size_bytes, tokens, self.place)
        head.arrived, head.due, head.rank = self.arrived, self.due, self.rank
        self.low = middle
        self.rows -= rows
        self.size_bytes -= size_bytes
        self.tokens -= tokens
        return head

    def answer(self, vectors: Sequence[Vector]) -> int:
        """Hand over its vectors; return how many rows were still wanted."""
        if self.bulk.task is None:
            return 0
        self.bulk.take(self, vectors)
        return self.rows

    def fail(self, make_error: Callable[[], Exception]) -> int:
        """Fail these rows, or the whole bulk if its caller wants the first error; return how many rows failed."""
        bulk = self.bulk
        if bulk.task is None:
            return 0
        if bulk.return_errors:
            bulk.take(self, [make_error() for _ in range(self.rows)])
            return self.rows
        error = make_error()
        error.add_note(f"rows {self.low} to {self.low + self.rows - 1} of its embed_many")
        return bulk.fail(lambda: error)
