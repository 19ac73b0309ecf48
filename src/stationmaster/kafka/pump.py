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
3. Offsets are committed from here alone: asynchronously, one commit at a time; synchronously only while partitions
   are being revoked, because afterwards it is too late.
4. A revoke blocks this thread until everything handed out of those partitions is accounted for, or the drain's limit,
   or shutdown. Lost partitions are never committed.
"""

from __future__ import annotations

import functools
import queue
import time
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from stationmaster.batch import Record
from stationmaster.errors import SourceError
from stationmaster.events import (
    OffsetsCommitted,
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
    SourcePaused,
)
from stationmaster.kafka.assignment import Assignment, Commit, Drain
from stationmaster.kafka.handover import Command
from stationmaster.kafka.troubles import (
    ENDED_BY_ALL_TOPICS,
    ENDED_BY_AN_ANSWER,
    ENDED_BY_ASSIGNMENT,
    ENDED_BY_RECORDS,
    Kind,
    Troubles,
    kind_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from confluent_kafka import Message

    from stationmaster.kafka.assignment import Answer, Holding, Key
    from stationmaster.kafka.handover import Handover
    from stationmaster.kafka.settings import KafkaSettings

# Polls that may wait on the trio side: with one in use and one ready the thread is never idle.
CREDITS: Final = 2
_SLICE_S: Final = 0.1
_STALL_S: Final = 1.0
_PROBE_FIRST_S: Final = 1.0
_PROBE_EVERY_S: Final = 5.0
_PROBE_TIMEOUT_S: Final = 0.5


@attrs.define(eq=False, kw_only=True)
class Pump:
    """Owns a consumer; `run` is the body of its thread. Only the attributes without an underscore are for others."""

    _commands: queue.SimpleQueue[Command]
    _settings: KafkaSettings
    _handover: Handover
    _token: trio.lowlevel.TrioToken

    paused: bool = attrs.field(default=False, init=False)
    max_poll_exceeded: int = attrs.field(default=0, init=False)
    last_turn: float = attrs.field(factory=time.monotonic, init=False)

    _consumer: Consumer = attrs.field(init=False)
    _stopping: bool = attrs.field(default=False, init=False)
    _broken: bool = attrs.field(default=False, init=False)
    _credits: int = attrs.field(default=CREDITS, init=False)
    _kept: list[Record] = attrs.field(factory=list, init=False)
    _stalled_since: float | None = attrs.field(default=None, init=False)
    _assignment: Assignment = attrs.field(factory=Assignment, init=False)
    _in_flight: Commit | None = attrs.field(default=None, init=False)
    """The commit that is on its way."""
    _next_commit: float = attrs.field(default=0.0, init=False)
    _next_probe: float = attrs.field(init=False)
    _troubles: Troubles = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Make the consumer: the one step that may refuse the configuration (KafkaException, TypeError)."""
        self._troubles = Troubles(functools.partial(self._tell, self._handover.happened))
        callbacks = {"error_cb": self._on_error, "on_commit": self._on_commit}
        self._consumer = Consumer(
            {**self._settings.client_configuration(), **callbacks}, logger=_ClientLog(self._on_log)
        )
        self._next_probe = time.monotonic() + _PROBE_FIRST_S

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
        self._consumer.subscribe(
            list(self._settings.topics),
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )
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

    def _keep_house(self, now: float) -> None:
        if now >= self._next_commit:
            self._next_commit = now + self._settings.commit_interval_s
            for holding in self._assignment.holdings:
                partition = TopicPartition(*holding.key)
                _, high = self._consumer.get_watermark_offsets(partition, cached=True)
                holding.high = high if high >= 0 else None
            self._commit()
            self._troubles.repeat()
        if now >= self._next_probe:
            self._next_probe = now + _PROBE_EVERY_S
            seen = self._assignment.topics
            if self._troubles.any_last or not seen.issuperset(self._settings.topics):
                self._probe()

    def _obey(self, command: Command) -> None:
        if command is Command.MORE:
            self._credits += 1
        else:
            self._stopping = True

    def _close(self) -> None:
        if not self._broken:
            # Half of the limit for the last commit, so that closing has the other half. Nothing of what these polls
            # may bring was handed out, so it is not lost.
            limit = time.monotonic() + self._settings.close_timeout_s / 2
            self._consumer.pause(self._consumer.assignment())
            self._await_commit(limit)
            self._commit()
            self._await_commit(limit)
        self._consumer.close()

    def _await_commit(self, limit: float) -> None:
        while self._in_flight is not None and time.monotonic() < limit and not self._is_cut_off:
            self._consumer.poll(self._slice_s)

    # ---------------------------------------------------------------------------------------------------- records

    @property
    def _slice_s(self) -> float:
        return min(self._settings.poll_timeout_s, _SLICE_S)

    def _fetch(self) -> None:
        records, self._kept = self._kept, []
        turnover = self._assignment.turnover
        room = self._settings.max_poll_messages - len(records)
        if room > 0:
            first = self._consumer.poll(0 if records else self._slice_s)
            if first is not None:
                self._read((first,), records)
                if room > 1:
                    self._read(self._consumer.consume(room - 1, 0), records)
        if turnover != self._assignment.turnover:  # something left in a callback meanwhile
            records = [record for record in records if self._assignment.holds(record)]
        if records:
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
            headers: Any = message.headers()
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

    # ---------------------------------------------------------------------------------------------------- offsets

    def _commit(self) -> None:
        """Send what is due; the answer comes to `_on_commit` in a later poll.

        Not while no broker can be reached: the client would keep the commit for 45 s, and could not close meanwhile.
        """
        if self._in_flight is not None or self._is_cut_off:
            return
        self._in_flight = Commit.of(self._assignment.holdings)
        if self._in_flight is not None:
            self._consumer.commit(offsets=self._in_flight.offsets, asynchronous=True)

    def _on_commit(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        commit, self._in_flight = self._in_flight, None
        if commit is not None:
            self._report_commit(commit.settle(offsets, error))

    def _commit_now(self, consumer: Consumer, commit: Commit) -> bool:
        """Commit and wait for the answer; return whether the broker took all of it."""
        if self._stopping or self._is_cut_off:
            return False  # closing has tried already; and with no broker this would hang
        try:
            offsets = consumer.commit(offsets=commit.offsets, asynchronous=False)
        except KafkaException as error:
            answer = commit.settle([], error.args[0])
        else:
            answer = commit.settle(offsets)
        self._report_commit(answer)
        return not answer.refused

    @property
    def _is_cut_off(self) -> bool:
        return self._troubles.lasts(Kind.NO_BROKER)

    def _report_commit(self, answer: Answer) -> None:
        if answer.taken:
            self._tell(self._handover.happened, OffsetsCommitted(offsets=answer.taken))
        if answer.refused:
            self._troubles.begin(Kind.COMMIT, "; ".join(answer.refused[:5]))
        else:
            self._troubles.end((Kind.COMMIT,))

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
        keys = tuple(holding.key for holding in holdings)
        self._tell(self._handover.happened, PartitionsAssigned(partitions=keys))
        self._troubles.end(ENDED_BY_ASSIGNMENT)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Let them finish and commit. The client takes them away when this returns.

        Worst time: the drain's limit plus one synchronous commit. That has no limit of its own; with a coordinator
        that hangs just now it lasts the client's `socket.timeout.ms` (60 s), tried up to three times. It is left out
        when the brokers are known to be away.
        """
        began = time.monotonic()
        drain = Drain(self._assignment.find_all(partitions))
        self._tell(self._handover.revoking, drain)
        if not self._stopping:
            drain.done.wait(self._settings.drain_timeout_s)
        drain_s = time.monotonic() - began
        drained = drain.is_empty
        commit = Commit.of(drain.holdings, again=True)
        if commit is not None:
            drained = self._commit_now(consumer, commit) and drained
        keys = self._forget(drain.holdings)
        event = PartitionsRevoked(partitions=keys, drain_s=drain_s, drained=drained)
        self._tell(self._handover.happened, event)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:  # noqa: ARG002 (its signature)
        keys = self._forget(self._assignment.find_all(partitions))
        self._tell(self._handover.happened, PartitionsLost(partitions=keys))

    def _forget(self, holdings: Sequence[Holding]) -> tuple[Key, ...]:
        self._assignment.forget(holdings)
        self._kept = [record for record in self._kept if self._assignment.holds(record)]
        self._tell(self._handover.left, holdings)
        return tuple(holding.key for holding in holdings)

    # ---------------------------------------------------------------------------------------------------- troubles

    def _probe(self) -> None:
        """Ask for the topics: tells what is wrong with them, and whether a broker answers at all.

        Needed because some errors come once and never again, and with KIP-848 an unknown topic is no error at all.
        """
        well = True
        for topic in self._settings.topics:
            try:
                found = self._consumer.list_topics(topic, timeout=_PROBE_TIMEOUT_S)
            except KafkaException as error:
                self._on_error(error.args[0])
                return
            problem = found.topics[topic].error
            if problem is not None:
                well = False
                self._troubles.begin(kind_of(problem.code()), f"topic {topic}: {problem.str()}")
        self._troubles.end(ENDED_BY_AN_ANSWER)
        if well:
            self._troubles.end(ENDED_BY_ALL_TOPICS)

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._fail(KafkaException(error))
            return
        kind = kind_of(error.code())
        self.max_poll_exceeded += kind is Kind.MAX_POLL
        self._troubles.begin(kind, error.str())

    def _on_log(self, facility: str, line: str) -> None:
        if facility == "OFFSET":  # the client skips or rereads records, and says so in its log only
            self._troubles.begin(Kind.OFFSET_RESET, line)

    def _fail(self, error: Exception) -> None:
        self._stopping = self._broken = True
        if isinstance(error, KafkaException):
            error = _source_error(error)
        self._tell(self._handover.failed, error)

    def _tell(self, method: Callable[..., None], *args: object) -> None:
        try:
            self._token.run_sync_soon(method, *args)
        except trio.RunFinishedError:
            self._stopping = True  # nobody is left to hear


def _source_error(error: KafkaException) -> SourceError:
    said = error.args[0]
    mapped = SourceError(
        f"the Kafka client cannot go on: {said.str()} ({said.name()}). Mend the cause, then start again; "
        "nothing uncommitted is lost"
    )
    mapped.__cause__ = error
    return mapped


@attrs.frozen
class _ClientLog:
    """Stands for the `logging.Logger` that the client takes; everything of use in its log is made an event."""

    _on_line: Callable[[str, str], None]

    def log(self, level: int, template: str, facility: str, client: str, line: str) -> None:  # noqa: ARG002
        """Take one line; called in the pump's thread while it polls."""
        self._on_line(facility, line)
