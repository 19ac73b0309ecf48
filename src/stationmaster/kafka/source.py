"""The Kafka source: at-least-once reading of topics as a member of a consumer group.

    async with open_kafka_source(settings, observer=observer) as source:
        records = await source.poll()
        source.account(OffsetRange(...))

Only the contiguous prefix of accounted records is committed: at most once per `commit_interval_s`, at a revoke and at
the end. The client lives in a thread of its own (`pump`); `handover` is what lies between it and trio.
"""

from __future__ import annotations

import threading
import time
from contextlib import asynccontextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING

import attrs
import trio
from confluent_kafka import KafkaException

from stationmaster.abc import NullObserver
from stationmaster.errors import ConfigError
from stationmaster.events import SourceTrouble
from stationmaster.kafka.handover import Command, Handover
from stationmaster.kafka.pump import Pump
from stationmaster.kafka.settings import key_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from stationmaster.abc import Observer, Withdrawn
    from stationmaster.batch import OffsetRange, Record
    from stationmaster.kafka.assignment import Holding
    from stationmaster.kafka.settings import KafkaSettings


@attrs.frozen(kw_only=True)
class PartitionStatistics:
    """One assigned partition."""

    topic: str
    partition: int
    generation: int
    committed: int | None
    """The next offset to read after a restart, as far as this assignment has committed."""
    high_watermark: int | None
    """The log's end as last told."""
    lag: int | None
    """Offsets up to the log's end that the group has not committed. Known about a second after the assignment, records
    or not; later (with the first record) if the coordinator does not answer, or if `start` is "latest" and nothing is
    committed."""
    outstanding: int
    """Records that were handed out and are not yet below the watermark."""


@attrs.frozen(kw_only=True)
class KafkaStatistics:
    """How the source stands."""

    partitions: tuple[PartitionStatistics, ...]
    paused: bool
    max_poll_exceeded: int
    """How often the group went on without us because the client's thread was held up."""
    rebalances: int
    """How often partitions came, went, or were lost."""
    lost_partitions: int
    """Partitions that were taken away without a chance to commit."""
    last_drain_s: float | None
    """How long the last revoke waited for what was handed out; None: there was no revoke."""
    commit_errors: int
    """Offsets that the broker refused: one for each partition and try. They are sent again while they can be."""
    offset_resets: int
    """How often a partition was not read on from where it stood, because that is not in its log."""
    stalls: int
    """How often a partition had records and delivered none for `progress_timeout_s`, and was read again."""
    unreadable_headers: int
    """Records whose headers have a name that is not UTF-8: they come without headers."""
    dropped_polls: int
    """Polls that arrived after closing; they come again after a restart."""
    pump_idle_s: float
    """Seconds since the client's thread began its last turn: much more than a second means that it hangs, or that
    a revoke is being drained."""
    pump_limit_s: float = 10.0
    """What `pump_idle_s` may be with what the thread does just now; beyond that it hangs."""
    pump_alive: bool = True
    """Whether the thread is there: it ends when the source is left, or by a fatal error."""
    broker_silent_s: float | None = None
    """Seconds since a broker answered anything; None: none has yet. One that is silent for 5 s is asked."""
    is_settled: bool = False
    """Whether the group has told us which partitions are ours (perhaps none), and takes none away just now."""
    troubles: tuple[str, ...] = ()
    """The kinds of trouble that last (see `SourceTrouble`)."""


