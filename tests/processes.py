"""Real processes of the project, for end-to-end tests."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

READY_S = 30.0


@attrs.define(eq=False)
class Part:
    """A running process: its lines of output (both streams) so far."""

    process: trio.Process
    lines: list[str] = attrs.field(factory=list)
    _changed: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    _ended: bool = False

    async def wait_line(
        self, wanted: str | Callable[[str], bool], *, seconds: float = READY_S
    ) -> str:
        """Wait for a line that holds `wanted`, from the first line on."""
        found = wanted if callable(wanted) else lambda line: wanted in line
        looked = 0
        with trio.move_on_after(seconds):
            while True:
                for line in self.lines[looked:]:
                    looked += 1
                    if found(line):
                        return line
                if self._ended:
                    break
                await self._changed.park()
        raise AssertionError(
            f"no line with {wanted!r}; the last ones:\n" + "\n".join(self.lines[-30:])
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the JSON log lines of one event."""
        said = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [line for line in said if line.get("event") == name]

    async def ends(self, *, seconds: float = READY_S) -> int:
        """Wait for its end and return the exit code."""
        with trio.fail_after(seconds):
            code = await self.process.wait()
            while not self._ended:
                await self._changed.park()
        return code

    async def read(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        rest = b""
        async for chunk in stream:
            *whole, rest = (rest + chunk).split(b"\n")
            self.lines += [line.decode(errors="replace") for line in whole]
            self._changed.unpark_all()
        self._ended = True
        self._changed.unpark_all()


async def wait_until(holds: Callable[[], bool], *, seconds: float = READY_S) -> None:
    """Wait for something in another process's files or at a broker: there is nothing to wait on."""
    with trio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.05)


@asynccontextmanager
async def open_part(*arguments: str, module: str = "stationmaster") -> AsyncIterator[Part]:
    """Run `python -m module arguments`; killed when the block ends."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout, trio.open_nursery() as nursery:
        part = Part(process)
        nursery.start_soon(part.read)
        try:
            yield part
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + READY_S):
                    await process.wait()
            nursery.cancel_scope.deadline = trio.current_time() + 1


@attrs.frozen
class Receiver:
    """A running receiver."""

    part: Part
    url: str
    database: Path

    def batches(self) -> dict[str, dict[str, Any]]:
        """Return what it holds: batch id -> report."""
        with closing(sqlite3.connect(self.database)) as db:
            return {
                batch_id: json.loads(body)
                for batch_id, body in db.execute("SELECT batch_id, body FROM batches")
            }

    def deliveries(self) -> int:
        """Return how many uploads it took in all."""
        with closing(sqlite3.connect(self.database)) as db:
            return int(db.execute("SELECT coalesce(sum(deliveries), 0) FROM batches").fetchone()[0])

    def double_rows(self) -> int:
        """Return how many results stand there twice for one record and station."""
        with closing(sqlite3.connect(self.database)) as db:
            row = "printf('%s/%d/%d/%s', topic, partition, first_offset, station_id)"
            query = f"SELECT count(*) - count(DISTINCT {row}) FROM results"
            return int(db.execute(query).fetchone()[0])

    async def wait_batches(
        self, count: int, *, seconds: float = READY_S
    ) -> dict[str, dict[str, Any]]:
        """Wait until it holds at least so many batches."""
        deadline = trio.current_time() + seconds
        # Another process's database: there is nothing to wait on.
        while (  # noqa: ASYNC110
            len(held := self.batches()) < count and trio.current_time() < deadline
        ):
            await trio.sleep(0.05)
        assert len(held) >= count, f"{len(held)} of {count} batches after {seconds:g} s"
        return held


@asynccontextmanager
async def open_receiver(folder: Path, *options: str) -> AsyncIterator[Receiver]:
    database = folder / "receiver.sqlite"
    async with open_part("receiver", "--db", str(database), *options) as part:
        line = await part.wait_line("listening on ")
        yield Receiver(part, line.rpartition(" ")[2], database)


@asynccontextmanager
async def open_model_server(*options: str) -> AsyncIterator[str]:
    async with open_part("model-server", *options) as part:
        line = await part.wait_line("listening on ")
        yield line.rpartition(" ")[2]


@asynccontextmanager
async def open_broker(*topics: str) -> AsyncIterator[tuple[str, Part]]:
    """Run librdkafka's mock cluster; gives its address and its process."""
    options = [word for topic in topics for word in ("--topic", topic)]
    async with open_part(*options, module="stationmaster.service.broker") as part:
        line = await part.wait_line("bootstrapServers")
        yield json.loads(line)["bootstrapServers"], part


def produce(bootstrap: str, topic: str, values: list[bytes], *, partitions: int = 4) -> None:
    """Produce the values round robin and wait for the broker's word."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": bootstrap, "log_level": 0, "linger.ms": 5})
    for index, value in enumerate(values):
        producer.produce(topic, value, partition=index % partitions)
        producer.poll(0)
    assert producer.flush(20) == 0


def committed(bootstrap: str, group: str, topic: str, *, partitions: int = 4) -> dict[int, int]:
    """Return what the broker holds as committed: partition -> next offset (0 where there is none)."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "log_level": 0})
    try:
        found = consumer.committed(
            [TopicPartition(topic, n) for n in range(partitions)], timeout=15
        )
        return {each.partition: max(0, each.offset) for each in found}
    finally:
        consumer.close()


def kafka_config(
    folder: Path,
    *,
    broker: str,
    topic: str,
    receiver: str,
    model: str | None = None,
    handler: str = "embed",
    membership: str = 'group_protocol = "consumer"',
    extra: str = "",
) -> Path:
    """Write a configuration for a service between these parts."""
    embeddings = f'[embeddings]\nurls = ["{model}/v1"]\nmodel = "readings-128"\n' if model else ""
    outbox = "" if "[outbox]" in extra else f'[outbox]\npath = "{folder / "state.db"}"\n'
    path = folder / "stationmaster.toml"
    path.write_text(
        f"""
[source]
kind = "kafka"
[kafka]
bootstrap_servers = "{broker}"
group_id = "test"
topics = ["{topic}"]
{membership}
[stations]
handler = "{handler}"
{embeddings}
[upload]
url = "{receiver}/batches"
[log]
format = "json"
{extra}
{outbox}
"""
    )
    return path
