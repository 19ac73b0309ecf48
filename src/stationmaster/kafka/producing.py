"""A producer for what must not be lost: acks from all replicas, idempotent, and an answer for every record.

    async with open_producer(settings) as producer:
        deliveries = await producer.produce(records)

Rules:
1. One thread owns the client; nothing else touches it (see `pump` for why). It ends with `open_producer`; one that
   hangs is left behind after a while.
2. Every record gets its answer within a bounded time: the broker's, or LATE.
3. Records that a broker refuses for their size are sent once more, each alone: it judges a whole batch of the
   client's making, and one large record would take its neighbours with it.
4. After an error that the client calls fatal (its idempotence is gone), or that nobody foresaw, a new client is made
   when nothing is open. If none can be made (its files are missing, no thread is to be had), the answers say so, and
   it is tried for again after each of them, and once a second.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import outcome
import trio
from confluent_kafka import KafkaError, KafkaException, Producer

from stationmaster.errors import ConfigError, StoreError
from stationmaster.kafka.deliveries import Delivery, Fate, Outgoing, judge, producer_configuration
from stationmaster.kafka.settings import key_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from outcome import Outcome

    from stationmaster.kafka.settings import KafkaSettings

DELIVERY_S: Final = 10.0
_SLICE_S: Final = 0.05
_IDLE_S: Final = 1.0
_MARGIN_S: Final = 2.0  # the client looks at its time-outs once a second
_CLOSE_S: Final = 5.0


@attrs.define(eq=False)
class _Job:
    """Records on their way: the thread's alone until `done` is called."""

    records: tuple[Outgoing, ...]
    deadline: float
    """On the monotonic clock: what has no answer by then gets none."""
    done: Callable[[], None]
    deliveries: list[Delivery | None] = attrs.field(init=False)
    outstanding: int = attrs.field(default=0, init=False)
    """Handed to the client, and not answered."""
    too_large: deque[int] = attrs.field(factory=deque, init=False)
    """Refused in company, to be sent alone."""

    def __attrs_post_init__(self) -> None:
        """Begin with no answers."""
        self.deliveries = [None] * len(self.records)


@attrs.define(eq=False, kw_only=True)
class _Post:
    """Owns a client; `run` is the body of its thread. The others only put commands, for this thread to call."""

    _configuration: dict[str, Any]
    _ended: Callable[[], None]
    commands: queue.SimpleQueue[Callable[[], None]] = attrs.field(factory=queue.SimpleQueue)
    """Bounded by whoever waits for an answer: there is one for each caller."""
    _client: Producer = attrs.field(init=False)
    _open: list[_Job] = attrs.field(factory=list, init=False)
    _broken: bool = attrs.field(default=False, init=False)
    """The client met a fatal error (it refuses everything from now on), or one that nobody foresaw."""
    _trouble: str = attrs.field(default="", init=False)
    """What the client said last of its connections, since they worked, or what it failed with."""
    _stopping: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        """Make the client: the one step that may refuse the configuration (KafkaException)."""
        self._client = self._make()

    def _make(self) -> Producer:
        return Producer({**self._configuration, "error_cb": self._on_error})

    def _on_error(self, error: KafkaError) -> None:
        # That all are down says less than why the last one is; older clients tell both, in this order.
        if error.code() != KafkaError._ALL_BROKERS_DOWN or not self._trouble:  # noqa: SLF001 (the client's public name)
            self._trouble = error.str()

    def run(self) -> None:
        """Obey until stopped, then give up what is open and close. No error ends it: nobody would see that."""
        try:
            while not self._stopping:
                try:
                    self._obey()
                    self._client.poll(_SLICE_S if self._open else 0)
                    self._settle()
                except Exception as error:  # noqa: BLE001 (the thread's edge: the error goes into the answers)
                    self._give_up(error)
        finally:
            for job in self._open:
                job.done()
            self._client.purge()
            self._client.flush(_SLICE_S)
            del self._client  # here, not in trio's thread: it waits for the client's own threads
            self._ended()

    def take(self, job: _Job) -> None:
        """Send the records of a job."""
        self._open.append(job)
        for index in range(len(job.records)):
            self._send(job, index, in_company=len(job.records) > 1)

    def count_partitions(
        self, timeout_s: float, answered: Callable[[Outcome[dict[str, int]]], None]
    ) -> None:
        """Ask the brokers how many partitions each topic has; to ask for one topic might create it."""

        def ask() -> dict[str, int]:
            topics = self._client.list_topics(timeout=timeout_s).topics
            counts = {name: len(topic.partitions) for name, topic in topics.items()}
            return {name: count for name, count in counts.items() if count}

        answered(outcome.capture(ask))

    def stop(self) -> None:
        """End after this command."""
        self._stopping = True

    def _obey(self) -> None:
        try:
            command = self.commands.get(timeout=0 if self._open else _IDLE_S)
        except queue.Empty:
            return
        command()

    def _send(self, job: _Job, index: int, *, in_company: bool) -> None:
        """Hand a record to the client; while its queue is full, wait for room."""
        record = job.records[index]
        more: dict[str, Any] = {"timestamp": record.timestamp_ms, "headers": list(record.headers)}
        if record.partition is not None:
            more["partition"] = record.partition

        def on_delivery(error: KafkaError | None, _: object) -> None:
            job.outstanding -= 1
            delivery = self._judge(error)
            if delivery.fate is Fate.TOO_LARGE and in_company:
                job.too_large.append(index)
            else:
                job.deliveries[index] = delivery

        while time.monotonic() < job.deadline:
            try:
                self._client.produce(
                    record.topic, record.value, record.key, on_delivery=on_delivery, **more
                )
            except BufferError:
                self._client.poll(_SLICE_S)
            except KafkaException as error:
                said: KafkaError = error.args[0]
                job.deliveries[index] = self._judge(said)
                return
            else:
                job.outstanding += 1
                return

    def _judge(self, error: KafkaError | None) -> Delivery:
        delivery = judge(error)
        self._broken |= error is not None and error.code() == KafkaError._FATAL  # noqa: SLF001
        if delivery.fate is Fate.ACKNOWLEDGED:
            self._trouble = ""
        elif delivery.fate is Fate.LATE and self._trouble:
            return attrs.evolve(delivery, detail=f"{delivery.detail} ({self._trouble})")
        return delivery

    def _settle(self) -> None:
        """End the jobs that have all their answers, or no time left."""
        still_open: list[_Job] = []
        for job in self._open:
            if time.monotonic() < job.deadline and not job.outstanding and job.too_large:
                self._send(job, job.too_large.popleft(), in_company=False)
            if time.monotonic() < job.deadline and (job.outstanding or job.too_large):
                still_open.append(job)
            else:
                job.done()
        self._open = still_open
        if self._broken and not self._open:
            self._client.purge()
            self._client = self._make()
            self._broken, self._trouble = False, ""

    def _give_up(self, error: Exception) -> None:
        """Answer what is open, and want a new client: nobody knows what the old one is still good for."""
        self._broken, self._trouble = True, f"the client failed: {error!r}"
        late = Delivery(fate=Fate.LATE, detail=self._trouble)
        for job in self._open:
            job.deliveries = [delivery or late for delivery in job.deliveries]
            job.done()
        self._open.clear()


