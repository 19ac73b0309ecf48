"""Dead letters on a Kafka topic: every letter is a record that ordinary Kafka tools can read.

    key       `topic/partition/offset/timestamp` of the record; of a rejected upload the same of its first record, `/`
              and its id
    value     the record's bytes, or the upload's body
    headers   the record's own, then these (UTF-8):
              stationmaster-reason, -detail, -topic, -partition, -offset, -timestamp (ms since the epoch),
              -batch-id (rejected uploads only)

Rules:
1. A topic cannot know what it holds: a letter that is kept again (after an error, after a crash) is there again, with
   the same key. By the key readers tell, and a compacted topic keeps the last one only.
2. Letters of one partition go to one partition, in order (of a topic that keeps its number of partitions).
3. A tombstone is an empty value with the header `stationmaster-tombstone`: a null value would delete itself in a
   compacted topic.
4. No letter is too large. One that the topic refuses for its size is kept in pieces: each has the header
   `stationmaster-piece` (`1/3`), and `#1/3` at the end of its key; put together they are the value. If not even a
   small piece is taken, the record's own headers are the trouble: they are left out, and
   `stationmaster-without-headers` says how many there were.
"""

from __future__ import annotations

import zlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio

from stationmaster.errors import StoreError
from stationmaster.kafka.deliveries import Fate, Outgoing
from stationmaster.kafka.producing import DELIVERY_S, KafkaProducer, open_producer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from stationmaster.batch import DeadLetter
    from stationmaster.kafka.deliveries import Delivery
    from stationmaster.kafka.settings import KafkaSettings

_PREFIX: Final = "stationmaster-"
_OURS: Final = frozenset(
    _PREFIX + name
    for name in (
        "reason",
        "detail",
        "topic",
        "partition",
        "offset",
        "timestamp",
        "batch-id",
        "tombstone",
        "piece",
        "without-headers",
    )
)
_SMALL_BYTES: Final = 4096
"""A piece of this size has room under every sensible limit."""
_LONGEST_S: Final = 60.0


