"""`stationmaster demo`: the whole way on one machine, every part a process of its own on real loopback sockets.

    broker         librdkafka's mock cluster       producer    replays the packaged station data
    model-server   the built-in model              receiver    takes the uploads into SQLite
    service        `stationmaster run` between them

Roles, pids and addresses stand in `demo.json` in the state folder, so that one can kill a part and watch. Model server,
receiver and service are started again when they end (the service goes on from its committed offsets); without broker
or producer the demo ends. What it says at its end is read from the receiver's database.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import click
import trio
from trio_util import periodic

from stationmaster.errors import StationmasterError, plain_errors
from stationmaster.service.config_rules import toml_text
from stationmaster.service.demo_handler import FAILING_STATION, FIRST_FAULT, SLOW_STATION
from stationmaster.service.demo_report import Progress, balance, open_screen, read_only

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

TOPIC: Final = "SCHEDULE-STATION-REALTIME-DATA"
DEADLINE_S: Final = 2.0
_PARTITIONS: Final = 4  # librdkafka's mock cluster gives every topic this many
_READY_S: Final = 20.0  # for one part to be ready
_AGAIN_AFTER_S: Final = 2.0
_PATIENCE_S: Final = 70.0  # after the last message was sent
_STOP_S: Final = 25.0
_LOOK_EVERY_S: Final = 0.5
_LINE_BYTES: Final = 1_000_000

_CONFIG: Final = """\
# Written by `stationmaster demo`.
[source]
kind = "kafka"

[kafka]
bootstrap_servers = "{broker}"
group_id = "stationmaster-demo"
topics = ["{topic}"]
assignor = "range"
session_timeout_s = 6.0  # a killed service's partitions are free again after this

[batch]
deadline_s = {deadline_s}

[stations]
handler = "stationmaster.service.demo_handler:open_handler"

[embeddings]
urls = ["{model}/v1"]
model = "readings-128"

[upload]
url = "{receiver}/batches"

[outbox]
path = {outbox}
max_backoff_s = 5.0

[web]
port = {port}

