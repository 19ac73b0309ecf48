"""Callers that wait for vectors, and the law of waking them. No task lives here.

A caller is one object: the callback that trio calls when the caller is cancelled, and what trio unwraps when it is
woken. A `Single` (one text) is also its own entry in the queue and in a call, so that `embed` allocates nothing else.
A `Bulk` (many texts) is cut into `Segment`s, which are its entries; they may travel in several calls.

Laws (the stress test breaks trio within a second when the first is violated):
1. Whoever sets `task` to None, and nobody else, wakes it (in the abort callback trio does), and sets it BEFORE it
   reschedules. So a task is woken once, whatever races in the same tick.
2. An entry is in the queue (`entry.call is None`) or in one call; queue or call counts it while it lives.
3. An entry whose caller has no task is dead: counted nowhere, and dropped where it is met.

Trio asks nothing of an outcome but `unwrap()`. These are no subclasses of `outcome.Outcome`: that would bring an
equality by value, no hash, and two methods that nobody calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from trio.lowlevel import Abort, reschedule

from stationmaster.errors import EmbedderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio.lowlevel import Task

    from stationmaster.abc import Vector

Caller: TypeAlias = "Single | Bulk"
Entry: TypeAlias = "Single | Segment"


class Home(Protocol):
    """What a caller needs of the queue it is put into."""

    cancelled: int
    """Rows whose callers were cancelled."""

    def withdraw(self, caller: Caller, /) -> None:
        """Count its entries no more, in the queue or in calls: nobody waits for them."""
        ...


class Carrier(Protocol):
    """What an entry needs of the call it is in."""

    def leave(self) -> None:
        """One entry fewer is wanted."""
        ...


def size_of(text: str) -> int:
    """Return the text's length in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def row_error(error: Exception) -> EmbedderError:
    """Make one row's own error from the error of a call.

    The rows of a call are awaited by many tasks: an instance shared by them would collect all their tracebacks, so
    each row gets a twin, with the original as its cause. What is no EmbedderError becomes one.
    """
    if isinstance(error, EmbedderError):
        # Not `copy.copy`: it calls `__init__`, whose signature is the subclass's own business.
        twin = type(error).__new__(type(error), *error.args)
        for name, value in vars(error).items():
            setattr(twin, name, list(value) if name == "__notes__" else value)
    else:
        twin = EmbedderError(f"the embedder failed with {type(error).__name__}: {error}")
    twin.__cause__ = error
    return twin


class Single:
    """A caller with one text: caller and entry in one. `embed` makes one per call, so it is lean."""

    __slots__ = (
        "arrived",
        "call",
        "due",
        "home",
        "rank",
        "result",
        "size_bytes",
        "task",
        "text",
    )

    rows = 1
    missing = 1

    result: Vector | Exception
    """Set by whoever wakes the task."""

    def __init__(  # noqa: PLR0917 - keywords would cost a tenth of a request
        self,
        text: str,
        size_bytes: int,
        task: Task,
        home: Home,
        arrived: float,
        due: float,
        rank: float,
    ) -> None:
        self.text: str = text
        self.size_bytes: int = size_bytes
        self.task: Task | None = task
        self.home: Home = home
        self.arrived: float = arrived
        self.due: float = due
        """Its deadline, or what counts as such."""
        self.rank: float = rank
        """Lower is sent first."""
        self.call: Carrier | None = None

    def __call__(self, _raise_cancel: object) -> Abort:
        """Take note that the caller is cancelled (trio's abort callback)."""
        return _leave(self)

    def unwrap(self) -> Vector:
        """Return the vector or raise the error, in the caller's task."""
        result = self.result
        if isinstance(result, Exception):
            del self.result  # else a cycle: error -> traceback -> this frame -> error
            try:
                raise result
            finally:
                del result
        return result

    @property
    def caller(self) -> Caller:
        """Who waits for it: itself."""
        return self

    def entries(self) -> Iterable[Entry]:
        """Return what of it is in the queue or in calls: itself."""
        return (self,)

    def texts(self) -> Sequence[str]:
        """Return its text."""
        return (self.text,)

    def fail(self, make_error: Callable[[], Exception]) -> int:
        """Wake the caller with an error; return how many rows failed."""
        task = self.task
        if task is None:
            return 0
        self.task = None
        self.result = make_error()
        self.home.withdraw(self)
        reschedule(task, self)  # type: ignore[arg-type]  # see the module
        return 1

    def release(self) -> None:
        """Forget the text: a dead entry in the queue must not hold it."""
        self.text = ""


