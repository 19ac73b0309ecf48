"""What the chaos stands on: parts, relays, clocks and disks do what they say; and the short form of the whole."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from confluent_kafka import Producer

from tests.chaos.machine import Clock, UnavailableError, build_clock
from tests.chaos.parts import ROOT, End, Part
from tests.chaos.wires import http_answer, open_http_relay, open_kafka_relay
from tests.http_requests import client_of
from tests.ledger import FLUSH_S, Content, Kind, open_ledger

if TYPE_CHECKING:
    import random

    from tests.kafka_broker import KafkaBroker

pytestmark = pytest.mark.once
REQUIRED = os.environ.get("STATIONMASTER_REQUIRE_CHAOS") == "1"

KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.mark.parametrize(
    ("code", "signals", "listened", "excuse"),
    [
        (0, (TERM,), True, ""),
        (75, (TERM,), True, ""),
        (-TERM, (TERM,), False, ""),
        (-TERM, (TERM, TERM), True, ""),
        (-KILL, (KILL,), True, ""),
        (-KILL, (TERM, KILL), True, ""),
        (0, (TERM, KILL), True, ""),
        (75, (), True, "disk full"),
    ],
)
def test_these_ends_are_in_order(
    code: int, signals: tuple[signal.Signals, ...], listened: bool, excuse: str
) -> None:
    assert End(code, signals, listened, excuse).fault() is None


@pytest.mark.parametrize(
    ("code", "signals", "listened", "excuse"),
    [
        (0, (), True, ""),
        (1, (), True, "disk full"),
        (75, (), True, ""),
        (70, (TERM,), True, ""),
        (-TERM, (TERM,), True, ""),
        (-KILL, (TERM,), True, ""),
        (-signal.SIGSEGV, (KILL,), True, ""),
    ],
)
def test_these_ends_are_not(
    code: int, signals: tuple[signal.Signals, ...], listened: bool, excuse: str
) -> None:
    fault = End(code, signals, listened, excuse).fault()
    assert fault is not None
    assert str(code) in fault


def test_a_client_of_a_kafka_relay_knows_no_other_way_to_the_broker(
    kafka_broker: KafkaBroker,
) -> None:
    topic = kafka_broker.create_topic()
    with open_kafka_relay(int(kafka_broker.bootstrap_servers.rpartition(":")[2])) as relay:
        client = Producer({"bootstrap.servers": f"127.0.0.1:{relay.port}", "log_level": 0})
        found = client.list_topics(topic, timeout=10).brokers.values()
        assert [(broker.host, broker.port) for broker in found] == [("127.0.0.1", relay.port)]
        arrived: list[int | None] = []
        for _ in range(200):
            client.produce(topic, bytes(1000), on_delivery=lambda _, m: arrived.append(m.offset()))
        assert client.flush(10) == 0
        assert len(arrived) == 200
        relay.cut("stall")
        client.produce(topic, b"late", on_delivery=lambda _, m: arrived.append(m.offset()))
        assert client.flush(0.5) == 1
        relay.mend()
        assert client.flush(10) == 0


def test_a_ledger_that_is_given_up_does_not_wait_for_its_broker(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    drawn = threading.Event()

    def draw(number: int, _dice: random.Random) -> Content:
        if number == 3:
            drawn.set()
        return Content(kind=Kind.EMPTY, value=b"{}")

    monkeypatch.setattr("tests.ledger.draw", draw)
    kafka_broker.stop()
    try:
        with open_ledger(
            kafka_broker.bootstrap_servers, topic, partitions=4, per_s=100, seed=1
        ) as given_up:
            assert drawn.wait(20)
            began = time.monotonic()
        assert time.monotonic() - began < FLUSH_S
        assert given_up.unanswered >= 3
    finally:
        kafka_broker.go_on()


async def test_an_http_relay_answers_in_the_place_of_its_server(tmp_path: Path) -> None:
    part = Part(
        role="model-server",
        arguments=("stationmaster", "model-server", "--end-with-parent"),
        log=tmp_path / "log",
        address_after="listening on ",
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(part.keep_running)
        with open_http_relay(int(part.address.rpartition(":")[2])) as relay:
            # A connection each: the relay cuts those that are open when it changes its mind.
            async with client_of(f"http://127.0.0.1:{relay.port}", connection="close") as client:
                assert (await client.get("/health")).status_code == 200
                relay.answer(http_answer("503 Service Unavailable", body=b"no"))
                answer = await client.post("/v1/embeddings", content=bytes(10_000))
                assert (answer.status_code, answer.content) == (503, b"no")
                relay.answer(None)
                assert (await client.get("/health")).status_code == 200
        assert await part.retire() == 0


async def test_a_part_is_started_again_and_keeps_the_score(tmp_path: Path) -> None:
    part = Part(
        role="model-server",
        arguments=("stationmaster", "model-server", "--end-with-parent"),
        log=tmp_path / "log",
        address_after="listening on ",
    )
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(part.keep_running)
            stop, again = part.stop(), part.started
            part.send(KILL)  # which takes a stopped one, too
            await again.wait()
            part.go_on(stop)
            assert part.was_stopped(stop[0])
            assert part.alive
            await part.retire()
    assert (part.ends[0].code, part.ends[0].signals) == (-KILL, (KILL,))
    assert [end.fault() for end in part.ends] == [None, None]


_CLOCKS = """
import sys, time
from confluent_kafka import Consumer
consumer = Consumer({"bootstrap.servers": "127.0.0.1:1", "group.id": "x", "log_level": 0})
for _ in sys.stdin:
    began = time.monotonic()
    consumer.poll(0.2)
    time.sleep(0.01)
    print(time.time(), time.monotonic(), time.monotonic() - began, flush=True)
