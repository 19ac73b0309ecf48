"""Dead letters on their way back: records to their topic or into a file, rejected uploads into the outbox.

Rules:
1. A letter is deleted only after what it became is safe: acknowledged by all replicas in sync, on the disk, or in the
   outbox by the same transaction. An interruption leaves every letter in one place at least; a record may come twice.
2. A page at a time, oldest first: memory is bounded, and an interruption costs one page.
3. What comes back as a dead letter while this runs is not requeued again: a walk ends with the last letter there was.
"""

from __future__ import annotations

import os
import signal
import time
from base64 import b64decode
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import orjson
import trio

from stationmaster.errors import StoreError, plain_errors
from stationmaster.kafka.deliveries import ACKNOWLEDGED, Delivery, Fate, Outgoing
from stationmaster.kafka.producing import open_producer
from stationmaster.service.config_rules import printable
from stationmaster.state.rows import Move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from stationmaster.kafka import KafkaSettings
    from stationmaster.kafka.producing import KafkaProducer
    from stationmaster.state.inspection import StateFile
    from stationmaster.state.rows import Chosen, LetterRow

HEADER: Final = "stationmaster-requeued-from"
"""`topic/partition/offset` that the record had when it became a dead letter."""

_PAGE_ROWS: Final = 500
_PAGE_BYTES: Final = 4 * 1024 * 1024
_TOLD_EVERY_S: Final = 1.0


@attrs.frozen
class Letter:
    """A dead letter with its value."""

    row: LetterRow
    value: bytes | None


class Destination(Protocol):
    """Where records go."""

    async def send(self, letters: Sequence[Letter], /) -> Sequence[Delivery]:
        """Send them on; what is acknowledged is durable there.

        Raises:
            StoreError: none of them may be counted on.
        """
        ...


@attrs.define(eq=False)
class Tally:
    """What became of the letters."""

    records: int = 0
    uploads: int = 0
    stayed: Counter[str] = attrs.field(factory=Counter)
    """Why -> how many."""
    interrupted: bool = False

    @property
    def moved(self) -> int:
        """Letters that are gone, because they are elsewhere."""
        return self.records + self.uploads


# ------------------------------------------------------------------------------------------------------- destinations


@attrs.frozen
class Topics:
    """Every record to its own topic: same value, headers and timestamp, no key.

    And to its own partition if that still exists, so that records which stood in order there do so again.
    """

    _producer: KafkaProducer
    _partitions: dict[str, int]

    async def send(self, letters: Sequence[Letter], /) -> Sequence[Delivery]:
        """Produce them; a record whose topic is gone is refused here, lest producing create it."""
        known = [each for each in letters if each.row.topic in self._partitions]
        answers = iter(await self._producer.produce([self._compose(each) for each in known]))
        return [
            next(answers) if each.row.topic in self._partitions else _no_topic(each.row.topic)
            for each in letters
        ]

    def _compose(self, letter: Letter) -> Outgoing:
        row = letter.row
        place = f"{row.topic}/{row.partition}/{row.offset}"
        headers = [
            (name, None if value is None else b64decode(value))
            for name, value in orjson.loads(row.headers)
            if name != HEADER
        ]
        return Outgoing(
            topic=row.topic,
            partition=row.partition if row.partition < self._partitions[row.topic] else None,
            value=letter.value,
            headers=(*headers, (HEADER, place.encode())),
            timestamp_ms=row.timestamp_ms,
        )


def _no_topic(topic: str) -> Delivery:
    return Delivery(fate=Fate.REFUSED, detail=f"the topic {topic} does not exist")


@asynccontextmanager
async def open_topics(settings: KafkaSettings) -> AsyncIterator[Topics]:
    """Open the topics that records came from.

    Raises:
        ConfigError: the client refuses an option.
        StoreError: no broker answers.
    """
    async with open_producer(settings) as producer:
        yield Topics(producer, await producer.count_partitions())


