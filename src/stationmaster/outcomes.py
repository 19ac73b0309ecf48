"""What workers and open batches have in common: the seam between them, and what a handler's answer counts as.

Errors end at a station's edge, but for those that are `is_fatal`: lack of memory is nobody's own failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import orjson
import trio

from stationmaster.batch import Outcome, StationResult
from stationmaster.errors import DeadlineUnreachableError

if TYPE_CHECKING:
    from stationmaster.batch import Batch

_MOST_CHARS = 500  # of an error's text
# To look it up takes as long as half of an answer's other steps on Python 3.11.
_SUCCEEDED = Outcome.SUCCEEDED


class Collecting(Protocol):
    """What a worker needs of an open batch."""

    @property
    def batch(self) -> Batch:
        """The batch; with `by="timestamp"` its tables grow while others join it."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of its messages, those that joined included: the batch itself says so only when it closes."""
        ...

    @property
    def closed(self) -> bool:
        """Nothing counts any more."""
        ...

    @property
    def opened(self) -> float:
        """When it was opened, on trio's clock, as is `deadline`."""
        ...

    @property
    def deadline(self) -> float:
        """When it is closed at latest."""
        ...

    def begin(self, station_id: str, cancel: Callable[[], None]) -> None:
        """The handler runs now; `cancel` stops it."""
        ...

    def end(self, station_id: str) -> None:
        """The handler runs no more."""
        ...

    def begin_call(self, station_ids: frozenset[str], cancel: Callable[[], None]) -> None:
        """One call for all these stations runs now; `cancel` stops it, and is its name."""
        ...

    def end_call(self, cancel: Callable[[], None]) -> None:
        """That call runs no more."""
        ...

    def settle(self, result: StationResult) -> None:
        """This is the station's outcome; the first one counts."""
        ...


def answer_of(station_id: str, value: object, *, most_bytes: int) -> StationResult:
    """Return what a handler's return value counts as.

    It is encoded here and not with the report: a value that is no JSON fails its own station only.

    Args:
        station_id: stands first in the encoded result, whatever the value says.
        value: of any type.
        most_bytes: bound of the encoded result.

    Raises:
        Exception: from orjson or from the mapping itself; it is the station's failure.
    """
    if value is None:
        return StationResult(station_id, Outcome.NO_OUTPUT, None, "the handler returned None")
    if type(value) is not dict and not isinstance(value, Mapping):
        reason = f"the handler returned {type(value).__name__}, expected a mapping or None"
        return StationResult(station_id, Outcome.FAILED, None, reason)
    row: dict[str, Any] = {"stationId": station_id}
    row.update(value)
    row["stationId"] = station_id
    encoded = orjson.dumps(row)
    if len(encoded) > most_bytes:
        reason = f"the result has {len(encoded)} bytes, limit {most_bytes} (limits.result_bytes)"
        return StationResult(station_id, Outcome.FAILED, None, reason)
    return StationResult(station_id, _SUCCEEDED, value, "", encoded)


def failure_of(station_id: str, error: Exception) -> StationResult:
    """Return what a handler's error counts as: `failed`; `rejected` if the batcher saw that it cannot end in time."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    try:
        # Half a character would fail the whole report.
        text = str(error)[:_MOST_CHARS].encode(errors="replace").decode()
    except Exception as unreadable:  # noqa: BLE001 - `__str__` belongs to the handler's side too
        text = f"its text cannot be read ({type(unreadable).__name__})"
    name = type(error).__name__
    refused = isinstance(error, DeadlineUnreachableError)
    outcome = Outcome.REJECTED if refused else Outcome.FAILED
    return StationResult(station_id, outcome, None, f"{name}: {text}" if text else name)


def is_fatal(error: Exception) -> bool:
    """Tell whether an error is nobody's own failure, and ends the pipeline: lack of memory, alone or in a group."""
    if isinstance(error, ExceptionGroup):
        return error.subgroup(MemoryError) is not None
    return isinstance(error, MemoryError)


def is_cancellation(error: BaseException) -> bool:
    """Tell whether this is a cancellation and nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)
