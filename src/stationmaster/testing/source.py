"""A source in memory, with partitions, generations and rebalances that the test drives.

It passes the same contract suite as the Kafka source; what a broker would do to a consumer is a method here.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, TypeAlias

import attrs
import trio

from stationmaster.abc import NullObserver
from stationmaster.batch import OffsetRange, Record
from stationmaster.events import (
    OffsetsCommitted,
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
)
from stationmaster.offsets import Lease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stationmaster.abc import Observer, Withdrawn

Partition: TypeAlias = tuple[str, int]
"""Topic and partition number."""


@attrs.define(eq=False)
class _Held:
    lease: Lease
    position: int
    """Index in the log of the next record to read."""
    closing: bool = False
    drained: trio.Event = attrs.field(factory=trio.Event, init=False)


@attrs.define(eq=False, kw_only=True)
class MemorySource:
    """A `stationmaster.abc.Source`. A partition is assigned when its first record is put.

    Offsets are committed at once when the watermark moves (a broker's client does it in the course of time).
    """

    max_poll_messages: int = 500
    drain_timeout_s: float = 7.0
    observer: Observer = attrs.field(factory=NullObserver)
    committed: dict[Partition, int] = attrs.field(factory=dict, init=False)
    """The next offset to read, as a broker would keep it."""
    commits: dict[Partition, list[int]] = attrs.field(factory=lambda: defaultdict(list), init=False)
    """Every commit of each partition, oldest first."""
    _logs: dict[Partition, list[Record]] = attrs.field(factory=dict, init=False)
    _held: dict[Partition, _Held] = attrs.field(factory=dict, init=False)
    _generations: dict[Partition, int] = attrs.field(factory=dict, init=False)
    _changed: trio.Event = attrs.field(factory=trio.Event, init=False)
    _ended: bool = attrs.field(default=False, init=False)
    _error: Exception | None = attrs.field(default=None, init=False)
    _on_withdrawn: Callable[[Withdrawn], None] | None = attrs.field(default=None, init=False)
    _on_leaving: Callable[[Withdrawn], Sequence[OffsetRange]] | None = attrs.field(
        default=None, init=False
    )

    # ------------------------------------------------------------------------------------------------- the source

    async def poll(self) -> list[Record]:
        """Wait for records; see `stationmaster.abc.Source.poll`. Partitions take turns."""
        await trio.lowlevel.checkpoint()
        while not (records := self._take()):
            if self._error is not None:
                raise self._error
            if self._ended:
                raise trio.EndOfChannel
            self._changed = trio.Event()
            await self._changed.wait()
        return records

    def account(self, offsets: OffsetRange, /) -> None:
        """See `stationmaster.abc.Source.account`."""
        key = offsets.topic, offsets.partition
        held = self._held.get(key)
        if held is None or held.lease.generation != offsets.generation:
            return
        lease = held.lease
        if lease.account(offsets.first, offsets.last) and lease.watermark is not None:
            first = self.committed.get(key, offsets.first)
            self.committed[key] = lease.watermark
            self.commits[key].append(lease.watermark)
            taken = attrs.evolve(offsets, first=first, last=lease.watermark - 1)
            self.observer.observe(OffsetsCommitted(offsets=(taken,)))
        if not lease.outstanding:
            held.drained.set()

    def watch_withdrawals(
        self,
        on_withdrawn: Callable[[Withdrawn], None],
        /,
        *,
        on_leaving: Callable[[Withdrawn], Sequence[OffsetRange]] | None = None,
    ) -> None:
        """See `stationmaster.abc.Source.watch_withdrawals`. A later watcher takes the place of the one before."""
        self._on_withdrawn, self._on_leaving = on_withdrawn, on_leaving

    # ------------------------------------------------------------------------------------------------- the broker

    def put(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        timestamp_ms: int = 0,
        headers: Sequence[tuple[str, bytes | None]] = (),
        offset: int | None = None,
    ) -> int:
        """Append a record and return its offset (the next one, or a later one: logs may have gaps)."""
        key = topic, partition
        is_new = key not in self._logs
        log = self._logs.setdefault(key, [])
        following = log[-1].offset + 1 if log else 0
        if offset is None:
            offset = following
        elif offset < following:
            msg = f"{topic} [{partition}]: offset {offset} is taken; the next is {following}"
            raise ValueError(msg)
        log.append(
            Record(
                topic=topic,
                partition=partition,
                offset=offset,
                timestamp_ms=timestamp_ms,
                value=value,
                headers=tuple(headers),
            )
        )
        if is_new:
            self.assign([key])
        self._changed.set()
        return offset

    def end(self) -> None:
        """No more records: once all are returned, `poll` raises `trio.EndOfChannel`."""
        self._ended = True
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Let `poll` raise this error as soon as no record is left."""
        self._error = error
        self._changed.set()

    def assign(self, partitions: Sequence[Partition]) -> None:
        """Give partitions to the reader, from their committed offsets on, under a new generation.

        One that is held already is withdrawn first: as if its log had been cut.
        """
        self._withdraw([key for key in partitions if key in self._held])
        for key in partitions:
            generation = self._generations[key] = self._generations.get(key, 0) + 1
            log = self._logs.setdefault(key, [])
            begin = self.committed.get(key, 0)
            position = sum(record.offset < begin for record in log)
            lease = Lease(topic=key[0], partition=key[1], generation=generation)
            self._held[key] = _Held(lease, position)
        self.observer.observe(PartitionsAssigned(partitions=tuple(partitions)))
        self._changed.set()

    async def revoke(self, partitions: Sequence[Partition]) -> bool:
        """Take partitions away, after what is begun of them is accounted for or `drain_timeout_s` is over.

        Returns:
            Whether everything was accounted for in time. If cancelled, the partitions are gone as well.
        """
        leaving = [self._held[key] for key in partitions]
        began = trio.current_time()
        for held in leaving:
            held.closing = True
        if self._on_leaving is not None:
            generations = [
                (*key, held.lease.generation) for key, held in zip(partitions, leaving, strict=True)
            ]
            for given in reversed(self._on_leaving(generations)):
                self._held[given.topic, given.partition].lease.give_back(given.first)
        try:
            with trio.move_on_after(self.drain_timeout_s):
                await trio.lowlevel.checkpoint()
                for held in leaving:
                    if held.lease.outstanding:
                        await held.drained.wait()
        finally:
            self._withdraw(partitions)
            drained = not any(held.lease.outstanding for held in leaving)
            event = PartitionsRevoked(
                partitions=tuple(partitions),
                drain_s=trio.current_time() - began,
                drained=drained,
            )
            self.observer.observe(event)
        return drained

    def lose(self, partitions: Sequence[Partition]) -> None:
        """Take partitions away at once: what is not accounted for is never committed."""
        self._withdraw(partitions)
        self.observer.observe(PartitionsLost(partitions=tuple(partitions)))

    def _withdraw(self, partitions: Iterable[Partition]) -> None:
        withdrawn = [(*key, self._held.pop(key).lease.generation) for key in partitions]
        if withdrawn and self._on_withdrawn is not None:
            self._on_withdrawn(withdrawn)

    def _take(self) -> list[Record]:
        records: list[Record] = []
        for key in tuple(self._held):
            held = self._held[key]
            room = self.max_poll_messages - len(records)
            if held.closing or not room:
                continue
            log = self._logs[key]
            part = log[held.position : held.position + room]
            if not part:
                continue
            held.position += len(part)
            held.drained = trio.Event()
            generation = held.lease.generation
            for record in part:
                held.lease.hand_out(record.offset)
                records.append(attrs.evolve(record, generation=generation))
            self._held[key] = self._held.pop(key)  # to the end of the row
        return records