@attrs.frozen
class LinesFile:
    """A JSON Lines file that `stationmaster replay` reads: one value a line, appended.

    Line feeds in a value become spaces: in JSON they stand between tokens only, and what is no JSON is none after it.
    A tombstone is an empty line.
    """

    path: Path

    async def send(self, letters: Sequence[Letter], /) -> Sequence[Delivery]:
        """Append them; on the disk when this returns."""
        await trio.lowlevel.checkpoint()
        lines = [(each.value or b"").replace(b"\n", b" ") + b"\n" for each in letters]
        try:
            self._append(lines)
        except OSError as error:
            text = f"{self.path} cannot be written ({error.strerror})"
            raise StoreError(text, kind="disk-error") from error
        return [ACKNOWLEDGED] * len(letters)

    def _append(self, lines: Sequence[bytes]) -> None:
        is_new = not self.path.exists()
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn by a crash: its letters are still there
                    file.write(b"\n")
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


# -------------------------------------------------------------------------------------------------------- the way back


@attrs.define(eq=False, kw_only=True)
class Requeue:
    """One run. It blocks the loop where it works on files: nobody else lives there."""

    _state: StateFile
    _destination: Destination | None
    """None: there are no records among the letters. A file takes rejected uploads as well."""
    _outbox_max_bytes: int
    _tell: Callable[[Tally], None]
    """Called about once a second."""
    tally: Tally = attrs.field(factory=Tally, init=False)
    _page: list[Letter] = attrs.field(factory=list, init=False)
    _page_bytes: int = attrs.field(default=0, init=False)
    _told_at: float = attrs.field(factory=time.monotonic, init=False)

    async def run(self, chosen: Chosen, *, limit: int | None) -> None:
        """Requeue the chosen letters, `limit` at most; end early after SIGINT or SIGTERM, with whole letters.

        Raises:
            StoreError: broker, disk or outbox take no more now; what was done is in the tally.
        """
        with (
            plain_errors(),
            trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, signals, nursery.cancel_scope)
                for number, row in enumerate(self._state.letters(chosen)):
                    if number == limit:
                        break
                    if row.batch_id and not self._is_for_file:
                        await self._move(row)
                    else:
                        await self._take(row)
                await self._send_page()
                nursery.cancel_scope.cancel()

    async def _listen(self, signals: AsyncIterator[int], running: trio.CancelScope) -> None:
        async for _ in signals:
            self.tally.interrupted = True
            running.cancel()

    @property
    def _is_for_file(self) -> bool:
        return isinstance(self._destination, LinesFile)

    async def _move(self, row: LetterRow) -> None:
        await trio.lowlevel.checkpoint()
        match self._state.move_to_outbox(row.seq, max_bytes=self._outbox_max_bytes):
            case Move.DONE:
                self.tally.uploads += 1
            case Move.HELD:
                self.tally.stayed["the outbox still holds this batch"] += 1
            case Move.GONE:
                pass  # another process was quicker

    async def _take(self, row: LetterRow) -> None:
        with suppress(KeyError):  # another process was quicker
            self._page.append(Letter(row, self._state.value(row.seq)))
        self._page_bytes += row.value_bytes + len(row.headers)
        if len(self._page) >= _PAGE_ROWS or self._page_bytes >= _PAGE_BYTES:
            await self._send_page()
        else:
            await trio.lowlevel.checkpoint()

    async def _send_page(self) -> None:
        page, self._page, self._page_bytes = self._page, [], 0
        if not page:
            await trio.lowlevel.checkpoint()
            return
        assert self._destination is not None  # noqa: S101 - whoever began this looked for records
        deliveries = await self._destination.send(page)
        done = [
            letter.row.seq
            for letter, delivery in zip(page, deliveries, strict=True)
            if delivery.fate is Fate.ACKNOWLEDGED
        ]
        self._state.delete_letters(done)
        self.tally.records += len(done)
        late = next((each.detail for each in deliveries if each.fate is Fate.LATE), None)
        self.tally.stayed.update(
            printable(each.detail) for each in deliveries if each.fate is not Fate.ACKNOWLEDGED
        )
        if late is not None:
            raise StoreError(f"Kafka does not take records now: {late}", kind="broker")
        if time.monotonic() - self._told_at >= _TOLD_EVERY_S:
            self._told_at = time.monotonic()
            self._tell(self.tally)
