"""The pump: the one thread that owns the Kafka consumer. Nothing else ever touches it.

Why one thread: from confluent-kafka 2.16 on a second thread is starved for as long as the first one polls, so a
commit or a pause from elsewhere never returns. Commands come in by a queue, everything else goes out to trio.

Rules:
1. `poll(t)`, then `consume(n - 1, 0)`: `consume(n, t)` would wait for n messages or the whole t. A wait lasts 0.1 s
   at most, so that commands are obeyed promptly.
2. A poll is delivered against a credit. Without credit the pump first just does not ask; after a second it pauses
   all partitions and goes on polling, so that the group never loses this member. (Pausing at once would throw away
   the client's prefetch at every hiccup.) A partition that is assigned meanwhile is paused too; a message that
   arrives all the same is kept.
3. Offsets are committed from here alone (`committing`), and brokers are asked from here alone (`inspection`).
4. A revoke blocks this thread until everything handed out of those partitions is accounted for, or the drain's limit,
   or shutdown. Lost partitions are never committed.
5. A partition that leaves is resumed first. The client keeps its pause otherwise, and it would stand still if it came
   back after all was resumed. Not when it comes back: a resume that meets the start of its fetching can be lost
   (librdkafka#5591). Nothing is fetched meanwhile: the client itself holds what it is about to take away.
6. If a partition stands still although it was read again and again, the pump leaves the group and joins it again, as
   the operator's restart would.
"""

from __future__ import annotations

import functools
import operator
import queue
import time
from math import inf
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from confluent_kafka import Consumer, KafkaError, KafkaException

