"""The values that travel: record, message, batch, station input, station result, report. No behaviour, no I/O.

Way of the data: `Record` (bytes from a source) -> `Message` (parsed) -> `Batch` (opened, with its deadline)
-> `StationInput` (what a handler gets) -> `StationResult` -> `BatchReport` (what is uploaded).
"""

from __future__ import annotations

import enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from stationmaster.read_only import read_only

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    import trio


@attrs.frozen(kw_only=True)
class Record:
    """One record of a source, unread.

    `generation` counts the assignments of this partition to this process: what was polled under an older one
    can no longer be committed.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    """Milliseconds since the epoch; 0 if the source does not know."""
    value: bytes | None
    """None is a tombstone."""
    generation: int = 0
    headers: tuple[tuple[str, bytes | None], ...] = ()


@attrs.frozen(kw_only=True)
class OffsetRange:
    """Offsets `first` to `last` (both included) of one partition, as polled under one generation."""

    topic: str
    partition: int
    first: int
    last: int
    generation: int = 0


@attrs.frozen(kw_only=True)
class BadEntry:
    """An entry of `stationData` that cannot be used; its neighbours can."""

    index: int
    """Position in its message's `stationData`, from 0."""
    reason: str


@attrs.frozen(kw_only=True)
class Message:
    """A parsed message. Its readings belong to it alone: whoever gets them may change them.

    All else is shared by the stations that it names, and read-only: `fields` too, the other top-level fields.
    """

    topic: str
    partition: int
    offset: int
    generation: int
    record_timestamp_ms: int
    timestamp: datetime
    """The message's own time, else the record's. Always with a time zone."""
    station_ids: tuple[str, ...]
    """In the message's order; a station may stand there twice."""
    readings: tuple[Mapping[str, Any], ...]
    """Beside `station_ids`: a reading is the entry without its `stationId`."""
    _fields: Mapping[str, Any]
    bad_entries: tuple[BadEntry, ...] = ()
    size_bytes: int = 0
    topic_differs: bool = False
    """The `topic` field names another topic than the one it came by (only counted)."""
    follows: int | None = None
    """Offset of the record that was polled before it from its partition; None: none was, or nobody asks."""
    traceparent: str | None = None
    """The record's header of this name, unchecked: which trace it belongs to, in the form of W3C Trace Context."""

    @cached_property  # so that nobody pays who does not ask
    def fields(self) -> Mapping[str, Any]:
        """The other top-level fields: JSON, read-only all the way down, see `StationInput.fields`."""
        fields: Mapping[str, Any] = read_only(self._fields)
        return fields

    @property
    def entries(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """(station id, reading) in the message's order."""
        return tuple(zip(self.station_ids, self.readings, strict=True))


@attrs.frozen(kw_only=True)
class Refusal:
    """Why a record is no usable message: a short reason (kebab-case, bounded in number) and a detail for people."""

    reason: str
    detail: str


@attrs.frozen(kw_only=True)
class DeadLetter:
    """What could not be used, kept whole for people: a record, or a batch that the target refused for good."""

    reason: str
    """Kebab-case, bounded in number: a `Refusal`'s reason, or `rejected-upload`."""
    detail: str
    topic: str
    partition: int
    offset: int
    """Of the record; for a rejected upload the first offset of its first range."""
    timestamp_ms: int = 0
    headers: tuple[tuple[str, bytes | None], ...] = ()
    value: bytes | None
    """The record's raw bytes (None: a tombstone), or the whole body that was refused."""
    batch_id: str = ""
    """For a rejected upload only."""

    @property
    def identity(self) -> tuple[str, int, int, int, str, bytes | None]:
        """What tells it from others: topic, partition, offset, timestamp, batch id, and the value of a record.

        A body is made anew each time: its id is enough.
        """
        value = None if self.batch_id else self.value
        return self.topic, self.partition, self.offset, self.timestamp_ms, self.batch_id, value


@attrs.frozen(kw_only=True)
class KeptBatch:
    """A batch that lies in the outbox, without its body."""

    batch_id: str
    topic: str
    partition: int
    offset: int
    """`partition` and `offset`: the beginning of its first range (-1 without one)."""
    kept_at: float
    """Wall clock, seconds since the epoch."""
    attempts: int = 0
    """Out of the outbox, over all runs."""


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """An opened batch."""

    batch_id: str
    topic: str
    opened_at: datetime
    deadline: float
    """Absolute, on trio's clock."""
    ranges: tuple[OffsetRange, ...]
    entries: Mapping[str, tuple[Mapping[str, Any], ...]]
    """Station id -> its readings in order; the keys stand in the messages' order."""
    last_message: Mapping[str, Message]
    """Station id -> the last message that named it."""
    bad_entries: tuple[BadEntry, ...] = ()
    mislabelled: int = 0
    """Messages whose `topic` field names another topic."""
    duplicates: int = 0
    """Entries beyond the first of a station."""
    size_bytes: int = 0
    roster: tuple[str, ...] = ()
    """Stations that are expected even if no message names them."""
    follow_up: bool = False
    """Messages of this time came when their batch was closed already, or could not take them (`by = "timestamp"`)."""
    traceparents: tuple[str, ...] = ()
    """Those of its messages, unchecked: each one once, in order, the first 128."""


@attrs.frozen(eq=False)
class StationInput:
    """What a handler gets: one station of one batch.

    The readings are its own and may be changed; `batch`, `message` and `fields` are shared by stations, and read-only.
    """

    station_id: str
    readings: tuple[Mapping[str, Any], ...]
    """One per entry of this station in the batch, in order; without `stationId`."""
    batch: Batch
    message: Message
    """The last message of the batch that names this station."""
    _lend_nursery: Callable[[], trio.Nursery] | None = attrs.field(default=None, repr=False)

    @property
    def nursery(self) -> trio.Nursery:
        """The station's own nursery: helper tasks in it live from batch to batch, until the station is given up.

        A helper that fails ends its siblings and the job at hand, and the station goes on anew.

        Raises:
            RuntimeError: this input was made by hand, without a station.
        """
        if self._lend_nursery is None:
            raise RuntimeError(
                f"station {self.station_id} has no task: this input was made by hand"
            )
        return self._lend_nursery()

    @property
    def batch_id(self) -> str:
        """The batch's id."""
        return self.batch.batch_id

    @property
    def topic(self) -> str:
        """The Kafka topic."""
        return self.batch.topic

    @property
    def timestamp(self) -> datetime:
        """The time of the last message that names this station."""
        return self.message.timestamp

    @property
    def fields(self) -> Mapping[str, Any]:
        """The other top-level fields of that message: JSON, shared by all stations that it names, and read-only.

        To change it at any depth raises TypeError; a `copy.deepcopy()` of it may be changed.
        """
        return self.message.fields

    @property
    def deadline(self) -> float:
        """The batch's deadline, on trio's clock.

        A job may have to end before: `job_timeout_s` after its start, or when a pipeline that ends has no more grace.
        In an `async def` handler `trio.current_effective_deadline()` is the earliest of them all.
        """
        return self.batch.deadline


class Outcome(enum.Enum):
    """What became of a station in a batch. The value is the name in the upload."""

    SUCCEEDED = "succeeded"
    NO_OUTPUT = "noOutput"
    FAILED = "failed"
    TIMED_OUT = "timedOut"
    MISSING = "missing"
    REJECTED = "rejected"

    if not TYPE_CHECKING:  # type checkers cannot tell what this overrides
        __hash__ = object.__hash__  # enum's own is a step of Python for every look into a table


class ClosedBy(enum.Enum):
    """Which rule closed a batch."""

    COMPLETE = "complete"
    QUORUM = "quorum"
    DEADLINE = "deadline"


@attrs.frozen(eq=False)
class StationResult:
    """The one outcome of one station in one batch."""

    station_id: str
    outcome: Outcome
    value: Mapping[str, Any] | None = None
    """The handler's mapping (`succeeded` only)."""
    reason: str = ""
    """Why not, for people (empty when succeeded)."""
    encoded: bytes = b""
    """`{"stationId": ..., **value}` as JSON (`succeeded` only): made at the station's edge, so that a value that
    cannot be encoded fails its own station and no other."""


@attrs.frozen(kw_only=True, eq=False)
class BatchReport:
    """A closed batch: what is uploaded, once."""

    batch: Batch
    closed_by: ClosedBy
    closed_at: datetime
    duration_s: float
    """From opening to closing."""
    results: tuple[StationResult, ...]
    """One per expected station, in the messages' order."""
    counts: Mapping[Outcome, int]
    """Every outcome, zeros included."""