"""


def test_a_jump_moves_the_wall_clock_of_one_process_and_nothing_else(tmp_path: Path) -> None:
    try:
        clock = Clock(build_clock(tmp_path), tmp_path / "offset")
    except UnavailableError as error:
        if REQUIRED:
            raise
        pytest.skip(str(error))
    with subprocess.Popen(
        [sys.executable, "-c", _CLOCKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **clock.environment},
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for offset_s in (0.0, 86_400.0 * 400, -86_400.5, 0.0):
            clock.jump(offset_s)
            process.stdin.write("go\n")
            wall, steady, waited = map(float, process.stdout.readline().split())
            # Hours are what is judged here; the margins are for a machine that is busy.
            assert abs(wall - time.time() - offset_s) < 20
            assert abs(steady - time.monotonic()) < 20
            assert 0.2 <= waited < 20
        process.stdin.close()


def children(folder: Path) -> list[int]:
    """Return the processes that were started with this folder for their temporary files."""
    wanted = f"TMPDIR={folder}".encode()
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                if wanted in (each / "environ").read_bytes().split(b"\0"):
                    found.append(int(each.name))
            except OSError:
                pass  # it has ended, or is not ours
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left_when_the_command_is_ended_in_the_middle(
    number: signal.Signals, tmp_path: Path
) -> None:
    # All it does is stop processes: one that is stopped must be woken to see that its parent is gone.
    command = ["--minutes", "2", "--seed", "3", "--faults", "stop"]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos", *command],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        process_group=0,
    ) as process:
        assert process.stdout is not None
        assert any(" SIGSTOP for " in line for line in process.stdout)
        assert len(children(tmp_path)) == 6
        process.send_signal(number)
        assert process.wait(60) == {signal.SIGKILL: -signal.SIGKILL}.get(number, 130)
    deadline = time.monotonic() + 60
    while left := children(tmp_path):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_command_fails_and_keeps_everything_when_the_target_loses_a_batch(
    tmp_path: Path,
) -> None:
    options = ["--minutes", "0.3", "--seed", "5", "--faults", "stop"]
    # (That it succeeds where nothing is lost is what `tox -e prove` shows, with every kind of fault.)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos", *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert any(" SIGSTOP for " in line for line in process.stdout)
        (database,) = tmp_path.glob("*/target.sqlite")
        with closing(sqlite3.connect(database, timeout=30)) as db:
            db.executescript("""
                CREATE TRIGGER forget AFTER INSERT ON batches WHEN NEW.batch_id LIKE 'chaos/_0/_0/_%' ESCAPE '/'
                BEGIN DELETE FROM batches WHERE batch_id = NEW.batch_id; END;
                DELETE FROM batches WHERE batch_id LIKE 'chaos/_0/_0/_%' ESCAPE '/';
            """)
        said = process.stdout.read()
    assert process.returncode == 1
    assert "THE BOOKS DO NOT BALANCE" in said
    assert "lost: (0, 0), which belongs at the receiver, or in an outbox" in said
    assert "lost: (0, 0) was committed when it stood nowhere" in said
    assert "    + lost                              1\n" in said
    assert database.exists()
