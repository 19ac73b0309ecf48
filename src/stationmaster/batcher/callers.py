"""Callers that wait for vectors, and the law of waking them. No task lives here.

A caller is one object: the callback that trio calls when the caller is cancelled, and what trio unwraps when it is
woken. A `Single` (one text) is also its own entry in the queue and in a call, so that `embed` allocates nothing else.
A `Bulk` (many texts, see `bulks`) is cut into `Segment`s, which are its entries; they may travel in several calls.

Laws (the stress test breaks trio within a second when the first is violated):
1. Whoever sets `task` to None, and nobody else, wakes it (in the abort callback trio does), and sets it BEFORE it
   reschedules. So a task is woken once, whatever races in the same tick.
2. An entry has one place, the queue or one call; that counts it while it lives.
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
    from stationmaster.batcher.bulks import Bulk, Segment

Caller: TypeAlias = "Single | Bulk"
Entry: TypeAlias = "Single | Segment"


class Home(Protocol):
    """What a caller needs of the queue it is put into."""

    cancelled: int
    """Rows whose callers were cancelled."""

    def withdraw(self, caller: Caller, /) -> None:
        """Count its entries no more, in the queue or in calls: nobody waits for them."""
        ...


class Place(Protocol):
    """Where an entry is: the queue, or a call."""

    @property
    def home(self) -> Home:
        """The queue; the one that a call's entries came from."""
        ...


def size_of(text: str) -> int:
    """Return the text's length in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def row_error(error: Exception) -> EmbedderError:
    """Make one row's own error from the error of a call. Never fails: a caller's answer depends on it.

    The rows of a call are awaited by many tasks: an instance shared by them would collect all their tracebacks, so
    each row gets a twin, with the original as its cause. What is no EmbedderError becomes one.
    """
    twin = _twin(error) if isinstance(error, EmbedderError) else None
    if twin is None:
        twin = EmbedderError(f"the embedder failed with {type(error).__name__}: {_words(error)}")
    twin.__cause__ = error
    return twin


def _twin(error: EmbedderError) -> EmbedderError | None:
    try:
        # Not `copy.copy`: it calls `__init__`, whose signature is the subclass's own business.
        twin = type(error).__new__(type(error), *error.args)
        vars(twin).update(vars(error))
        if hasattr(error, "__notes__"):
            twin.__notes__ = list(error.__notes__)
        str(twin)
    except Exception:  # noqa: BLE001 - so is how it is made, and what it says
        return None
    return twin


def _words(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - `__str__` belongs to the embedder's side
        return "its text cannot be read"


class Failure:
    """What a caller is woken with if it gets an error."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def unwrap(self) -> None:
        """Raise the error, in the caller's task."""
        error = self.error
        self.error = None  # else a cycle: error -> traceback -> this frame -> error
        try:
            assert error is not None  # noqa: S101 - trio unwraps once
            raise error
        finally:
            del error


class Single:
    """A caller with one text: caller and entry in one. `embed` makes one per call, so it is lean."""

    __slots__ = ("arrived", "due", "place", "rank", "result", "task", "text")

    rows = 1
    missing = 1
    tokens = 0

    arrived: float
    due: float
    """Its deadline, or what counts as such."""
    rank: float
    """Lower is sent first. These three are set when it is put in its order (see `RowQueue.fresh`)."""
    result: Vector
    """Set by whoever wakes the task."""

    def __init__(self, text: str, task: Task, place: Place) -> None:
        self.text: str = text
        self.task: Task | None = task
        self.place: Place = place

    def __call__(self, _raise_cancel: object) -> Abort:
        """Take note that the caller is cancelled (trio's abort callback)."""
        return leave(self)

    def unwrap(self) -> Vector:
        """Return the vector, in the caller's task."""
        return self.result

    @property
    def caller(self) -> Caller:
        """Who waits for it: itself."""
        return self

    @property
    def home(self) -> Home:
        """The queue it was put into."""
        return self.place.home

    @property
    def size_bytes(self) -> int:
        """Length of its text in UTF-8."""
        return size_of(self.text)

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
        error = make_error()
        self.task = None
        self.home.withdraw(self)
        reschedule(task, Failure(error))  # type: ignore[arg-type]  # see the module
        return 1

    def release(self) -> None:
        """Forget the text: a dead entry in the queue must not hold it."""
        self.text = ""


class CountedSingle(Single):
    """A caller with one text whose tokens were counted."""

    __slots__ = ("tokens",)

    def __init__(self, text: str, task: Task, place: Place, tokens: int) -> None:
        super().__init__(text, task, place)
        self.tokens: int = tokens


def leave(caller: Caller) -> Abort:
    """Take note that a caller is cancelled."""
    home = caller.home
    caller.task = None
    home.cancelled += caller.missing
    home.withdraw(caller)
    return Abort.SUCCEEDED