from stationmaster.batch import Record
from stationmaster.events import (
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
    SourcePaused,
)
from stationmaster.kafka.assignment import Assignment, Drain
from stationmaster.kafka.committing import Committer
from stationmaster.kafka.handover import Command
from stationmaster.kafka.inspection import ANSWER_S, PROBE_FIRST_S, Inspector
from stationmaster.kafka.troubles import (
    ENDED_BY_ASSIGNMENT,
    ENDED_BY_RECORDS,
    ClientLog,
    Kind,
    Troubles,
    kind_of,
    source_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from confluent_kafka import Message, TopicPartition

    from stationmaster.kafka.assignment import Holding, Key
    from stationmaster.kafka.handover import Handover
    from stationmaster.kafka.settings import KafkaSettings

# Polls that may wait on the trio side: with one in use and one ready the thread is never idle.
CREDITS: Final = 2
_SLICE_S: Final = 0.1
_STALL_S: Final = 1.0
_LOOK_EVERY_S: Final = 1.0
# A turn polls, asks at most three things and obeys: well below this. One that ends a rebalance, or closes, may also
# wait for a coordinator that hangs: three tries of the client's `socket.timeout.ms`.
_TURN_LIMIT_S: Final = 10.0
_COORDINATOR_S: Final = 180.0
# With KIP-848 the client does not tell a member that gets no partitions: it counts as settled after so long.
_IDLE_S: Final = 10.0
# Not `message.headers()`: with a name that is not UTF-8 the client returns a list with a hole and leaves an error
# behind. A call from Python does not look for that once it is specialised (3.11), and goes on into the hole; this does.
_headers_of: Final = operator.methodcaller("headers")


@attrs.define(eq=False, kw_only=True)
class Pump:
    """Owns a consumer; `run` is the body of its thread. Only the attributes without an underscore are for others."""

    _commands: queue.SimpleQueue[Command]
    _settings: KafkaSettings
    _handover: Handover
    _token: trio.lowlevel.TrioToken

    paused: bool = attrs.field(default=False, init=False)
    max_poll_exceeded: int = attrs.field(default=0, init=False)
    rebalances: int = attrs.field(default=0, init=False)
    lost_partitions: int = attrs.field(default=0, init=False)
    offset_resets: int = attrs.field(default=0, init=False)
    unreadable_headers: int = attrs.field(default=0, init=False)
    last_drain_s: float | None = attrs.field(default=None, init=False)
    committer: Committer = attrs.field(init=False)
    last_turn: float = attrs.field(factory=time.monotonic, init=False)

    _consumer: Consumer = attrs.field(init=False)
    _stopping: bool = attrs.field(default=False, init=False)
    _closing: bool = attrs.field(default=False, init=False)
    _revoking: bool = attrs.field(default=False, init=False)
    _assigned: bool = attrs.field(default=False, init=False)
    """The group has told what is ours, and takes nothing away just now."""
    _leaving: bool = attrs.field(default=False, init=False)
    """It left the group, and joins again as soon as nothing is held any more."""
    _lost_at: float = attrs.field(default=-inf, init=False)
    _broken: bool = attrs.field(default=False, init=False)
    _credits: int = attrs.field(default=CREDITS, init=False)
    _kept: list[Record] = attrs.field(factory=list, init=False)
    _stalled_since: float | None = attrs.field(default=None, init=False)
    _assignment: Assignment = attrs.field(factory=Assignment, init=False)
    _heard: bool = attrs.field(default=False, init=False)
    """The client's queue was emptied since the last look at the partitions."""
    _next_look: float = attrs.field(default=0.0, init=False)
    _next_commit: float = attrs.field(default=0.0, init=False)
    _troubles: Troubles = attrs.field(init=False)
    inspector: Inspector = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Make the consumer: the one step that may refuse the configuration (KafkaException, TypeError)."""
        say = functools.partial(self._tell, self._handover.happened)
        self._troubles = Troubles(say)
        self.committer = Committer(self._troubles, say)
        callbacks = {"error_cb": self._on_error, "on_commit": self.committer.answered}
        self._consumer = Consumer(
            {**self._settings.client_configuration(), **callbacks}, logger=ClientLog(self._on_log)
        )
        self.inspector = Inspector(
            self._consumer,
            self._settings,
            self._assignment,
            self._troubles,
            self._on_error,
            next_probe=time.monotonic() + PROBE_FIRST_S,
        )

    @property
    def turn_limit_s(self) -> float:
        """How long a turn may take with what is done just now: beyond that the client hangs."""
        limit = _TURN_LIMIT_S + len(self._settings.topics) * ANSWER_S
        if self._stopping:
            limit += self._settings.close_timeout_s
        if self._revoking:
            limit += self._settings.drain_timeout_s + _COORDINATOR_S
        return limit

    @property
    def is_settled(self) -> bool:
        """Whether the group has told what is ours, perhaps nothing."""
        if self._assigned or self._revoking or self._settings.group_protocol == "classic":
            return self._assigned
        heard_at = self.inspector.first_heard_at
        return heard_at is not None and time.monotonic() - max(heard_at, self._lost_at) >= _IDLE_S

    @property
    def troubles(self) -> tuple[str, ...]:
        """The kinds of trouble that last."""
        return self._troubles.lasting

    # ------------------------------------------------------------------------------------------------- the thread

    def run(self) -> None:
        """Pump until STOP or a fatal error, then commit what is accounted for and close. Never raises."""
        for step in (self._pump, self._close):
            try:
                step()
            except Exception as error:  # noqa: BLE001 (the thread's edge: the error goes to whoever polls)
                self._fail(error)
        self._tell(self._handover.ended)

    def _pump(self) -> None:
        self._join()
        while not self._stopping:
            now = self.last_turn = time.monotonic()
            self._keep_house(now)
            if self._credits:
                self._resume()
                self._fetch()
            else:
                self._stall(now)
            while not self._commands.empty():
                self._obey(self._commands.get_nowait())

    def _join(self) -> None:
        self._consumer.subscribe(
            list(self._settings.topics),
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )

    def _keep_house(self, now: float) -> None:
        self.inspector.ask_standing()
        if self._leaving and not self._assignment.holdings:
            self._leaving, self._assigned, self._lost_at = False, False, now
            self._join()
        if now >= self._next_look:
            self._next_look = now + min(self._settings.commit_interval_s, _LOOK_EVERY_S)
            self.inspector.look(now, heard=self._heard)
            self._heard = False
            if self.inspector.watchdog.is_hopeless and not self._leaving:
                self._leaving = True
                self._consumer.unsubscribe()  # what is held is revoked in one of the next polls
        if now >= self._next_commit:
            self._next_commit = now + self._settings.commit_interval_s
            self.committer.send(self._consumer, self._assignment.holdings)
        self.inspector.probe_when_due(now)

    def _obey(self, command: Command) -> None:
        if command is Command.MORE:
            self._credits += 1
        else:
            self._stopping = True

    def _close(self) -> None:
        try:
            if not self._broken:
                # Half of the limit for the last commit, so that closing has the other half. Nothing of what these
                # polls may bring was handed out, so it is not lost.
                limit = time.monotonic() + self._settings.close_timeout_s / 2
                self._consumer.pause(self._consumer.assignment())
                self._commit_the_rest(limit)
        finally:
            # Whatever happens: a client that is collected unclosed may hang, and hold up everything with it.
            self._closing = True
            self._consumer.close()

    def _commit_the_rest(self, limit: float) -> None:
        """Commit until nothing is due: again while it is refused, as the broker does until a rebalance is over.

        What ends the rebalance for us are the polls in between.
        """
        self._await_commit(limit)
        while time.monotonic() < limit:
            self.committer.send(self._consumer, self._assignment.holdings)
            if not self.committer.awaits_answer:
                return
            refused = self.committer.refused
            self._await_commit(limit)
            if self.committer.refused > refused:
                self._consumer.poll(self._slice_s)

    def _await_commit(self, limit: float) -> None:
        while (
            self.committer.awaits_answer
            and time.monotonic() < limit
            and not self._troubles.is_cut_off
        ):
            self._consumer.poll(self._slice_s)

    # ---------------------------------------------------------------------------------------------------- records

    @property
    def _slice_s(self) -> float:
        return min(self._settings.poll_timeout_s, _SLICE_S)

    def _fetch(self) -> None:
        turnover = self._assignment.turnover
        records = [record for record in self._kept if self._assignment.holds(record)]
        self._kept.clear()
        room = self._settings.max_poll_messages - len(records)
        if room > 0:
            first = self._consumer.poll(0 if records else self._slice_s)
            if first is not None:
                self._read((first,), records)
                if room > 1:
                    self._read(self._consumer.consume(room - 1, 0), records)
        if len(records) < self._settings.max_poll_messages:
            self._heard = True
        if turnover != self._assignment.turnover:  # something left in a callback meanwhile
            records = [record for record in records if self._assignment.holds(record)]
        if records:
            self.inspector.heard()
            self._credits -= 1
            self._tell(self._handover.polled, records)
            if self._troubles.any_last:
                self._troubles.end(ENDED_BY_RECORDS)

    def _read(self, messages: Iterable[Message], records: list[Record]) -> None:
        """Turn messages into records; report errors among them; drop those whose partition is not ours."""
        topic: Any = None  # the client's types allow None for errors only
        partition: Any = None
        holding: Holding | None = None
        for message in messages:
            error = message.error()
            if error is not None:
                self._on_error(error)
                continue
            if message.partition() != partition or message.topic() != topic:  # they come in runs
                topic, partition = message.topic(), message.partition()
                holding = self._assignment.find((topic, partition))
            if holding is None:
                continue
            offset: Any = message.offset()
            if offset < holding.position:
                holding = self._rewind(holding, offset)
            elif holding.begin is None:
                holding.begin = offset
            holding.position = offset + 1
            clock, milliseconds = message.timestamp()
            value: Any = message.value()
            headers: Any
            try:
                headers = _headers_of(message)
            except (
                SystemError,
                UnicodeDecodeError,
            ):  # a name that is not UTF-8: the client shows none at all
                headers = None
                self.unreadable_headers += 1
            records.append(
                Record(
                    topic=topic,
                    partition=partition,
                    offset=offset,
                    timestamp_ms=milliseconds if clock else 0,
                    value=value,
                    generation=holding.lease.generation,
                    headers=tuple(headers) if headers else (),
                )
            )

    def _rewind(self, holding: Holding, offset: int) -> Holding:
        topic, partition = holding.key
        if not self._troubles.lasts(Kind.OFFSET_RESET):  # else the client has said it already
            self.offset_resets += 1
        self._troubles.begin(
            Kind.OFFSET_RESET,
            f"{topic} [{partition}] goes back from offset {holding.position} to {offset}: "
            "its log was cut or made anew",
        )
        fresh = self._assignment.hold(holding.key)
        fresh.begin = offset
        self._tell(self._handover.assigned, (fresh,))
        return fresh

    # ------------------------------------------------------------------------------------------------ backpressure

    def _stall(self, now: float) -> None:
        if self._stalled_since is None:
            self._stalled_since = now
        elif not self.paused and now - self._stalled_since >= _STALL_S:
            self._consumer.pause(self._consumer.assignment())
            self.paused = True
            self._tell(self._handover.happened, SourcePaused(paused=True))
        if self.paused and (message := self._consumer.poll(0)) is not None:
            self._read((message,), self._kept)
            self._consumer.pause(self._consumer.assignment())
        try:
            self._obey(self._commands.get(timeout=_SLICE_S))
        except queue.Empty:
            pass

    def _resume(self) -> None:
        self._stalled_since = None
        if self.paused:
            self._consumer.resume(self._consumer.assignment())
            self.paused = False
            self._tell(self._handover.happened, SourcePaused(paused=False))

    # --------------------------------------------------------------------------------------------------- rebalance

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._settings.is_incremental:
            consumer.incremental_assign(partitions)
        else:
            consumer.assign(partitions)
        if self.paused:
            consumer.pause(partitions)
        holdings = [self._assignment.hold((p.topic, p.partition)) for p in partitions]
        self._tell(self._handover.assigned, holdings)
        self.inspector.assigned(holdings)
        self.rebalances += bool(partitions)
        keys = tuple(holding.key for holding in holdings)
        self._assigned = True
        self._tell(self._handover.happened, PartitionsAssigned(partitions=keys))
        self._troubles.end(ENDED_BY_ASSIGNMENT)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Let them finish and commit. The client takes them away when this returns.

        Worst time: the drain's limit plus one synchronous commit. That has no limit of its own; with a coordinator
        that hangs just now it lasts the client's `socket.timeout.ms` (60 s), tried up to three times. It is left out
        when the brokers are known to be away.
        """
        began = time.monotonic()
        self._revoking, self._assigned = True, False
        drain = Drain(self._assignment.find_all(partitions))
        self._tell(self._handover.revoking, drain)
        if not self._stopping:
            drain.done.wait(self._settings.drain_timeout_s)
        drain_s = time.monotonic() - began
        drained = drain.is_empty
        if not self._closing:  # else closing has tried already
            drained = self.committer.send_and_wait(consumer, drain.holdings) and drained
        consumer.resume(partitions)  # rule 5
        self.rebalances += bool(partitions)
        self.last_drain_s = drain_s
        self._revoking, self._assigned = False, self._settings.is_incremental
        keys = self._forget(drain.holdings)
        event = PartitionsRevoked(partitions=keys, drain_s=drain_s, drained=drained)
        self._tell(self._handover.happened, event)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.resume(partitions)  # rule 5
        keys = self._forget(self._assignment.find_all(partitions))
        self._assigned, self._lost_at = False, time.monotonic()
        self.rebalances += bool(partitions)
        self.lost_partitions += len(keys)
        self._tell(self._handover.happened, PartitionsLost(partitions=keys))

    def _forget(self, holdings: Sequence[Holding]) -> tuple[Key, ...]:
        self._assignment.forget(holdings)
        self._tell(self._handover.left, holdings)
        return tuple(holding.key for holding in holdings)

    # ---------------------------------------------------------------------------------------------------- troubles

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._FATAL:  # noqa: SLF001 (the client's public names begin so)
            self._fail(KafkaException(error))
            return
        kind = kind_of(error.code())
        self.max_poll_exceeded += kind is Kind.MAX_POLL
        self._troubles.begin(kind, error.str())

    def _on_log(self, facility: str, line: str) -> None:
        if facility == "OFFSET":  # the client skips or rereads records, and says so in its log only
            self.offset_resets += 1
            self._troubles.begin(Kind.OFFSET_RESET, line)

    def _fail(self, error: Exception) -> None:
        self._stopping = self._broken = True
        if isinstance(error, KafkaException):
            error = source_error(error, self._settings)
        self._tell(self._handover.failed, error)

    def _tell(self, method: Callable[..., None], *args: object) -> None:
        try:
            self._token.run_sync_soon(method, *args)
        except trio.RunFinishedError:
            self._stopping = True  # nobody is left to hear
