"""End to end through real processes: broker, model server, receiver, and the service between them."""

from __future__ import annotations

import json
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.service.producer import read_packaged_messages
from tests.processes import (
    committed,
    kafka_config,
    open_broker,
    open_model_server,
    open_part,
    open_receiver,
    produce,
)
from tests.run_queue import Waits

if TYPE_CHECKING:
    from pathlib import Path

TOPIC = "readings"
BRIEF = "tests.service.handlers:brief"
STUCK = "tests.service.handlers:stuck"


def message(number: int, stations: int = 3) -> bytes:
    entries = [{"stationId": f"S{n:03}", "x": number + n} for n in range(stations)]
    return json.dumps({"stationData": entries}).encode()


def held_offsets(batches: dict[str, dict[str, Any]]) -> dict[int, set[int]]:
    held: dict[int, set[int]] = {}
    for report in batches.values():
        for span in report["ranges"]:
            held.setdefault(span["partition"], set()).update(range(span["first"], span["last"] + 1))
    return held


async def test_readings_go_from_kafka_to_one_upload_per_message(tmp_path: Path) -> None:
    values = read_packaged_messages()[:20]
    async with (
        open_broker(TOPIC) as (broker, _),
        open_receiver(tmp_path) as receiver,
        open_model_server() as model,
    ):
        produce(broker, TOPIC, values)
        config = kafka_config(
            tmp_path, broker=broker, topic=TOPIC, receiver=receiver.url, model=model
        )
        async with open_part("run", "--config", str(config)) as service:
            batches = await receiver.wait_batches(20)
            service.process.terminate()
            code = await service.ends()

    assert code == 0
    assert len(batches) == 20
    assert sum(report["counts"]["succeeded"] for report in batches.values()) == sum(
        len(json.loads(value)["stationData"]) for value in values
    )
    assert {result["dimensions"] for r in batches.values() for result in r["results"]} == {128}
    assert len(service.events("upload done")) == 20


async def test_sigterm_delivers_and_commits_what_is_open(tmp_path: Path) -> None:
    async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
        produce(broker, TOPIC, [message(n) for n in range(400)])
        config = kafka_config(
            tmp_path, broker=broker, topic=TOPIC, receiver=receiver.url, handler=BRIEF
        )
        async with open_part("run", "--config", str(config)) as service:
            await receiver.wait_batches(5)
            service.process.terminate()
            code = await service.ends()
        held = held_offsets(receiver.batches())
        next_offsets = committed(broker, "test", TOPIC)

    assert code == 0
    assert {n: set(range(end)) for n, end in next_offsets.items() if end} == held
    assert sum(next_offsets.values()) == len(service.events("batch created"))


@pytest.mark.slow
@pytest.mark.once
async def test_a_killed_service_never_committed_more_than_the_receiver_holds(
    tmp_path: Path,
) -> None:
    async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
        produce(broker, TOPIC, [message(n) for n in range(200)])
        config = kafka_config(
            tmp_path,
            broker=broker,
            topic=TOPIC,
            receiver=receiver.url,
            handler=BRIEF,
            membership='assignor = "range"\nsession_timeout_s = 6.0',
            extra="[batch]\nmax_in_flight = 8",
        )
        for kill_at in (20, 60):
            async with open_part("run", "--config", str(config)) as service:
                await receiver.wait_batches(kill_at)
                service.process.kill()
                await service.ends()
            held = held_offsets(receiver.batches())
            for partition, end in committed(broker, "test", TOPIC).items():
                assert set(range(end)) <= held.get(partition, set())
        async with open_part("run", "--config", str(config)) as service:
            batches = await receiver.wait_batches(200)
            service.process.terminate()
            assert await service.ends() == 0
        next_offsets = committed(broker, "test", TOPIC)
        double_rows = receiver.double_rows()

    assert len(batches) == 200
    assert sum(next_offsets.values()) == 200
    assert double_rows == 0


async def test_a_second_signal_stops_at_once_and_says_so(tmp_path: Path) -> None:
    async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
        produce(broker, TOPIC, [message(n) for n in range(4)])
        config = kafka_config(
            tmp_path,
            broker=broker,
            topic=TOPIC,
            receiver=receiver.url,
            handler=STUCK,
            extra="[batch]\ndeadline_s = 60.0\n[shutdown]\ngrace_s = 60.0",
        )
        async with open_part("run", "--config", str(config)) as service:
            await service.wait_line('"batch created"')
            service.process.send_signal(signal.SIGTERM)
            await service.wait_line('"draining"')
            service.process.send_signal(signal.SIGINT)
            code = await service.ends()
        next_offsets = committed(broker, "test", TOPIC)

    assert code == 75
    assert service.events("batch dropped")
    assert sum(next_offsets.values()) == 0
    assert receiver.batches() == {}


