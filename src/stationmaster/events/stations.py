"""Stations and those who answer for them: results, breakers, threads, batch handlers, the result hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from stationmaster.batch import Outcome


@attrs.frozen(kw_only=True)
class StationAnswered:
    """A station has its outcome (only for detailed observers)."""

    batch_id: str
    station_id: str
    outcome: Outcome
    answered: int
    expected: int


@attrs.frozen(kw_only=True)
class LateResult:
    """A handler answered after its batch was closed: counted and dropped."""

    batch_id: str
    station_id: str


@attrs.frozen(kw_only=True)
class StationTrouble:
    """A helper task that a handler left in its station's nursery failed; the station goes on anew."""

    station_id: str
    error: BaseException


@attrs.frozen(kw_only=True)
class StationBreakerOpened:
    """So many jobs of a station timed out in a row: its jobs are rejected at once, but for a probe now and then."""

    station_id: str
    failures: int


@attrs.frozen(kw_only=True)
class StationBreakerClosed:
    """A station whose breaker was open answers again, or was given up as idle (and is unknown from now on)."""

    station_id: str
    open_s: float
    given_up: bool = False


@attrs.frozen(kw_only=True)
class ThreadAbandoned:
    """A plain function did not return before its job was given up: its thread goes on, its station stays busy."""

    batch_id: str
    station_id: str
    abandoned: int
    """Such threads now, this one included. Each holds its place until it really ends."""
    threads: int
    """Places there are: when all are abandoned, no plain function runs any more."""


@attrs.frozen(kw_only=True)
class ThreadReturned:
    """An abandoned thread has ended: its station is free again. A result is late: counted and dropped."""

    batch_id: str
    station_id: str
    abandoned: int
    """Those that are left."""
    seconds: float
    """Since it was abandoned."""
    error: BaseException | None
    """What it raised."""


@attrs.frozen(kw_only=True)
class BatchHandlerTrouble:
    """A call of a batch handler raised, or reported wrongly; the stations that it had not reported failed."""

    batch_id: str
    error: Exception
    unreported: int


@attrs.frozen(kw_only=True)
class ResultHookTrouble:
    """The result hook did not take a result: it raised, took too long, or too many wait. The batch is not concerned."""

    batch_id: str
    station_id: str
    reason: str
    """A short bounded name: error, timeout, full or closing."""
    error: Exception | None = None


StationEvent: TypeAlias = (
    StationAnswered
    | LateResult
    | StationTrouble
    | StationBreakerOpened
    | StationBreakerClosed
    | ThreadAbandoned
    | ThreadReturned
    | BatchHandlerTrouble
    | ResultHookTrouble
)