class KafkaSource:
    """A `stationmaster.abc.Source`. Made by `open_kafka_source`."""

    def __init__(self, handover: Handover, pump: Pump, thread: threading.Thread) -> None:
        self._handover = handover
        self._pump = pump
        self._thread = thread

    async def poll(self) -> Sequence[Record]:
        """Wait for the next records: at least one, at most `max_poll_messages`, in order within each partition.

        Raises:
            SourceError: the client met a fatal error.
            trio.ClosedResourceError: the source was left.

        Cancellation loses no record. For one task at a time.
        """
        return await self._handover.poll()

    def account(self, offsets: OffsetRange, /) -> None:
        """See `stationmaster.abc.Source.account`."""
        self._handover.account(offsets)

    def watch_withdrawals(
        self,
        on_withdrawn: Callable[[Withdrawn], None],
        /,
        *,
        on_leaving: Callable[[Withdrawn], Sequence[OffsetRange]] | None = None,
    ) -> None:
        """See `stationmaster.abc.Source.watch_withdrawals`. A later watcher takes the place of the one before.

        Told: partitions that were revoked (when their drain is over, in time or not) or lost, and those whose log was
        cut or made anew, which go on at once under a new generation. No record of what was told is returned by a later
        `poll`. Nothing is told once the source is being left.
        """
        self._handover.on_withdrawn, self._handover.on_leaving = on_withdrawn, on_leaving

    def statistics(self) -> KafkaStatistics:
        """Return how the source stands now; cheap, asks no broker."""
        pump, now = self._pump, time.monotonic()
        heard_at = pump.inspector.heard_at
        return KafkaStatistics(
            partitions=tuple(_describe(holding) for holding in self._handover.holdings.values()),
            paused=pump.paused,
            max_poll_exceeded=pump.max_poll_exceeded,
            rebalances=pump.rebalances,
            lost_partitions=pump.lost_partitions,
            last_drain_s=pump.last_drain_s,
            commit_errors=pump.committer.refused,
            offset_resets=pump.offset_resets,
            stalls=pump.inspector.watchdog.stalls,
            unreadable_headers=pump.unreadable_headers,
            dropped_polls=self._handover.dropped_polls,
            pump_idle_s=now - pump.last_turn,
            pump_limit_s=pump.turn_limit_s,
            pump_alive=self._thread.is_alive(),
            broker_silent_s=None if heard_at is None else now - heard_at,
            is_settled=pump.is_settled,
            troubles=pump.troubles,
        )


def _describe(holding: Holding) -> PartitionStatistics:
    lease = holding.lease
    return PartitionStatistics(
        topic=lease.topic,
        partition=lease.partition,
        generation=lease.generation,
        committed=holding.committed,
        high_watermark=holding.high,
        lag=holding.lag,
        outstanding=lease.outstanding,
    )


@asynccontextmanager
async def open_kafka_source(
    settings: KafkaSettings, *, observer: Observer | None = None
) -> AsyncIterator[KafkaSource]:
    """Join the group and read. A broker that is away is waited for: that is an event, not an error.

    Leaving commits what is accounted for and leaves the group, within `close_timeout_s` even if the body was
    cancelled; a client that hangs longer is left to its daemon thread, with a `SourceTrouble` event. Await nothing
    of the source's records after that: what was not accounted comes again.

    Raises:
        ConfigError: the client refuses an option.
    """
    commands: SimpleQueue[Command] = SimpleQueue()
    if observer is None:
        observer = NullObserver()
    handover = Handover(observer, commands)
    try:
        pump = Pump(
            commands=commands,
            settings=settings,
            handover=handover,
            token=trio.lowlevel.current_trio_token(),
        )
    except (KafkaException, TypeError) as error:
        said = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        raise ConfigError([f"{key_in(said)}: {said}"]) from error
    thread = threading.Thread(target=pump.run, name="stationmaster pump", daemon=True)
    thread.start()
    try:
        yield KafkaSource(handover, pump, thread)
    finally:
        handover.close()
        with trio.CancelScope(shield=True, relative_deadline=settings.close_timeout_s):
            await handover.has_ended.wait()
        if not handover.has_ended.is_set():
            detail = (
                f"the client did not close within {settings.close_timeout_s:g} s; its thread is left behind, "
                "and what was not committed comes again"
            )
            handover.observer = NullObserver()  # what the thread may still say is nobody's any more
            observer.observe(SourceTrouble(kind="close", detail=detail))
    handover.raise_what_nobody_saw()