@attrs.define(eq=False)
class KafkaProducer:
    """Made by `open_producer`. Any number of tasks may use it at once."""

    _post: _Post
    _token: trio.lowlevel.TrioToken
    _delivery_s: float
    _closed: bool = attrs.field(default=False, init=False)

    async def produce(self, records: Sequence[Outgoing], /) -> tuple[Delivery, ...]:
        """Produce all of them and return the answer for each, in order; what a broker does is never raised.

        Takes at most the delivery time twice, and a few seconds. Once it began, cancellation waits for its end and
        this returns: the caller knows what became of its records.

        Raises:
            trio.ClosedResourceError: the producer was left.
        """
        await trio.lowlevel.checkpoint()
        self._check_open()
        done = trio.Event()
        limit_s = 2 * self._delivery_s + _MARGIN_S
        job = _Job(tuple(records), time.monotonic() + limit_s, self._teller(done.set))
        self._post.commands.put(partial(self._post.take, job))
        with trio.CancelScope(shield=True, relative_deadline=limit_s + _MARGIN_S):
            await done.wait()
        return tuple(delivery or _UNANSWERED for delivery in tuple(job.deliveries))

    async def count_partitions(self) -> dict[str, int]:
        """Return topic -> number of partitions, of all topics that this client may see.

        One that is just being created, or deleted, is listed without any: it is not there, and left out.

        Raises:
            StoreError: no broker answers.
            trio.ClosedResourceError: the producer was left.
        """
        await trio.lowlevel.checkpoint()
        self._check_open()
        answers: list[Outcome[dict[str, int]]] = []
        done = trio.Event()
        tell = self._teller(done.set)

        def answered(answer: Outcome[dict[str, int]]) -> None:
            answers.append(answer)
            tell()

        self._post.commands.put(partial(self._post.count_partitions, self._delivery_s, answered))
        with trio.move_on_after(2 * self._delivery_s + _MARGIN_S):
            await done.wait()
        try:
            if answers:
                return answers[0].unwrap()
        except KafkaException as error:
            text = f"Kafka does not tell its topics: {error.args[0].str()}. Check the brokers and the network"
            raise StoreError(text, kind="broker") from error
        raise StoreError("Kafka does not tell its topics: its client hangs", kind="broker")

    def close(self) -> None:
        """Let the thread end after what it does now."""
        self._closed = True
        self._post.commands.put(self._post.stop)

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError

    def _teller(self, call: Callable[[], None]) -> Callable[[], None]:
        return partial(tell, self._token, call)


_UNANSWERED: Final = Delivery(fate=Fate.LATE, detail="the client gave no answer in time")


def tell(token: trio.lowlevel.TrioToken, call: Callable[[], None]) -> None:
    """Call this in trio's thread, if trio still runs."""
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(call)


@asynccontextmanager
async def open_producer(
    settings: KafkaSettings, *, delivery_s: float = DELIVERY_S
) -> AsyncIterator[KafkaProducer]:
    """Open a producer to the brokers that the settings name. Brokers that are away are an answer, not an error.

    Args:
        settings: how to connect; what is about reading is not used.
        delivery_s: how long the client tries to deliver a record.

    Leaving takes a few seconds at most; a client that hangs is left to its daemon thread.

    Raises:
        ConfigError: the client refuses an option.
    """
    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()
    configuration = producer_configuration(settings, delivery_s=delivery_s)
    try:
        post = _Post(configuration=configuration, ended=partial(tell, token, ended.set))
    except KafkaException as error:
        said = error.args[0].str()
        raise ConfigError([f"{key_in(said)}: {said}"]) from error
    threading.Thread(target=post.run, name="stationmaster producer", daemon=True).start()
    producer = KafkaProducer(post, token, delivery_s)
    try:
        yield producer
    finally:
        producer.close()
        with trio.CancelScope(shield=True, relative_deadline=_CLOSE_S):
            await ended.wait()
