"""The demo's processes with relays between them, and what is done to them when a fault strikes."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import httpx
import trio

from stationmaster.service.demo_report import SLACK_S
from tests.chaos.machine import Clock, Disk
from tests.chaos.parts import Part
from tests.chaos.plan import BROKER, MODEL, SERVICES, TARGET
from tests.chaos.wires import http_answer, open_http_relay, open_kafka_relay

if TYPE_CHECKING:
    import random
    from collections import Counter
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from tests.chaos.plan import Fault
    from tests.chaos.wires import HttpRelay, KafkaRelay

TOPIC: Final = "chaos"
GROUP: Final = "chaos"
PARTITIONS: Final = 4
DEADLINE_S: Final = 2.0
_CONTROL_S: Final = 2.0
_RETRIES_S: Final = 0.5
_MODEL_ANSWERS: Final = {
    "503": http_answer("503 Service Unavailable"),
    "429": http_answer("429 Too Many Requests", "Retry-After: 1"),
    "nonsense": http_answer("200 OK", "Content-Type: application/json", body=b'{"data": [{]}'),
}
_TARGET_ANSWERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "500": {"status": 500},
    "503": {"status": 503},
    "429": {"status": 429},
    "nothing for 30 s": {"latencyMs": 30_000},
    "flaky": {"failRate": 0.4},
}
_WELL: Final = {"status": None, "latencyMs": 0, "failRate": 0}

_CONFIG: Final = """\
[source]
kind = "kafka"
[kafka]
bootstrap_servers = "127.0.0.1:{broker}"
group_id = "{group}"
topics = ["{topic}"]
assignor = "{assignor}"
session_timeout_s = 6.0
commit_interval_s = 0.2
options = {{ "heartbeat.interval.ms" = 1000, "reconnect.backoff.max.ms" = 1000 }}
[batch]
deadline_s = {deadline_s}
[stations]
handler = "stationmaster.service.demo_handler:open_handler"
[embeddings]
urls = ["http://127.0.0.1:{model}/v1"]
model = "readings-128"
timeout_s = 5.0
[upload]
url = "http://127.0.0.1:{target}/batches"
timeout_s = 6.0
attempt_timeout_s = 3.0
[outbox]
path = "{state}"
max_backoff_s = 3.0
[log]
format = "json"
[shutdown]
grace_s = 10.0
"""


@attrs.define(eq=False, kw_only=True)
class Service:
    """A service, its links, its disk and its clock."""

    part: Part
    links: Mapping[str, KafkaRelay | HttpRelay]
    state: Path
    disk: Disk | None
    clock: Clock | None
    longest_s: float = 0.0
    """From opening to closing, of the batches during which the process was not stopped."""
    late: int = 0
    """How many of those were decided too late."""
    late_when_stopped: int = 0
    events: Counter[str]

    def hear(self, said: Mapping[str, Any]) -> None:
        """Take a line of the log."""
        event = str(said.get("event"))
        self.events[event] += 1
        if event in {"batch complete", "batch quorum", "batch deadline"}:
            seconds = float(said.get("seconds", 0.0))
            late = seconds > DEADLINE_S + SLACK_S
            if self.part.was_stopped(trio.current_time() - seconds - 1):
                self.late_when_stopped += late
            else:
                self.late += late
                self.longest_s = max(self.longest_s, seconds)


@attrs.define(eq=False, kw_only=True)
class Scene:
    """All of them. Made by `open_scene`."""

    folder: Path
    parts: dict[str, Part]
    services: dict[str, Service]
    control: httpx.AsyncClient
    missed: int = 0
    """Faults that could not be brought about, because their victim was away."""

    @property
    def bootstrap(self) -> str:
        """The broker's own address, past all relays."""
        return self.parts[BROKER].address

    @property
    def target_file(self) -> Path:
        """The target's database."""
        return self.folder / "target.sqlite"

    async def strike(self, fault: Fault, number: int) -> None:
        """Bring a fault about, and end it after its time (also when cancelled)."""
        match fault.kind:
            case "kill":
                await self._kill(self.parts[fault.whom], fault)
            case "stop":
                part = self.parts[fault.whom]
                stop = part.stop()
                await self._hold(fault, partial(part.go_on, stop))
            case "slow":
                await self._disturb(fault)
            case "disk":
                await self._fill(self.services[fault.whom], fault, f"ballast-{number}")
            case "clock":
                clock = self.services[fault.whom].clock
                assert clock is not None
                clock.jump(fault.amount)
                await trio.lowlevel.checkpoint()
            case "answers" if fault.whom == TARGET:
                await self._order(_TARGET_ANSWERS[fault.what])
                await trio.sleep(fault.lasts_s)
                await self._order(_WELL)
            case "answers":
                canned = _MODEL_ANSWERS[fault.what]
                links = [service.links[MODEL] for service in self.services.values()]
                self._answer(links, canned)
                await self._hold(fault, lambda: self._answer(links, None))
            case "handles":
                part = self.parts[fault.whom]
                part.limit_handles()
                part.excuses.append("no more handles")
                await self._hold(fault, lambda: self._give_handles(part))
            case _:
                raise ValueError(fault.kind)

    @staticmethod
    async def _hold(fault: Fault, end: Callable[[], object]) -> None:
        try:
            await trio.sleep(fault.lasts_s)
        finally:
            end()

    @staticmethod
    async def _kill(part: Part, fault: Fault) -> None:
        started = part.started
        part.send(signal.SIGTERM if fault.what.startswith("SIGTERM") else signal.SIGKILL)
        if fault.amount:
            await started.wait()
            await trio.sleep(fault.amount)
            part.send(signal.SIGKILL)

    async def _disturb(self, fault: Fault) -> None:
        name, _, whom = fault.whom.partition(" > ")
        link = self.services[name].links[whom]
        match fault.what:
            case "slow":
                link.slow(delay_s=fault.amount, bytes_per_s=200_000)
                await self._hold(fault, link.slow)
            case "drop" | "stall" as how:
                link.cut(how)
                await self._hold(fault, link.mend)

    @staticmethod
    async def _fill(service: Service, fault: Fault, name: str) -> None:
        disk = service.disk
        assert disk is not None
        service.part.excuses.append("disk full")
        try:
            await trio.to_thread.run_sync(disk.fill, name)
            await trio.sleep(fault.lasts_s)
        finally:
            disk.free(name)
            service.part.excuses.remove("disk full")

    @staticmethod
    def _answer(links: list[KafkaRelay | HttpRelay], canned: bytes | None) -> None:
        for link in links:
            link.answer(canned)  # type: ignore[union-attr]

    @staticmethod
    def _give_handles(part: Part) -> None:
        part.free_handles()
        part.excuses.remove("no more handles")

    async def _order(self, faults: Mapping[str, Any]) -> None:
        """Tell the target how to behave; it may be stopped, or dead (and behaves after its next start)."""
        try:
            answer = await self.control.post(f"{self.parts[TARGET].address}/control", json=faults)
            answer.raise_for_status()
        except httpx.TransportError:
            self.missed += 1

    async def heal(self) -> None:
        """End everything that is still wrong."""
        for part in self.parts.values():
            part.send(signal.SIGCONT)
        for service in self.services.values():
            service.part.free_handles()
            if service.clock is not None:
                service.clock.jump(0)
            for link in service.links.values():
                link.slow()
                link.mend()
        with trio.fail_after(60):
            while True:
                missed = self.missed
                await self._order(_WELL)
                if self.missed == missed:
                    return
                await trio.sleep(_RETRIES_S)