[log]
format = "json"
"""


class DemoError(StationmasterError):
    """A part of the demo could not be started, or ended too early."""


@attrs.define(eq=False, kw_only=True)
class Part:
    """One process of the demo."""

    role: str
    arguments: tuple[str, ...]
    """After `python -m`."""
    read_address: Callable[[str], str | None] = lambda _line: "-"
    """Finds the address in a line of output: then the part is ready."""
    on_line: Callable[[str], None] = lambda _line: None
    again: bool = False
    """Start it again when it ends."""
    process: trio.Process | None = None
    address: str = ""
    ready: trio.Event = attrs.field(factory=trio.Event)
    code: int = 0
    """Of its last end."""
    stopping: bool = False

    def take(self, line: str) -> None:
        """Take one line of output."""
        if not self.ready.is_set() and (address := self.read_address(line)) is not None:
            self.address = address
            self.ready.set()
        self.on_line(line)


@attrs.define(eq=False)
class Demo:
    """The running parts."""

    state: Path
    progress: Progress
    nursery: trio.Nursery
    parts: dict[str, Part] = attrs.field(factory=dict)

    async def start(self, part: Part) -> str:
        """Start a part, keep it running, and return its address when it is ready.

        Raises:
            DemoError: it is not ready in time.
        """
        self.parts[part.role] = part
        self.nursery.start_soon(self._keep, part, name=part.role)
        with trio.move_on_after(_READY_S):
            await part.ready.wait()
            self.tell()
            return part.address
        raise DemoError(f"the {part.role} is not ready after {_READY_S:g} s; see {self._log(part)}")

    async def stop(self, role: str) -> int:
        """End a part by SIGTERM and return its exit code (by SIGKILL if it takes too long)."""
        part = self.parts[role]
        part.stopping = True
        process = part.process
        if process is None:
            await trio.lowlevel.checkpoint()
            return part.code
        process.terminate()
        with trio.move_on_after(_STOP_S):
            return await process.wait()
        process.kill()
        return await process.wait()

    def tell(self) -> None:
        """Write who runs where to `demo.json`, in one go."""
        parts = {
            part.role: {"pid": part.process.pid, "address": part.address}
            for part in self.parts.values()
            if part.process is not None
        }
        fresh = self.state / "demo.json.new"
        fresh.write_text(json.dumps({"state": str(self.state), "parts": parts}, indent=2) + "\n")
        fresh.replace(self.state / "demo.json")

    def _log(self, part: Part) -> Path:
        return self.state / f"{part.role}.log"

    async def _keep(self, part: Part) -> None:
        """Run a part to its end, and again if it is one of those."""
        while True:
            async with _open_process(part, self._log(part)) as process:
                part.process = process
                self.tell()
                code = part.code = await process.wait()
            part.process = None
            if part.stopping or (code == 0 and not part.again):
                return
            self.progress.note(f"{part.role} ended with code {code}")
            if not part.again or not part.ready.is_set():
                raise DemoError(f"the {part.role} ended with code {code}; see {self._log(part)}")
            await trio.sleep(_AGAIN_AFTER_S)
            if self.parts[part.role].stopping:  # asked to end meanwhile
                return
            self.progress.note(f"{part.role} starts again")


@asynccontextmanager
async def _open_process(part: Part, log: Path) -> AsyncIterator[trio.Process]:
    """Run a part; its output goes to its log and, line by line, to `part.take`. Leaving the block kills it."""
    with log.open("ab", buffering=0) as sink:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", *part.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None  # noqa: S101, PT018 - both were asked for
        async with stdin, stdout, trio.open_nursery() as nursery:
            nursery.start_soon(_read_lines, stdout, sink.write, part.take)
            try:
                yield process
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + _STOP_S):
                        await process.wait()
                nursery.cancel_scope.deadline = trio.current_time() + 1.0  # for its last lines


async def _read_lines(
    stream: trio.abc.ReceiveStream,
    keep: Callable[[bytes | bytearray], object],
    take: Callable[[str], None],
) -> None:
    """Hand over whole lines (a line can arrive in pieces), to the end of the stream."""
    rest = b""
    async for chunk in stream:
        keep(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[-_LINE_BYTES:]
        for line in lines:
            take(line.decode(errors="replace"))


async def run_demo(
    *, batches: int, seconds: float, live: bool, state: Path | None, port: int = 0
) -> int:
    """Run the demo and return its exit code: 0 only if nothing was lost, doubled or late.

    Args:
        batches: messages to send; each is a batch.
        seconds: time to send them in.
        live: a live table instead of plain lines.
        state: folder for logs, database and `demo.json`; a new temporary one if None.
        port: of the service's status page, on loopback; 0 is any free one.

    Raises:
        DemoError: a part could not be started, or one that the demo cannot do without ended.
    """
    folder = state or Path(tempfile.mkdtemp(prefix="stationmaster-demo-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the state folder {folder}: {error.strerror}") from error
    if (folder / "receiver.sqlite").exists():
        raise DemoError(f"{folder} holds an earlier demo; name another folder, or none")
    progress = Progress(messages=batches, deadline_s=DEADLINE_S, state=folder)
    codes: list[int] = []
    with plain_errors(), open_screen(progress, live=live) as refresh:
        async with trio.open_nursery() as nursery:
            await nursery.start(_cancel_on_signal, nursery.cancel_scope)
            nursery.start_soon(_follow, progress, refresh)
            demo = Demo(folder, progress, nursery)
            await _start_parts(demo, batches, seconds, port)
            with trio.move_on_after(seconds + _PATIENCE_S):
                await progress.all_held.wait()
            codes.append(await demo.stop("service"))
            for role in ("producer", "receiver", "model-server", "broker"):
                await demo.stop(role)
            nursery.cancel_scope.cancel()
    if not codes:
        click.echo(f"interrupted; logs, database and demo.json: {folder}")
        return 1
    books = balance(folder / "receiver.sqlite", progress.produced_by_partition)
    click.echo(books.summary(slow=SLOW_STATION, failing=FAILING_STATION, deadline_s=DEADLINE_S))
    click.echo(f"service ended with code {codes[0]}; logs, database and demo.json: {folder}")
    good = books.good(
        batches,
        slow=SLOW_STATION,
        failing=FAILING_STATION,
        deadline_s=DEADLINE_S,
        faults_due=progress.produced_by_partition.get(0, 0) > FIRST_FAULT,
    )
    return 0 if good and codes == [0] else 1


async def _start_parts(demo: Demo, batches: int, seconds: float, port: int) -> None:
    progress = demo.progress
    broker = await demo.start(
        Part(
            role="broker",
            arguments=("stationmaster.service.broker", "--topic", TOPIC),
            read_address=_broker_address,
        )
    )
    model = await demo.start(
        _server("model-server", "--pretend-ms", "25", "--pretend-ms-per-text", "4")
    )
    receiver = await demo.start(_server("receiver", "--db", str(demo.state / "receiver.sqlite")))
    config = demo.state / "demo.toml"
    config.write_text(
        _CONFIG.format(
            broker=broker,
            topic=TOPIC,
            model=model,
            receiver=receiver,
            outbox=toml_text(str(demo.state / "service-state.db")),
            deadline_s=DEADLINE_S,
            port=port,
        )
    )
    progress.page = await demo.start(_service(progress, config))
    progress.note(f"status page: {progress.page}")
    producer = ("--bootstrap-servers", broker, "--topic", TOPIC, "--partitions", str(_PARTITIONS))
    amount = ("--messages", str(batches), "--seconds", str(seconds))
    await demo.start(
        Part(
            role="producer",
            arguments=("stationmaster.service.producer", *producer, *amount),
            on_line=progress.take_producer_line,
        )
    )


def _service(progress: Progress, config: Path) -> Part:
    """Make the service, which is ready when it has partitions; its page keeps its port when it is started again."""
    command = ("stationmaster", "run", "--config", str(config), "--end-with-parent")
    part = Part(role="service", arguments=command, on_line=progress.take_log_line, again=True)
    page = ""

    def read_address(line: str) -> str | None:
        nonlocal page
        if '"web listens"' in line:
            page = str(json.loads(line)["url"])
            part.arguments = (*command, "--set", f"web.port={page.rpartition(':')[2]}")
        return page if '"partitions assigned"' in line else None

    part.read_address = read_address
    return part


def _server(role: str, *options: str) -> Part:
    """Make a part of one of our two servers; it keeps its port when it is started again."""
    command = ("stationmaster", role, "--end-with-parent", *options)
    part = Part(role=role, arguments=command, again=True)

    def read_address(line: str) -> str | None:
        _, found, address = line.partition("listening on ")
        if not found:
            return None
        part.arguments = (*command, "--port", address.rpartition(":")[2])
        return address

    part.read_address = read_address
    return part


def _broker_address(line: str) -> str | None:
    return str(json.loads(line)["bootstrapServers"]) if "bootstrapServers" in line else None


async def _follow(progress: Progress, refresh: Callable[[], None]) -> None:
    """Look at the receiver's database now and then, and show where the demo stands."""
    async for _ in periodic(_LOOK_EVERY_S):
        progress.hold(await trio.to_thread.run_sync(_count_held, progress.state))
        refresh()


def _count_held(state: Path) -> int:
    try:
        with closing(sqlite3.connect(read_only(state / "receiver.sqlite"), uri=True)) as db:
            rows: Iterable[tuple[int]] = db.execute("SELECT count(*) FROM batches")
            return next(iter(rows))[0]
    except sqlite3.OperationalError:
        return 0  # the receiver has not made its tables yet


async def _cancel_on_signal(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
