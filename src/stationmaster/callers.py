"""Callers that wait for vectors, and the law of waking them. No task lives here.

A caller is one `Request`: the callback that trio calls when the caller is cancelled, and the outcome that trio unwraps
when it is woken. A `Single` (one text) is also its own entry in the queue and in a call, so that `embed` allocates
nothing else. A `Bulk` (many texts) is cut into `Segment`s, which are its entries; they may travel in several calls.

Laws (the stress test breaks trio within a second when the first is violated):
1. Whoever sets `request.task` to None, and nobody else, wakes it (in the abort callback trio does), and sets it BEFORE
   it reschedules. So a task is woken once, whatever races in the same tick.
2. An entry is in the queue (`entry.call is None`) or in one call; its home or its call counts it while it lives.
3. An entry whose request has no task is dead: counted nowhere, and dropped where it is met.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias, TypeVar

import outcome
from trio.lowlevel import Abort, reschedule

from stationmaster.errors import EmbedderError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence

    from trio.lowlevel import Task

    from stationmaster.abc import Vector

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Entry: TypeAlias = "Single | Segment"


class Home(Protocol):
    """What a request needs of the queue it was put into."""

    cancelled: int
    """Rows whose callers were cancelled."""

    def withdraw(self, request: Request[Any], /) -> None:
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


class Request(outcome.Outcome[T_co]):
    """One waiting caller."""

    __slots__ = ("arrived", "due", "error", "home", "rank", "task")

    task: Task | None
    """The caller while it waits: see law 1."""
    home: Home
    arrived: float
    due: float
    """The deadline, or what counts as such for a caller without."""
    rank: float
    """Lower is sent first."""
    error: Exception | None
    missing: int
    """Rows that have neither answer nor error yet (meaningless once nobody waits)."""

    # Outcomes compare by their attrs fields: all requests would be equal, and none could be a key.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @abstractmethod
    def entries(self) -> Iterable[Entry]:
        """Return what of it is in the queue or in calls."""

    @abstractmethod
    def release(self) -> None:
        """Forget texts and entries: a dead entry in the queue must not hold them."""

    @abstractmethod
    def settle(self, make_error: Callable[[], Exception]) -> None:
        """Give the missing rows their error."""

    def __call__(self, _raise_cancel: object) -> Abort:
        """Take note that the caller is cancelled (trio's abort callback)."""
        self.task = None
        self.home.cancelled += self.missing
        self.home.withdraw(self)
        return Abort.SUCCEEDED

    def fail(self, make_error: Callable[[], Exception]) -> int:
        """Wake the caller with an error for every missing row.

        Returns:
            How many rows that were; 0 if nobody waits any more.
        """
        task = self.task
        if task is None:
            return 0
        self.task = None
        self.settle(make_error)
        self.home.withdraw(self)
        reschedule(task, self)
        return self.missing

    def send(self, gen: Generator[T, T_co, object]) -> T:
        """Be an Outcome (trio itself only unwraps)."""
        return outcome.capture(self.unwrap).send(gen)

    async def asend(self, agen: AsyncGenerator[T, T_co]) -> T:
        """Be an Outcome (trio itself only unwraps)."""
        return await outcome.capture(self.unwrap).asend(agen)

    def _raise(self, error: Exception) -> NoReturn:
        self.error = None  # else a cycle: error -> traceback -> frame -> self -> error
        try:
            raise error
        finally:
            del error


class Single(Request["Vector"]):
    """A caller with one text: request and entry in one. `embed` makes one per call, so it is lean."""

    __slots__ = ("call", "size_bytes", "text", "vector")

    rows = 1
    missing = 1

    call: Carrier | None
    vector: Vector

    def __init__(
        self,
        text: str,
        size_bytes: int,
        task: Task,
        home: Home,
        arrived: float,
        due: float,
        rank: float,
    ) -> None:
        self.text = text
        self.size_bytes = size_bytes
        self.task = task
        self.home = home
        self.arrived = arrived
        self.due = due
        self.rank = rank
        self.error = None
        self.call = None

    def unwrap(self) -> Vector:
        """Return the vector or raise the error."""
        if self.error is not None:
            self._raise(self.error)
        return self.vector

    @property
    def request(self) -> Request[Any]:
        """Who waits for it: itself."""
        return self

    def entries(self) -> Iterable[Entry]:
        """Return itself."""
        return (self,)

    def texts(self) -> Sequence[str]:
        """Return its text."""
        return (self.text,)

    def answer(self, vectors: Sequence[Vector], at: int) -> int:
        """Wake the caller with its vector, `vectors[at]`; return how many rows were still wanted."""
        task = self.task
        if task is None:
            return 0
        self.task = None
        self.vector = vectors[at]
        reschedule(task, self)
        return 1

    def release(self) -> None:
        """Forget the text."""
        self.text = ""

    def settle(self, make_error: Callable[[], Exception]) -> None:
        """Take the error."""
        self.error = make_error()


class Bulk(Request["list[Vector | Exception]"]):
    """A caller with a list of texts."""

    __slots__ = ("all_texts", "missing", "results", "return_errors", "segments")

    def __init__(
        self,
        texts: Sequence[str],
        task: Task,
        home: Home,
        arrived: float,
        due: float,
        rank: float,
        *,
        return_errors: bool,
    ) -> None:
        self.all_texts = texts
        self.task = task
        self.home = home
        self.arrived = arrived
        self.due = due
        self.rank = rank
        self.return_errors = return_errors
        self.error = None
        self.missing = len(texts)
        self.results: list[Vector | Exception | None] = [None] * len(texts)
        self.segments: list[Segment] = []

    def unwrap(self) -> list[Vector | Exception]:
        """Return the rows' results or raise the error."""
        if self.error is not None:
            self._raise(self.error)
        return self.results  # type: ignore[return-value]  # no None is left in it

    def entries(self) -> Iterable[Entry]:
        """Return its segments."""
        return self.segments

    def take(self, segment: Segment, results: Sequence[Vector | Exception]) -> None:
        """Take the results of a segment; the last one wakes the caller."""
        self.segments.remove(segment)
        self.results[segment.low : segment.high] = results
        self.missing -= segment.rows
        task = self.task
        if not self.missing and task is not None:
            self.task = None
            reschedule(task, self)

    def release(self) -> None:
        """Forget the texts and the segments."""
        self.all_texts = ()
        self.segments.clear()

    def settle(self, make_error: Callable[[], Exception]) -> None:
        """Take the error, for every missing row if the caller wants them one by one."""
        if self.return_errors:
            self.results = [make_error() if result is None else result for result in self.results]
        else:
            self.error = make_error()


class Segment:
    """Rows `low` to `high` (not included) of a bulk: its entry in the queue or in a call."""

    __slots__ = ("arrived", "bulk", "call", "due", "high", "low", "rank", "size_bytes")

    def __init__(self, bulk: Bulk, *, low: int, high: int, size_bytes: int) -> None:
        self.bulk = bulk
        self.low = low
        self.high = high
        self.size_bytes = size_bytes
        self.arrived = bulk.arrived
        self.due = bulk.due
        self.rank = bulk.rank
        self.call: Carrier | None = None
        bulk.segments.append(self)

    @property
    def request(self) -> Request[Any]:
        """Who waits for it."""
        return self.bulk

    @property
    def task(self) -> Task | None:
        """The caller, or None if it waits no more."""
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

    def answer(self, vectors: Sequence[Vector], at: int) -> int:
        """Hand over the vectors from `vectors[at]` on; return how many rows were still wanted."""
        if self.bulk.task is None:
            return 0
        self.bulk.take(self, vectors[at : at + self.rows])
        return self.rows

    def fail(self, make_error: Callable[[], Exception]) -> int:
        """Fail these rows, or the whole request if its caller wants the first error; return how many rows failed."""
        bulk = self.bulk
        if bulk.task is None:
            return 0
        if bulk.return_errors:
            bulk.take(self, [make_error() for _ in range(self.rows)])
            return self.rows
        error = make_error()
        error.add_note(f"rows {self.low} to {self.high - 1} of its embed_many")
        return bulk.fail(lambda: error)
