"""The poller: polls the source, parses, cuts drafts of batches, and opens each when there is room.

Rules:
1. It never waits on a station. It waits for room (`Intake`): a free slot, free bytes, and a queue short enough that
   the stations can still answer. A deadline begins only at opening, so catching up after an outage times nobody out.
2. What is polled and not yet opened is bounded: there is no next poll before all of this one is opened.
3. A record that is refused goes to the dead letters; it waits with the poller only while too many are on their way.
4. A batch's ranges leave out what was refused between its messages: that counts when its own letter is durable.
5. Parsing is cut into slices of `_SLICE_BYTES`, or of one message if that is larger.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import trio

from stationmaster.batch import BadEntry, Message, OffsetRange, Refusal
from stationmaster.messages import Limits, parse_message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

    from stationmaster.abc import Source
    from stationmaster.batch import Record

Boundary: TypeAlias = Literal["message", "poll"]

_SLICE_BYTES = 32_768  # parsed between two checkpoints: about a millisecond


@attrs.frozen(kw_only=True, eq=False)
class Draft:
    """A batch that is not opened yet: everything but its deadline."""

    batch_id: str
    topic: str
    ranges: tuple[OffsetRange, ...]
    entries: Mapping[str, tuple[Mapping[str, Any], ...]]
    last_message: Mapping[str, Message]
    bad_entries: tuple[BadEntry, ...]
    mislabelled: int
    size_bytes: int


def draft_batch(
    messages: Sequence[Message],
    *,
    by: Boundary,
    group_id: str,
    after_refused: Collection[tuple[str, int, int]] = (),
) -> Draft:
    """Join messages of one topic (at least one, in order within each partition) into one draft.

    `after_refused` are the (topic, partition, offset) of messages before which a record was refused: a range ends there
    and another begins.

    The id comes from the data alone: with `by="message"` the same record gives the same id after a redelivery; with
    `by="poll"` the id names the offsets, which a redelivery may cut differently. Both hold the records' time: the
    offsets of a topic that was made anew begin again.
    """
    first = messages[0]
    readings: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    last_message: dict[str, Message] = {}
    bad_entries: list[BadEntry] = []
    spans: dict[tuple[int, int, int], int] = {}  # partition, generation, first -> last
    begins: dict[tuple[int, int], int] = {}
    stamps: dict[tuple[int, int, int], int] = {}
    size_bytes = 0
    for message in messages:
        for station_id, reading in zip(message.station_ids, message.readings, strict=True):
            readings[station_id].append(reading)
        last_message.update(dict.fromkeys(message.station_ids, message))
        bad_entries += message.bad_entries
        size_bytes += message.size_bytes
        key = (message.partition, message.generation)
        if (message.topic, message.partition, message.offset) in after_refused:
            begins[key] = message.offset
        span = (*key, begins.setdefault(key, message.offset))
        spans[span] = message.offset
        stamps.setdefault(span, message.record_timestamp_ms)
    ranges = tuple(
        OffsetRange(
            topic=first.topic, partition=partition, first=start, last=end, generation=generation
        )
        for (partition, generation, start), end in sorted(spans.items())
    )
    return Draft(
        batch_id=(
            _message_id(first)
            if by == "message"
            else _ranges_id(group_id, ranges, [stamps[span] for span in sorted(spans)])
        ),
        topic=first.topic,
        ranges=ranges,
        entries={station_id: tuple(known) for station_id, known in readings.items()},
        last_message=last_message,
        bad_entries=tuple(bad_entries),
        mislabelled=sum(message.topic_differs for message in messages),
        size_bytes=size_bytes,
    )


def _message_id(message: Message) -> str:
    seconds = message.record_timestamp_ms // 1000
    return f"{message.topic}_{message.partition}_{message.offset}_{seconds}"


def _ranges_id(group_id: str, ranges: Sequence[OffsetRange], stamps: Iterable[int]) -> str:
    spans = (
        f"{r.topic}/{r.partition}/{r.first}-{r.last}@{stamp}"
        for r, stamp in zip(ranges, stamps, strict=True)
    )
    digest = hashlib.sha256("\n".join([group_id, *spans]).encode()).hexdigest()[:16]
    return f"{ranges[0].topic}_{digest}"


class Intake:
    """Decides when a draft may be opened.

    A slot is free, the bytes fit (or nothing else is open), and the stations' expected wait is below `max_wait_s` (or
    nothing else is open, so that it can never stand still).
    """

    def __init__(self, *, slots: int, max_bytes: int) -> None:
        self._slots = slots
        self._max_bytes = max_bytes
        self.in_flight: int = 0
        self.in_flight_bytes: int = 0
        self._left = trio.lowlevel.ParkingLot()

    def has_room(self, size_bytes: int) -> bool:
        """Tell whether a slot and the bytes are free now."""
        if not self.in_flight:
            return True
        return self.in_flight < self._slots and self.in_flight_bytes + size_bytes <= self._max_bytes

    def enter(self, size_bytes: int) -> None:
        """Take a slot."""
        self.in_flight += 1
        self.in_flight_bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        """Free a slot."""
        self.in_flight -= 1
        self.in_flight_bytes -= size_bytes
        self._left.unpark_all()

    async def wait_change(self) -> None:
        """Wait until a batch leaves."""
        await self._left.park()

    def nudge(self) -> None:
        """Let a waiting poller look again."""
        self._left.unpark_all()

    async def wait_idle(self) -> None:
        """Wait until no batch is open."""
        await trio.lowlevel.checkpoint()
        while self.in_flight:
            await self._left.park()


class Poller:
    """Runs from the first poll to the end of the source."""

    def __init__(
        self,
        source: Source,
        intake: Intake,
        *,
        by: Boundary,
        group_id: str,
        limits: Limits,
        may_open: Callable[[Draft], bool],
        open_batch: Callable[[Draft], Awaitable[None]],
        refuse: Callable[[Record, Refusal], Awaitable[None]],
    ) -> None:
        """Join the poller to its neighbours.

        Args:
            source: is polled by this task alone.
            intake: slots and bytes.
            by: where a batch ends.
            group_id: goes into the ids of batches of several messages.
            limits: of a message.
            may_open: whether the stations can take this draft now.
            open_batch: opens it; returns when it is handed to the stations.
            refuse: takes a record that is no usable message; its offset is no more the poller's business.
        """
        self._source = source
        self._intake = intake
        self._by = by
        self._group_id = group_id
        self._limits = limits
        self._may_open = may_open
        self._open_batch = open_batch
        self._refuse = refuse

    async def run(self) -> None:
        """Poll until the source ends. Cancel it to stop: what is not opened yet stays uncommitted."""
        while True:  # noqa: ASYNC913 - every source's poll is a checkpoint
            try:
                records = await self._source.poll()
            except trio.EndOfChannel:
                return  # noqa: ASYNC910
            if self._by == "message":
                for record in records:
                    await trio.lowlevel.checkpoint()
                    parsed = parse_message(record, self._limits)
                    if isinstance(parsed, Refusal):
                        await self._refuse(record, parsed)
                    else:
                        await self._open([parsed])
            else:
                await self._open_all(records)

    async def _open_all(self, records: Sequence[Record]) -> None:
        """Open one batch for each topic of a poll."""
        by_topic: dict[str, list[Message]] = {}
        cut: set[tuple[str, int]] = set()  # partitions whose last record was refused
        after_refused: set[tuple[str, int, int]] = set()
        await trio.lowlevel.checkpoint()
        parsed_bytes = 0
        for record in records:
            parsed = parse_message(record, self._limits)
            if isinstance(parsed, Refusal):
                await self._refuse(record, parsed)
                cut.add((record.topic, record.partition))
            else:
                by_topic.setdefault(parsed.topic, []).append(parsed)
                if (parsed.topic, parsed.partition) in cut:
                    cut.remove((parsed.topic, parsed.partition))
                    after_refused.add((parsed.topic, parsed.partition, parsed.offset))
            parsed_bytes += len(record.value or b"")
            if parsed_bytes >= _SLICE_BYTES:
                parsed_bytes = 0
                await trio.lowlevel.checkpoint()
        for messages in by_topic.values():
            await self._open(messages, after_refused)

    async def _open(
        self, messages: Sequence[Message], after_refused: Collection[tuple[str, int, int]] = ()
    ) -> None:
        draft = draft_batch(
            messages, by=self._by, group_id=self._group_id, after_refused=after_refused
        )
        intake = self._intake
        while intake.in_flight and not (
            intake.has_room(draft.size_bytes) and self._may_open(draft)
        ):
            await intake.wait_change()
        await self._open_batch(draft)