@asynccontextmanager
async def open_scene(
    folder: Path,
    dice: random.Random,
    *,
    events: Counter[str],
    clock: Path | None,
    disks: bool,
) -> AsyncIterator[Scene]:
    """Start everything but the producer.

    Args:
        folder: for logs, databases and whatever else.
        dice: draw how the group shares its partitions.
        events: counts the services' log lines.
        clock: the library that moves wall clocks.
        disks: give each service a small disk of its own (its folder is mounted already).
    """
    assignor = dice.choice(["range", "roundrobin", "cooperative-sticky"])
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(httpx.AsyncClient(timeout=_CONTROL_S))
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        parts = _make_counterparts(folder)
        for part in parts.values():
            await nursery.start(part.keep_running, name=part.role)
            if part.role != BROKER:
                part.arguments += ("--port", part.address.rpartition(":")[2])
        scene = Scene(folder=folder, parts=parts, services={}, control=control)
        ports = {role: int(part.address.rpartition(":")[2]) for role, part in parts.items()}
        for name in SERVICES:
            service = Service(
                part=Part(role=name, arguments=(), log=folder / f"{name}.log"),
                links={
                    BROKER: stack.enter_context(open_kafka_relay(ports[BROKER])),
                    MODEL: stack.enter_context(open_http_relay(ports[MODEL])),
                    TARGET: stack.enter_context(open_http_relay(ports[TARGET])),
                },
                state=folder / name / "state.db",
                disk=Disk(folder / name) if disks else None,
                clock=None if clock is None else Clock(clock, folder / f"{name}.clock"),
                events=events,
            )
            _configure(service, assignor)
            scene.services[name] = service
            parts[name] = service.part
            await nursery.start(service.part.keep_running, name=name)
        yield scene


def _make_counterparts(folder: Path) -> dict[str, Part]:
    def server(role: str, command: str, *options: str) -> Part:
        return Part(
            role=role,
            arguments=("stationmaster", command, "--end-with-parent", *options),
            log=folder / f"{role}.log",
            address_after="listening on ",
        )

    broker = Part(
        role=BROKER,
        arguments=("stationmaster.service.broker", "--topic", TOPIC),
        log=folder / "broker.log",
        address_after='"bootstrapServers": "',
    )
    model = server(MODEL, "model-server", "--pretend-ms", "10", "--pretend-ms-per-text", "1")
    target = server(TARGET, "receiver", "--db", str(folder / "target.sqlite"))
    return {part.role: part for part in (broker, model, target)}


def _configure(service: Service, assignor: str) -> None:
    part = service.part
    config = part.log.with_suffix(".toml")
    ports = {role: relay.port for role, relay in service.links.items()}
    config.write_text(
        _CONFIG.format(
            broker=ports[BROKER],
            model=ports[MODEL],
            target=ports[TARGET],
            topic=TOPIC,
            group=GROUP,
            assignor=assignor,
            deadline_s=DEADLINE_S,
            state=service.state,
        )
    )
    part.arguments = ("stationmaster", "run", "--end-with-parent", "--config", str(config))
    part.environment = {} if service.clock is None else service.clock.environment
    part.on_event = service.hear