@attrs.define(eq=False)
class KafkaDeadLetters:
    """A `stationmaster.abc.DeadLetters`; made by `open_kafka_dead_letters`."""

    topic: str
    _producer: KafkaProducer
    _partitions: int = attrs.field(default=0, init=False)
    """Of the topic, when it was there last."""
    _found: bool = attrs.field(default=False, init=False)
    """It was there when it was looked for, and nothing but sizes was refused since."""

    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        """Keep all of them: acknowledged by all replicas in sync when this returns. A minute or so at most.

        A letter that was kept already is there twice, with the same key.

        Raises:
            StoreError: brokers are away, or the topic is missing or forbidden; some of the letters may be there. Keep
                all of them again later.

        Once the write began, cancellation waits for its end and this returns.
        """
        await self._find_topic()
        done = False
        with trio.CancelScope(shield=True, relative_deadline=_LONGEST_S):
            deliveries = await self._producer.produce([self._compose(each) for each in letters])
            for letter, delivery in zip(letters, deliveries, strict=True):
                if delivery.fate is Fate.TOO_LARGE:
                    await self._keep_in_pieces(letter)
                else:
                    self._demand(delivery)
            done = True
        if not done:
            raise StoreError(
                f"the topic {self.topic} did not take {len(letters)} dead letters within {_LONGEST_S:g} s",
                kind="broker",
            )

    async def _find_topic(self) -> None:
        """See to it that the topic is there: producing might create it, with whatever the brokers think of."""
        if self._found:
            await trio.lowlevel.checkpoint()
            return
        counts = await self._producer.count_partitions()
        if self.topic not in counts:
            raise StoreError(
                f"the topic {self.topic} for dead letters does not exist, or this user may not see it; "
                "create it (`kafka-topics.sh --create`), or permit it",
                kind="broker",
            )
        self._partitions, self._found = counts[self.topic], True

    async def _keep_in_pieces(self, letter: DeadLetter) -> None:
        """Keep a letter that was refused whole, in as few pieces as the topic takes."""
        for most_bytes, with_headers in _ways_to_cut(len(letter.value or b"")):
            first, *rest = self._cut(letter, most_bytes, with_headers=with_headers)
            (delivery,) = await self._producer.produce([first])
            if delivery.fate is not Fate.TOO_LARGE:
                for each in (delivery, *await self._producer.produce(rest)):
                    self._demand(each)
                return
        raise StoreError(
            f"the topic {self.topic} for dead letters refuses even {_SMALL_BYTES} bytes for their size; "
            "raise its `max.message.bytes`",
            kind="broker",
        )

    def _cut(
        self, letter: DeadLetter, most_bytes: int, *, with_headers: bool
    ) -> Iterator[Outgoing]:
        more: list[tuple[str, bytes | None]] = []
        if not with_headers:
            more.append((_PREFIX + "without-headers", b"%d" % len(letter.headers)))
            letter = attrs.evolve(letter, headers=())
        whole = self._compose(letter, more)
        value = whole.value or b""
        count = max(1, -(-len(value) // most_bytes))
        if count == 1:
            yield whole
            return
        for number in range(1, count + 1):
            name = b"%d/%d" % (number, count)
            yield attrs.evolve(
                whole,
                key=b"%s#%s" % (whole.key, name),
                value=value[(number - 1) * most_bytes : number * most_bytes],
                headers=(*whole.headers, (_PREFIX + "piece", name)),
            )

    def _compose(
        self, letter: DeadLetter, more: Sequence[tuple[str, bytes | None]] = ()
    ) -> Outgoing:
        origin = f"{letter.topic}/{letter.partition}"
        key = f"{origin}/{letter.offset}/{letter.timestamp_ms}"
        facts = {
            "reason": letter.reason,
            "detail": letter.detail,
            "topic": letter.topic,
            "partition": str(letter.partition),
            "offset": str(letter.offset),
            "timestamp": str(letter.timestamp_ms),
        }
        if letter.batch_id:
            facts["batch-id"] = letter.batch_id
            key += f"/{letter.batch_id}"
        if letter.value is None:
            facts["tombstone"] = "true"
        return Outgoing(
            topic=self.topic,
            partition=zlib.crc32(_encode(origin)) % self._partitions,
            key=_encode(key),
            value=letter.value or b"",
            headers=(
                *((name, value) for name, value in letter.headers if name not in _OURS),
                *((_PREFIX + name, _encode(text)) for name, text in facts.items()),
                *more,
            ),
        )

    def _demand(self, delivery: Delivery) -> None:
        if delivery.fate is Fate.ACKNOWLEDGED:
            return
        self._found = False
        advice = (
            "Check the topic and its permissions"
            if delivery.fate is Fate.REFUSED
            else "Check the brokers and the network"
        )
        raise StoreError(
            f"the topic {self.topic} does not take dead letters: {delivery.detail}. {advice}",
            kind="broker",
        )


@asynccontextmanager
async def open_kafka_dead_letters(
    settings: KafkaSettings, *, topic: str, delivery_s: float = DELIVERY_S
) -> AsyncIterator[KafkaDeadLetters]:
    """Open the topic that takes dead letters. Brokers or a topic that are missing are `keep`'s errors, not this one's.

    Args:
        settings: how to connect; what is about reading is not used.
        topic: must exist; should be kept for long, and be none of those that are read.
        delivery_s: how long the client tries to deliver a letter.

    Raises:
        ConfigError: the client refuses an option.
    """
    async with open_producer(settings, delivery_s=delivery_s) as producer:
        yield KafkaDeadLetters(topic, producer)


def _ways_to_cut(size: int) -> Iterator[tuple[int, bool]]:
    """Yield (bytes in a piece, with the record's own headers), the best way first."""
    for with_headers in (True, False):
        most_bytes = max(1, size)
        if not with_headers:
            yield most_bytes, False
        while most_bytes > _SMALL_BYTES:
            most_bytes = -(-most_bytes // 2)
            yield most_bytes, with_headers


def _encode(text: str) -> bytes:
    """Return any text as UTF-8, lone surrogates escaped."""
    return text.encode("utf-8", "backslashreplace")
