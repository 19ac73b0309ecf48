"""Drafts: what the messages of one batch hold together, before it is opened and while others may still join it.

The ids come from the data alone. With `by="message"` the same record gives the same id after a redelivery. Otherwise
the id names the offsets, which a redelivery may cut differently; with `by="timestamp"` it therefore changes when
messages join, and the report has the last one: a target that honours ids must never take the half for the whole.
All ids hold the records' time: the offsets of a topic that was made anew begin again.

A range is a run of polled records of one partition without any other record between: what was refused counts when its
own letter is durable, what belongs to another batch when that is delivered.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import attrs

from stationmaster.batch import BadEntry, Message, OffsetRange

if TYPE_CHECKING:
    from collections.abc import KeysView, Mapping, Sequence
    from datetime import datetime

    from stationmaster.settings import Boundary


_MOST_TRACEPARENTS: Final = 128


@attrs.define(eq=False)
class _Run:
    """Records of one partition, in a row."""

    partition: int
    generation: int
    first: int
    last: int
    stamp: int
    """The first one's time."""
    follows: int | None
    """Offset of the record that was polled before the first."""


@attrs.define(eq=False, kw_only=True)
class Draft:
    """A batch without its deadline. It may grow."""

    topic: str
    by: Boundary
    group_id: str
    timestamp: datetime
    """Of its first message; of all of them with `by="timestamp"`."""
    last_message: dict[str, Message] = attrs.field(factory=dict, init=False)
    mislabelled: int = attrs.field(default=0, init=False)
    duplicates: int = attrs.field(default=0, init=False)
    size_bytes: int = attrs.field(default=0, init=False)
    traceparents: dict[str, None] = attrs.field(factory=dict, init=False)
    """Those of its messages, in order: a set that keeps it."""
    _entries: dict[str, tuple[Mapping[str, Any], ...]] = attrs.field(factory=dict, init=False)
    _again: dict[str, list[Mapping[str, Any]]] | None = attrs.field(default=None, init=False)
    """Readings that came after those in `_entries`: to write each there costs what there is."""
    _bad_entries: tuple[BadEntry, ...] | list[BadEntry] = attrs.field(default=(), init=False)
    """A list while more come."""
    _runs: list[_Run] = attrs.field(factory=list, init=False)
    _latest: dict[tuple[int, int], _Run] = attrs.field(factory=dict, init=False)
    """Partition and generation -> the run that may go on."""

    @property
    def key(self) -> tuple[str, datetime]:
        """What messages of the same batch share, with `by="timestamp"`."""
        return self.topic, self.timestamp

    @property
    def station_ids(self) -> KeysView[str]:
        """Whom it has readings of. To ask for no more than this costs nothing."""
        return self._entries.keys()

    @property
    def entries(self) -> dict[str, tuple[Mapping[str, Any], ...]]:
        """The readings of each station, in order. Once it has any it is the same table for good."""
        if self._again is not None:
            for station_id, readings in self._again.items():
                self._entries[station_id] = (*self._entries[station_id], *readings)
            self._again = None
        return self._entries

    @property
    def bad_entries(self) -> tuple[BadEntry, ...]:
        """Of all its messages, in order."""
        if type(self._bad_entries) is not tuple:
            self._bad_entries = tuple(self._bad_entries)
        return self._bad_entries

    @property
    def ranges(self) -> tuple[OffsetRange, ...]:
        """What it covers, in order."""
        return tuple(
            OffsetRange(
                topic=self.topic,
                partition=run.partition,
                first=run.first,
                last=run.last,
                generation=run.generation,
            )
            for run in self._sorted_runs()
        )

    @property
    def batch_id(self) -> str:
        """Its id, as long as nothing more is added."""
        runs = self._sorted_runs()
        if self.by == "message":
            return f"{self.topic}_{runs[0].partition}_{runs[0].first}_{runs[0].stamp // 1000}"
        spans = (f"{self.topic}/{r.partition}/{r.first}-{r.last}@{r.stamp}" for r in runs)
        digest = hashlib.sha256("\n".join([self.group_id, *spans]).encode()).hexdigest()[:16]
        return f"{self.topic}_{digest}"

    def add(self, messages: Sequence[Message]) -> None:
        """Join messages of its topic, in order within each partition."""
        named = len(self._entries)
        for message in messages:
            self.last_message.update(dict.fromkeys(message.station_ids, message))
            self.duplicates += len(message.station_ids)
            if message.bad_entries:
                self._add_bad(message.bad_entries)
            self.mislabelled += message.topic_differs
            self.size_bytes += message.size_bytes
            if message.traceparent is not None and len(self.traceparents) < _MOST_TRACEPARENTS:
                self.traceparents[message.traceparent] = None
            self._cover(message)
        if named or len(messages) > 1 or not self._take_over(messages[0]):
            self._gather(messages)
        self.duplicates -= len(self._entries) - named

    def _take_over(self, message: Message) -> bool:
        """Let an empty draft have a message's entries at once; refuse if it names a station twice."""
        station_ids = message.station_ids
        entries: dict[str, tuple[Mapping[str, Any], ...]] = dict(
            zip(station_ids, zip(message.readings, strict=True), strict=True)
        )
        alone = len(entries) == len(station_ids)
        if alone:
            self._entries = entries
        return alone

    def _gather(self, messages: Sequence[Message]) -> None:
        readings: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for message in messages:
            for station_id, reading in zip(message.station_ids, message.readings, strict=True):
                readings[station_id].append(reading)
        for station_id, new in readings.items():
            if station_id not in self._entries:
                self._entries[station_id] = tuple(new)
                continue
            if self._again is None:
                self._again = {}
            if (earlier := self._again.get(station_id)) is None:
                self._again[station_id] = new
            else:
                earlier.extend(new)

    def _add_bad(self, bad_entries: Sequence[BadEntry]) -> None:
        if isinstance(self._bad_entries, tuple):
            self._bad_entries = list(self._bad_entries)
        self._bad_entries.extend(bad_entries)

    def absorb(self, other: Draft) -> None:
        """Join another draft of the same time."""
        entries = self.entries
        for station_id, known in other.entries.items():
            self.duplicates += station_id in entries
            entries[station_id] = (*entries.get(station_id, ()), *known)
        self.last_message.update(other.last_message)
        if other.bad_entries:
            self._add_bad(other.bad_entries)
        self.mislabelled += other.mislabelled
        self.duplicates += other.duplicates
        self.size_bytes += other.size_bytes
        if other.traceparents:
            both = {**self.traceparents, **other.traceparents}
            self.traceparents = dict.fromkeys(islice(both, _MOST_TRACEPARENTS))
        for run in other._runs:
            key = run.partition, run.generation
            latest = self._latest.get(key)
            if latest is not None and latest.last == run.follows:
                latest.last = run.last
            else:
                self._runs.append(run)
                self._latest[key] = run

    def _cover(self, message: Message) -> None:
        key = message.partition, message.generation
        run = self._latest.get(key)
        if run is not None and (message.follows is None or message.follows == run.last):
            run.last = message.offset
            return
        run = self._latest[key] = _Run(
            message.partition,
            message.generation,
            message.offset,
            message.offset,
            message.record_timestamp_ms,
            message.follows,
        )
        self._runs.append(run)

    def _sorted_runs(self) -> list[_Run]:
        if len(self._runs) == 1:
            return self._runs
        return sorted(self._runs, key=lambda run: (run.partition, run.generation, run.first))


def draft_batch(messages: Sequence[Message], *, by: Boundary, group_id: str) -> Draft:
    """Join messages of one topic (at least one, in order within each partition) into one draft."""
    first = messages[0]
    draft = Draft(topic=first.topic, by=by, group_id=group_id, timestamp=first.timestamp)
    draft.add(messages)
    return draft
