"""End to end, what cannot be delivered: outbox and dead letters of real processes, and what survives their ends."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from tests.processes import (
    committed,
    kafka_config,
    open_broker,
    open_part,
    open_receiver,
    produce,
    wait_until,
)
from tests.service.test_way import BRIEF, TOPIC, message

if TYPE_CHECKING:
    from pathlib import Path

IMPATIENT = '[outbox]\npath = "{folder}/state.db"\nmax_backoff_s = 1.0\n[batch]\ndeadline_s = 1.0\n'
# Only where every upload is answered at once: an answer that comes later than that brings the batch once more.
HURRY = ("--set", "upload.timeout_s=2.0", "--set", "upload.attempt_timeout_s=1.0")


def rows(folder: Path, table: str) -> int:
    with closing(sqlite3.connect(folder / "state.db")) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def total(broker: str) -> int:
    """How many records the group has committed."""
    return sum(committed(broker, "test", TOPIC).values())


def configure(folder: Path, broker: str, receiver: str, extra: str = "") -> str:
    config = kafka_config(
        folder,
        broker=broker,
        topic=TOPIC,
        receiver=receiver,
        handler=BRIEF,
        extra=IMPATIENT.format(folder=folder) + extra,
    )
    return str(config)


async def test_batches_wait_out_an_outage_in_the_outbox_and_arrive_once(tmp_path: Path) -> None:
    async with open_broker(TOPIC) as (broker, _):
        async with open_receiver(tmp_path) as receiver:
            port = receiver.url.rpartition(":")[2]
        produce(broker, TOPIC, [message(n) for n in range(12)])
        config = configure(tmp_path, broker, receiver.url)
        async with open_part("run", "--config", config) as service:
            await service.wait_line("upload target down")
            await wait_until(lambda: rows(tmp_path, "outbox") == 12)
            produce(broker, TOPIC, [message(n) for n in range(12, 20)])
            # The offsets count: the rows are durable.
            await wait_until(lambda: total(broker) == 20)
            async with open_receiver(tmp_path, "--port", port) as receiver:
                await receiver.wait_batches(20)
                await service.wait_line("upload target answers again")
                await wait_until(lambda: rows(tmp_path, "outbox") == 0)
                service.process.terminate()
                assert await service.ends() == 0
                assert receiver.deliveries() == 20
                assert receiver.double_rows() == 0


async def test_what_a_killed_service_left_in_the_outbox_is_delivered_by_the_next(
    tmp_path: Path,
) -> None:
    async with open_broker(TOPIC) as (broker, _):
        async with open_receiver(tmp_path) as receiver:
            port = receiver.url.rpartition(":")[2]
        produce(broker, TOPIC, [message(n) for n in range(8)])
        config = configure(tmp_path, broker, receiver.url)
        async with open_part("run", "--config", config) as service:
            await service.wait_line("upload target down")
            await wait_until(lambda: rows(tmp_path, "outbox") == total(broker) == 8)
            service.process.kill()
            await service.ends()
        async with open_receiver(tmp_path, "--port", port) as receiver:
            async with open_part("run", "--config", config) as service:
                await receiver.wait_batches(8)
                service.process.terminate()
                assert await service.ends() == 0
            assert receiver.deliveries() == 8
            assert receiver.double_rows() == 0
    assert rows(tmp_path, "outbox") == 0


async def test_poison_and_refused_batches_become_dead_letters_and_the_service_goes_on(
    tmp_path: Path,
) -> None:
    async with (
        open_broker(TOPIC) as (broker, _),
        open_receiver(tmp_path, "--status", "422") as receiver,
    ):
        produce(broker, TOPIC, [b"poison", message(1), b"\xff", message(2)])
        config = configure(tmp_path, broker, receiver.url)
        async with open_part("run", "--config", config) as service:
            await wait_until(lambda: total(broker) == 4)
            service.process.terminate()
            assert await service.ends() == 0
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        letters = db.execute("SELECT reason, value, batch_id != '' FROM dead_letters").fetchall()
    assert sorted((reason, held) for reason, _, held in letters) == [
        ("not-json", 0),
        ("not-utf8", 0),
        ("rejected-upload", 1),
        ("rejected-upload", 1),
    ]
    assert {value for _, value, held in letters if not held} == {b"poison", b"\xff"}
    assert all(b'"batchId"' in value for _, value, held in letters if held)


async def test_a_second_service_on_the_same_state_file_is_refused_and_the_first_goes_on(
    tmp_path: Path,
) -> None:
    async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
        config = configure(tmp_path, broker, receiver.url)
        async with open_part("run", "--config", config) as first:
            await first.wait_line("partitions assigned")
            async with open_part("run", "--config", config) as second:
                assert await second.ends() == 78
            assert f"in use by process {first.process.pid}" in second.lines[-1]
            assert second.lines[-1].startswith("outbox.path: ")
            produce(broker, TOPIC, [message(1)])
            await receiver.wait_batches(1)
            first.process.terminate()
            assert await first.ends() == 0


async def test_a_replay_waits_for_its_outbox_and_says_what_is_left_there(tmp_path: Path) -> None:
    file = tmp_path / "hours.jsonl"
    file.write_bytes(b"\n".join(message(n) for n in range(4)))
    async with open_receiver(tmp_path, "--status", "503") as receiver:
        port = receiver.url.rpartition(":")[2]
        config = configure(tmp_path, "127.0.0.1:1", receiver.url, "[shutdown]\ngrace_s = 2.0\n")
        arguments = ("replay", str(file), "--config", config)
        async with open_part(*arguments, *HURRY) as service:
            assert await service.ends() == 75
    assert service.events("batches left in the outbox")[0]["batches"] == 4
    assert "4 sent to the outbox, 0 uploaded out of it" in service.lines[-1]

    async with open_receiver(tmp_path, "--port", port) as receiver:
        async with open_part(*arguments, *HURRY) as service:
            assert await service.ends() == 0
        assert len(receiver.batches()) == 4
        assert receiver.double_rows() == 0
