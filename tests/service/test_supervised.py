"""The service under a manager: a real process, a real notification socket, real signals."""

from __future__ import annotations

import json
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.kafka import inspection, open_kafka_source
from stationmaster.service import health as health_module
from stationmaster.service.health import Health
from tests.kafka.clients import Group
from tests.kafka_broker import run_kafka_broker
from tests.processes import (
    READY_S,
    kafka_config,
    open_broker,
    open_part,
    open_receiver,
    produce,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

TOPIC = "readings"
BRIEF = "tests.service.handlers:brief"
STUCK = "tests.service.handlers:stuck"
GATED = "tests.service.handlers:open_gated"
BLOCKING = "tests.service.handlers:blocking"
MESSAGE = json.dumps({"stationData": [{"stationId": "S1", "x": 1}]}).encode()


@attrs.define(eq=False)
class Heard:
    """Everything that systemd would have heard so far, in order."""

    lines: list[str] = attrs.field(factory=list)
    _changed: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    async def listen(self, receiver: trio.socket.SocketType) -> None:
        while True:
            self.lines += (await receiver.recv(4096)).decode().split("\n")
            self._changed.unpark_all()

    async def wait(self, line: str | Callable[[str], bool], *, after: int = 0) -> int:
        """Wait for a line from the place `after` on; return the place behind it."""
        found = line if callable(line) else lambda each: each == line
        with trio.move_on_after(READY_S):
            while True:
                for place, each in enumerate(self.lines[after:], after):
                    if found(each):
                        return place + 1
                await self._changed.park()
        raise AssertionError(f"no {line!r} in {self.lines[after:]}")


@asynccontextmanager
async def open_manager(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **environ: str
) -> AsyncIterator[Heard]:
    """Be the manager of the processes that are started within the block."""
    address = str(folder / "notify")
    for name, value in {"NOTIFY_SOCKET": address, **environ}.items():
        monkeypatch.setenv(name, value)
    heard = Heard()
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as receiver:
        await receiver.bind(address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(heard.listen, receiver)
            yield heard
            nursery.cancel_scope.cancel()


async def test_systemd_hears_of_the_start_of_reloads_and_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_broker(TOPIC) as (broker, _),
        open_receiver(tmp_path) as receiver,
        open_manager(tmp_path, monkeypatch, WATCHDOG_USEC="1000000") as heard,
    ):
        config = kafka_config(
            tmp_path, broker=broker, topic=TOPIC, receiver=receiver.url, handler=STUCK
        )
        first = config.read_text()
        async with open_part("run", "--config", str(config)) as service:
            place = await heard.wait("READY=1")
            await heard.wait("WATCHDOG=1", after=place)
            await heard.wait(lambda line: line.startswith("STATUS=running, 0 batches"))

            config.write_text(f"{first}\n[batch]\ndeadline_s = 0.5\nmax_in_flight = 7\n")
            service.process.send_signal(signal.SIGHUP)
            place = await heard.wait("RELOADING=1", after=place)
            assert heard.lines[place].startswith("MONOTONIC_USEC=")
            place = await heard.wait("READY=1", after=place)
            await service.wait_line("changes that wait for the next start")

            config.write_text(f"{first}\n[batch]\ndeadline_s = 'soon'\nquorum = 2\n")
            service.process.send_signal(signal.SIGHUP)
            place = await heard.wait("READY=1", after=place)
            await service.wait_line("not reloaded, everything stays as it was")

            config.unlink()
            service.process.send_signal(signal.SIGHUP)
            await heard.wait("READY=1", after=place)

            produce(broker, TOPIC, [MESSAGE])
            reports = await receiver.wait_batches(1)
            service.process.terminate()
            place = await heard.wait("STOPPING=1")
            await heard.wait(lambda line: line.startswith("EXTEND_TIMEOUT_USEC="), after=place)
            assert await service.ends() == 0

    (reloaded,) = service.events("configuration reloaded")
    assert reloaded["changed"] == ["batch.deadline_s"]
    (waiting,) = service.events("changes that wait for the next start")
    assert waiting["keys"] == ["kafka.drain_timeout_s", "batch.max_in_flight"]
    broken, vanished = service.events("not reloaded, everything stays as it was")
    assert [fault.partition(":")[0] for fault in broken["faults"]] == [
        "batch.deadline_s",
        "batch.quorum",
    ]
    assert "No such file" in vanished["faults"][0]
    (report,) = reports.values()
    assert report["closedBy"] == "deadline"
    assert 0.5 <= report["durationSeconds"] < 5.0  # the deadline of the reload, not the first


async def test_a_reload_while_the_service_drains_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_broker(TOPIC) as (broker, _),
        open_receiver(tmp_path) as receiver,
        open_manager(tmp_path, monkeypatch) as heard,
    ):
        gate = tmp_path / "gate"
        config = kafka_config(
            tmp_path,
            broker=broker,
            topic=TOPIC,
            receiver=receiver.url,
            handler=GATED,
            # The drain lasts until the gate opens: a SIGHUP after it would find nobody.
            extra="[batch]\ndeadline_s = 60.0\n[shutdown]\ngrace_s = 60.0\n"
            f"[stations.options]\nfile = '{gate}'",
        )
        async with open_part("run", "--config", str(config)) as service:
            produce(broker, TOPIC, [MESSAGE])
            await service.wait_line("batch created")
            service.process.terminate()
            stopping = await heard.wait("STOPPING=1")
            service.process.send_signal(signal.SIGHUP)
            await service.wait_line("not reloaded: the service ends")
            gate.touch()
            assert await service.ends() == 0
    assert "RELOADING=1" not in heard.lines
    assert "READY=1" not in heard.lines[stopping:]