async def test_bad_messages_are_logged_with_their_reason_and_the_next_goes_on(
    tmp_path: Path,
) -> None:
    bad = [b"{", b"[]", b'{"stationData": 7}', b'{"stationData": [{"stationId": 7}]}', b"\xff"]
    async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
        produce(broker, TOPIC, [*bad, message(1), b'{"stationData": []}', message(2)])
        config = kafka_config(
            tmp_path, broker=broker, topic=TOPIC, receiver=receiver.url, handler=BRIEF
        )
        async with open_part("run", "--config", str(config)) as service:
            await receiver.wait_batches(2)
            service.process.terminate()
            assert await service.ends() == 0
        next_offsets = committed(broker, "test", TOPIC)

    reasons = {line["reason"] for line in service.events("dead letter")}
    assert reasons == {
        "not-json",
        "not-an-object",
        "no-station-data",
        "no-valid-entry",
        "not-utf8",
    }
    assert sum(next_offsets.values()) == 8


async def test_a_model_server_that_is_away_fails_stations_and_delays_no_upload(
    tmp_path: Path,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        model = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
            produce(broker, TOPIC, [message(n) for n in range(4)])
            config = kafka_config(
                tmp_path, broker=broker, topic=TOPIC, receiver=receiver.url, model=model
            )
            async with (
                open_part("run", "--config", str(config)) as service,
                trio.open_nursery() as nursery,
            ):
                waits = Waits(lambda: service.process.pid)
                nursery.start_soon(waits.watch)
                batches = await receiver.wait_batches(4)
                service.process.terminate()
                assert await service.ends() == 0
                nursery.cancel_scope.cancel()

    for report in batches.values():
        assert report["durationSeconds"] <= 5.25 + waits.in_life_of(report)
    assert all(report["counts"]["succeeded"] == 0 for report in batches.values())
    assert all(len(report["unsuccessful"]) == 3 for report in batches.values())


async def test_a_broker_that_is_away_at_the_start_is_waited_for(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with open_receiver(tmp_path) as receiver:
            config = kafka_config(
                tmp_path, broker=address, topic=TOPIC, receiver=receiver.url, handler=BRIEF
            )
            async with open_part("run", "--config", str(config)) as service:
                await service.wait_line('"source trouble"')
                service.process.terminate()
                code = await service.ends()

    assert code == 0


@pytest.mark.slow
async def test_a_broker_that_stands_still_for_a_while_loses_nothing(tmp_path: Path) -> None:
    async with open_broker(TOPIC) as (broker, part), open_receiver(tmp_path) as receiver:
        produce(broker, TOPIC, [message(n) for n in range(20)])
        config = kafka_config(
            tmp_path, broker=broker, topic=TOPIC, receiver=receiver.url, handler=BRIEF
        )
        async with open_part("run", "--config", str(config)) as service:
            await receiver.wait_batches(20)
            part.process.send_signal(signal.SIGSTOP)
            await trio.sleep(3)  # the length of the outage
            part.process.send_signal(signal.SIGCONT)
            produce(broker, TOPIC, [message(n) for n in range(20)])
            batches = await receiver.wait_batches(40, seconds=60)
            service.process.terminate()
            assert await service.ends() == 0

    assert len(batches) == 40


async def test_a_replay_of_the_same_file_adds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "hours.jsonl"
    file.write_bytes(b"\n".join([message(n) for n in range(30)]) + b"\n")
    async with open_receiver(tmp_path) as receiver:
        config = kafka_config(
            tmp_path, broker="127.0.0.1:1", topic=TOPIC, receiver=receiver.url, handler=BRIEF
        )
        for _ in range(2):
            async with open_part("replay", str(file), "--config", str(config)) as service:
                assert await service.ends() == 0
            summary = service.lines[-1]
            assert summary.startswith("hours.jsonl: 30 batches uploaded with 90 results")
        batches, deliveries = receiver.batches(), receiver.deliveries()

    assert len(batches) == 30
    assert deliveries == 60


@pytest.mark.slow
@pytest.mark.parametrize("handler", ["blocking", "in_a_thread"])
async def test_a_handler_that_cannot_be_stopped_is_left_behind_after_the_grace(
    handler: str, tmp_path: Path
) -> None:
    file = tmp_path / "hour.jsonl"
    file.write_bytes(message(1, stations=1) + b"\n")
    async with open_receiver(tmp_path) as receiver:
        config = kafka_config(
            tmp_path,
            broker="127.0.0.1:1",
            topic=TOPIC,
            receiver=receiver.url,
            handler=f"tests.service.handlers:{handler}",
            extra="[batch]\ndeadline_s = 60.0\n[shutdown]\ngrace_s = 1.0",
        )
        async with open_part("replay", str(file), "--config", str(config)) as service:
            await service.wait_line('"batch created"')
            service.process.terminate()
            code = await service.ends()  # its limit is far below the handler's 120 s

    assert code == 75
    assert "something hangs past the grace" in service.lines[-1]


@pytest.mark.slow
async def test_an_error_ends_the_service_even_if_a_handler_hangs_in_a_thread(
    tmp_path: Path,
) -> None:
    file = tmp_path / "hours.jsonl"
    file.write_bytes(message(1, stations=2) + b"\n")
    async with open_receiver(tmp_path) as receiver:
        config = kafka_config(
            tmp_path,
            broker="127.0.0.1:1",
            topic=TOPIC,
            receiver=receiver.url,
            handler="tests.service.handlers:dying_beside_a_thread",
            extra="[shutdown]\ngrace_s = 1.0",
        )
        async with open_part("replay", str(file), "--config", str(config)) as service:
            code = await service.ends()

    assert code == 70