class Bulk:
    """A caller with a list of texts."""

    def __init__(
        self,
        all_texts: Sequence[str],
        *,
        task: Task,
        home: Home,
        arrived: float,
        due: float,
        rank: float,
        return_errors: bool,
    ) -> None:
        self.all_texts: Sequence[str] = all_texts
        self.task: Task | None = task
        self.home: Home = home
        self.arrived: float = arrived
        self.due: float = due
        self.rank: float = rank
        self.return_errors = return_errors
        self.missing: int = len(all_texts)
        """Rows that have neither vector nor error yet."""
        self.results: list[Vector | Exception | None] = [None] * len(all_texts)
        self.error: Exception | None = None
        self.segments: list[Segment] = []

    def __call__(self, _raise_cancel: object) -> Abort:
        """Take note that the caller is cancelled (trio's abort callback)."""
        return _leave(self)

    def unwrap(self) -> list[Vector | Exception]:
        """Return each row's result or raise the error, in the caller's task."""
        error = self.error
        if error is not None:
            self.error = None  # else a cycle: error -> traceback -> this frame -> error
            try:
                raise error
            finally:
                del error
        return self.results  # type: ignore[return-value]  # no None is left in it

    def entries(self) -> Iterable[Entry]:
        """Return what of it is in the queue or in calls."""
        return self.segments

    def take(self, segment: Segment, results: Sequence[Vector | Exception]) -> None:
        """Take the results of a segment; the last one wakes the caller."""
        self.segments.remove(segment)
        self.results[segment.low : segment.high] = results
        self.missing -= segment.rows
        task = self.task
        if not self.missing and task is not None:
            self.task = None
            reschedule(task, self)  # type: ignore[arg-type]  # see the module

    def fail(self, make_error: Callable[[], Exception]) -> int:
        """Wake the caller with an error for what it misses; return how many rows failed."""
        task = self.task
        if task is None:
            return 0
        self.task = None
        if self.return_errors:
            self.results = [make_error() if result is None else result for result in self.results]
        else:
            self.error = make_error()
        self.home.withdraw(self)
        reschedule(task, self)  # type: ignore[arg-type]  # see the module
        return self.missing

    def release(self) -> None:
        """Forget texts and segments: a dead entry in the queue must not hold them."""
        self.all_texts = ()
        self.segments.clear()


class Segment:
    """Rows `low` to `high` (not included) of a bulk: its entry in the queue or in a call."""

    __slots__ = ("arrived", "bulk", "call", "due", "high", "low", "rank", "size_bytes")

    def __init__(self, bulk: Bulk, *, low: int, high: int, size_bytes: int) -> None:
        self.bulk: Bulk = bulk
        self.low: int = low
        self.high: int = high
        self.size_bytes: int = size_bytes
        self.arrived: float = bulk.arrived
        self.due: float = bulk.due
        self.rank: float = bulk.rank
        self.call: Carrier | None = None
        bulk.segments.append(self)

    @property
    def caller(self) -> Caller:
        """Who waits for it."""
        return self.bulk

    @property
    def task(self) -> Task | None:
        """Its task, or None if it waits no more."""
        return self.bulk.task

    @property
    def rows(self) -> int:
        """How many."""
        return self.high - self.low

    def texts(self) -> Sequence[str]:
        """Return its texts."""
        return self.bulk.all_texts[self.low : self.high]

    def fitting(self, *, rows: int, size_bytes: int) -> int:
        """Count how many of the first rows fit into this room."""
        rows = min(rows, self.rows)
        if self.size_bytes > size_bytes:
            for count, text in enumerate(self.texts()[:rows]):
                size_bytes -= size_of(text)
                if size_bytes < 0:
                    return count
        return rows

    def cut(self, rows: int) -> Segment:
        """Split off the first rows."""
        middle = self.low + rows
        size_bytes = sum(map(size_of, self.bulk.all_texts[self.low : middle]))
        head = Segment(self.bulk, low=self.low, high=middle, size_bytes=size_bytes)
        self.low = middle
        self.size_bytes -= size_bytes
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
        error.add_note(f"rows {self.low} to {self.high - 1} of its embed_many")
        return bulk.fail(lambda: error)


def hand_out(parts: Iterable[Entry], vectors: Sequence[Vector], at: int) -> tuple[int, int]:
    """Give the parts of a call their vectors, from `vectors[at]` on.

    Returns:
        How many rows were still wanted, and where the next part's vectors begin.
    """
    answered = 0
    for part in parts:
        if isinstance(part, Single):
            task = part.task
            if task is not None:
                part.task = None
                part.result = vectors[at]
                reschedule(task, part)  # type: ignore[arg-type]  # see the module
                answered += 1
            at += 1
        else:
            answered += part.answer(vectors[at : at + part.rows])
            at += part.rows
    return answered, at


def _leave(caller: Caller) -> Abort:
    caller.task = None
    caller.home.cancelled += caller.missing
    caller.home.withdraw(caller)
    return Abort.SUCCEEDED