async def test_a_handler_that_blocks_the_loop_starves_the_watchdog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_broker(TOPIC) as (broker, _),
        open_receiver(tmp_path) as receiver,
        open_manager(tmp_path, monkeypatch, WATCHDOG_USEC="400000") as heard,
    ):
        config = kafka_config(
            tmp_path, broker=broker, topic=TOPIC, receiver=receiver.url, handler=BLOCKING
        )
        async with open_part("run", "--config", str(config)) as service:
            await heard.wait("WATCHDOG=1", after=await heard.wait("READY=1"))
            produce(broker, TOPIC, [MESSAGE])
            await service.wait_line("the loop is blocked now")
            await wait_all_tasks_blocked()  # what was sent before that is heard
            blocked = len(heard.lines)
            await trio.sleep(1.0)  # more than twice the watchdog's time
            assert heard.lines[blocked:] == []
            service.process.send_signal(signal.SIGABRT)  # as systemd does
            assert await service.ends() == -signal.SIGABRT
    assert any("in blocking" in line for line in service.lines)  # whoever looks finds the culprit


async def test_children_of_a_handler_hear_nothing_of_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tmp_path / "readings.jsonl"
    messages.write_bytes(MESSAGE)
    async with (
        open_receiver(tmp_path) as receiver,
        open_manager(tmp_path, monkeypatch, LISTEN_FDS="0", LISTEN_PID="1") as heard,
    ):
        config = kafka_config(
            tmp_path,
            broker="127.0.0.1:1",
            topic=TOPIC,
            receiver=receiver.url,
            handler="tests.service.handlers:environment",
        )
        async with open_part("replay", str(messages), "--config", str(config)) as service:
            assert await service.ends() == 0
        (report,) = (await receiver.wait_batches(1)).values()
        await heard.wait("STOPPING=1")
    assert report["results"][0]["names"] == []


# ------------------------------------------------------------------------------------------------- a broker that hangs


async def test_a_broker_that_hangs_is_not_ready_in_its_time_and_ready_again_when_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    """With every time that plays a part a tenth of what it is."""
    for module, name in (
        (inspection, "PROBE_EVERY_S"),
        (inspection, "_AGAIN_S"),
        (health_module, "BROKER_LIMIT_S"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) / 10)

    def broker_is_known() -> bool:
        (check,) = (check for check in health.ready() if check.name == "broker")
        return check.ok

    with run_kafka_broker() as broker:
        group = Group(broker)
        group.fill(1)
        health = Health()  # not before: all that blocked the loop
        nursery.start_soon(health.run)
        async with open_kafka_source(group.settings()) as source:
            health.watch_source(source.statistics)
            await source.poll()
            await wait_until(broker_is_known)
            assert health.is_live
            os.kill(broker.process.pid, signal.SIGSTOP)
            await wait_until(lambda: not broker_is_known())
            await wait_until(lambda: "connection" in source.statistics().troubles)
            assert health.is_live  # the pump goes on asking: a restart would not help
            os.kill(broker.process.pid, signal.SIGCONT)
            await wait_until(broker_is_known)
            await wait_until(lambda: not source.statistics().troubles)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_pump_that_has_died_is_not_live(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    def die(*_: object) -> None:
        raise SystemExit  # what no `except Exception` catches

    with run_kafka_broker() as broker:
        group = Group(broker)
        health = Health()  # not before: that blocked the loop
        nursery.start_soon(health.run)
        settings = attrs.evolve(group.settings(), close_timeout_s=0.1)
        async with open_kafka_source(settings) as source:
            health.watch_source(source.statistics)
            assert health.is_live
            monkeypatch.setattr(inspection.Inspector, "ask_standing", die)
            await wait_until(lambda: not source.statistics().pump_alive)
            await wait_until(lambda: not health.is_live)
        source._pump._consumer.close()  # the client hangs for ever when it is collected unclosed, its broker gone
