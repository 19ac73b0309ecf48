"""What is assigned to this process, and what of it is committed: the pump's book. No client calls, no I/O.

Rules:
1. A partition's generation counts its assignments to this process; a retained partition keeps its own.
2. A partition that is read backwards (its log was cut or made anew) begins a new generation as well: what was read
   before says nothing about the new log.
3. A commit that was refused is due again; one that was taken is never taken back.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeAlias

import attrs
from confluent_kafka import TopicPartition

from stationmaster.batch import OffsetRange
from stationmaster.offsets import Lease

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from confluent_kafka import KafkaError

    from stationmaster.batch import Record

Key: TypeAlias = tuple[str, int]
"""Topic and partition."""


@attrs.define(eq=False)
class Holding:
    """An assigned partition. The pump's thread writes it (trio: the lease's completions); every thread may read."""

    lease: Lease
    begin: int | None = None
    """The first offset that was read."""
    position: int = -1
    """The next offset that may be read."""
    sent: int | None = None
    """The watermark of the last commit that was sent and not refused."""
    committed: int | None = None
    high: int | None = None
    """The log's end as last told: by a fetch, or by a question."""
    fetched: int | None = None
    """The log's end as the last fetch told it."""
    start: int | None = None
    """Where the group stood when this was assigned, else where it begins; None as long as that is not known."""
    _group_stands_at: int | None = None
    """The committed offset that was found; negative: none."""

    @property
    def key(self) -> Key:
        """Topic and partition."""
        return self.lease.topic, self.lease.partition

    @property
    def next_offset(self) -> int | None:
        """The next offset that may be read, as far as that is known."""
        return self.position if self.position >= 0 else self.start

    @property
    def lag(self) -> int | None:
        """Offsets up to the log's end that the group has not committed; None as long as that is not known."""
        stand = self.committed
        if stand is None:
            stand = self.begin if self.start is None else self.start
        return None if self.high is None or stand is None else max(0, self.high - stand)

    def found_committed(self, offset: int) -> None:
        """Take note of the group's committed offset at the assignment; negative: there is none."""
        self._group_stands_at = offset

    def saw_watermarks(self, low: int, high: int, *, skips_old: bool) -> None:
        """Take note of what the client knows of the log's ends; negative: nothing yet.

        `skips_old`: a group without a usable offset begins at the end, wherever that was just then.
        """
        if high < 0:
            return
        if high != self.fetched:  # else an answer to a question may be newer
            self.fetched = self.high = high
        stood = self._group_stands_at
        if self.start is None and stood is not None:
            if stood >= 0 and low <= stood <= high:
                self.start = stood
            elif self.begin is not None:
                self.start = self.begin
            elif not skips_old and low >= 0:
                self.start = low


@attrs.define(eq=False)
class Drain:
    """Partitions that are being revoked: trio sets `done` when nothing of them is outstanding, or at shutdown."""

    holdings: Sequence[Holding]
    done: threading.Event = attrs.field(factory=threading.Event, init=False)

    @property
    def is_empty(self) -> bool:
        """Whether everything that was handed out is accounted for."""
        return not any(holding.lease.outstanding for holding in self.holdings)


@attrs.define(eq=False)
class Assignment:
    """The partitions held now."""

    turnover: int = attrs.field(default=0, init=False)
    """How often a generation ended: records of it that are in hand are nobody's."""
    _held: dict[Key, Holding] = attrs.field(factory=dict, init=False)
    _generations: dict[Key, int] = attrs.field(factory=dict, init=False)

    @property
    def holdings(self) -> Iterable[Holding]:
        """All of them."""
        return self._held.values()

    @property
    def topics(self) -> set[str]:
        """Of which topics there is at least one."""
        return {topic for topic, _ in self._held}

    def hold(self, key: Key) -> Holding:
        """Begin a new generation of this partition; one that is held ends."""
        self.turnover += key in self._held
        generation = self._generations[key] = self._generations.get(key, 0) + 1
        holding = Holding(Lease(topic=key[0], partition=key[1], generation=generation))
        self._held[key] = holding
        return holding

    def find(self, key: Key) -> Holding | None:
        """Return the partition, if it is held."""
        return self._held.get(key)

    def find_all(self, partitions: Iterable[TopicPartition]) -> list[Holding]:
        """Return those of the client's partitions that are held."""
        found = (self._held.get((each.topic, each.partition)) for each in partitions)
        return [holding for holding in found if holding is not None]

    def forget(self, holdings: Iterable[Holding]) -> None:
        """End their generations."""
        self.turnover += 1
        for holding in holdings:
            del self._held[holding.key]

    def holds(self, record: Record) -> bool:
        """Tell whether the record was read under a generation that still stands."""
        holding = self._held.get((record.topic, record.partition))
        return holding is not None and holding.lease.generation == record.generation


@attrs.define(eq=False)
class Commit:
    """What was sent to the broker as one commit."""

    _sent: dict[Key, Holding]
    offsets: list[TopicPartition]

    @classmethod
    def of(cls, holdings: Iterable[Holding], *, again: bool = False) -> Commit | None:
        """Collect what is due of these partitions; None if nothing is.

        `again`: what is on its way counts as due too, because its answer would come too late.
        """
        sent: dict[Key, Holding] = {}
        offsets: list[TopicPartition] = []
        for holding in holdings:
            watermark = holding.lease.watermark  # read once: trio moves it
            known = holding.committed if again else holding.sent
            if watermark is not None and watermark != known:
                holding.sent = watermark
                sent[holding.key] = holding
                offsets.append(TopicPartition(*holding.key, watermark))
        return cls(sent, offsets) if sent else None

    def settle(self, answer: Iterable[TopicPartition], error: KafkaError | None = None) -> Answer:
        """Take note of the broker's answer: for each partition, or `error` for the whole commit."""
        if error is not None:
            for holding in self._sent.values():
                holding.sent = holding.committed
            said = error.str()
            return Answer((), tuple(f"{topic} [{number}]: {said}" for topic, number in self._sent))
        taken: list[OffsetRange] = []
        refused: list[str] = []
        for each in answer:
            key = each.topic, each.partition
            if key not in self._sent:
                continue  # an answer to something else
            holding = self._sent[key]
            if each.error is not None:
                holding.sent = holding.committed
                refused.append(f"{each.topic} [{each.partition}]: {each.error.str()}")
                continue
            first = holding.begin if holding.committed is None else holding.committed
            if first is not None and each.offset > first:
                holding.committed = each.offset
                lease = holding.lease
                taken.append(
                    OffsetRange(
                        topic=lease.topic,
                        partition=lease.partition,
                        first=first,
                        last=each.offset - 1,
                        generation=lease.generation,
                    )
                )
        return Answer(tuple(taken), tuple(refused))


@attrs.frozen
class Answer:
    """What the broker said to a commit."""

    taken: tuple[OffsetRange, ...]
    refused: tuple[str, ...]
    """One line per partition: which, and why."""
