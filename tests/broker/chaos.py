"""What the chaos tests are made of: services whose processes come and go, a receiver, and a bounded patience.

Every process hangs on a pipe to this one, so that none is left behind, however the tests end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from tests.ledger import Kind, Stock
from tests.processes import open_receiver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping

    import pytest

    from tests.broker.operating import Operator
    from tests.ledger import Ledger
    from tests.processes import Receiver

ROOT: Final = Path(__file__).parents[2]
GRACE_S: Final = 15.0
END_S: Final = GRACE_S + 10 + 15
"""After SIGTERM a process is gone within its grace and 10 s; the rest is for a busy machine."""
SETTLE_S: Final = 90.0

_PLUGIN: Final = "chaos figures"

# ------------------------------------------------------------------------------------------------------------ processes


@attrs.define(eq=False)
class Run:
    """One process of a service, from its start to its end."""

    process: trio.Process
    log: Path
    signals: list[signal.Signals] = attrs.field(factory=list)
    _patience: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it lives; from the first one on its time is limited."""
        if self.process.returncode is None:  # asked anew by each reading
            self.signals.append(number)
            self.process.send_signal(number)
            self._patience.deadline = min(self._patience.deadline, trio.current_time() + END_S)

    async def ends(self) -> None:
        """Wait for its end and judge it: it ends by our signals only, and by SIGTERM in order."""
        with self._patience:
            await self.process.wait()
        code = self.process.returncode
        fine: set[int | None] = set()
        if self.signals:
            fine |= {0, 75}
            # Python's own answer to SIGTERM: before the service begins to listen, which it has not if it logged
            # nothing, and for a second one also when it has ended its work and the interpreter is being taken down.
            if not self.lines() or self.signals.count(signal.SIGTERM) > 1:
                fine.add(-signal.SIGTERM)
        if signal.SIGKILL in self.signals:
            fine.add(-signal.SIGKILL)
        if code not in fine:
            tail = "\n".join(self.lines()[-40:])
            raise AssertionError(f"{self.log}: code {code} after {self.signals}\n{tail}")

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Return the log lines of these events, in order (the last line may be cut short by a kill)."""
        wanted = [f'"event":{space}"{name}"' for name in names for space in ("", " ")]
        return [
            json.loads(line)
            for line in self.lines()
            if line.endswith("}") and any(each in line for each in wanted)
        ]

    def lost_batches(self) -> set[str]:
        """Return the ids of its batches of partitions that were taken from it without a drain."""
        opened: dict[str, set[str]] = {}
        lost: set[str] = set()
        for event in self.events("batch created", "partitions lost"):
            if event["event"] == "batch created":
                batch_id, topic = (
                    event["batch_id"],
                    event["topic"],
                )  # topic_partition_offset_timestamp
                partition = batch_id.removeprefix(f"{topic}_").partition("_")[0]
                opened.setdefault(f"{topic}/{partition}", set()).add(batch_id)
            else:
                lost = lost.union(*(opened.get(place, ()) for place in event["partitions"]))
        return lost


@attrs.define(eq=False)
class Service:
    """One member of a group: its processes come and go, its folder with the state file stays."""

    folder: Path
    runs: list[Run] = attrs.field(factory=list)
    _retired: bool = attrs.field(default=False, init=False)

    @property
    def state(self) -> Path:
        """The state file."""
        return self.folder / "state.db"

    @property
    def now(self) -> Run:
        """Its newest process."""
        return self.runs[-1]

    @asynccontextmanager
    async def open_run(self) -> AsyncIterator[Run]:
        """Start a process; killed when the block ends, if it has not ended by then."""
        log = self.folder / f"{len(self.runs):03}.log"
        command = [sys.executable, "-m", "stationmaster", "run", "--end-with-parent"]
        with log.open("wb") as output:
            process = await trio.lowlevel.open_process(
                [*command, "--config", str(self.folder / "stationmaster.toml")],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        run = Run(process, log)
        self.runs.append(run)
        assert process.stdin is not None
        async with process.stdin:
            try:
                yield run
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                        await process.wait()

    async def keep_running(self) -> None:
        """Let processes follow one another, the next at once when one has ended, until `retire`."""
        while not self._is_retired():
            async with self.open_run() as run:
                if self._is_retired():  # while it was being started
                    run.send(signal.SIGTERM)
                await run.ends()

    def _is_retired(self) -> bool:
        return self._retired

    def retire(self) -> None:
        """End the last process by SIGTERM."""
        self._retired = True
        if self.runs:
            self.now.send(signal.SIGTERM)

    def count(self, event: str) -> int:
        """Return how often its processes have logged this event."""
        return sum(len(run.events(event)) for run in self.runs)


# ---------------------------------------------------------------------------------------------------------------- scene


@attrs.define(eq=False)
class Scene:
    """A topic with its ledger, the group that reads it, and the receiver."""

    operator: Operator
    ledger: Ledger
    receiver: Receiver
    folder: Path
    group: str
    config: str
    """The services' configuration, without what differs from one to the other."""
    services: list[Service] = attrs.field(factory=list, init=False)

    def make_service(self) -> Service:
        """Make the folder of one more service."""
        folder = self.folder / f"service-{len(self.services)}"
        folder.mkdir()
        state = f'[outbox]\npath = "{folder / "state.db"}"\nmax_backoff_s = 2.0\n'
        (folder / "stationmaster.toml").write_text(self.config + state)
        service = Service(folder)
        self.services.append(service)
        return service

    def stock(self) -> Stock:
        """Read what stands where, now."""
        return Stock.take(self.receiver.database, [service.state for service in self.services])

    async def committed(self) -> dict[int, int]:
        """Return what the group has committed."""
        ask = partial(self.operator.committed, self.group, self.ledger.topic)
        return await trio.to_thread.run_sync(ask)

    async def watch_commits(self) -> None:
        """Check again and again that everything below a committed offset stands where it has to, at that moment."""
        while True:
            committed = await self.committed()
            stock = self.stock()
            vain = [
                place
                for place, content in self.ledger.entries.copy().items()
                if place[1] < committed.get(place[0], 0) and not stock.holds(place, content)
            ]
            assert not vain, f"committed, and nowhere to be found: {vain[:10]}"
            await trio.sleep(1)

    async def settle(self, *, seconds: float = SETTLE_S) -> None:
        """End production, then wait until everything is committed and the outboxes are empty."""
        await trio.to_thread.run_sync(self.ledger.finish)
        ends = self.ledger.ends()
        committed: dict[int, int] = {}
        with trio.move_on_after(seconds):
            while (committed := await self.committed()) != ends:  # noqa: ASYNC110 - the broker tells nobody
                await trio.sleep(0.2)
            while self.stock().kept:  # noqa: ASYNC110 - nor do other processes' files
                await trio.sleep(0.2)
            return
        raise AssertionError(
            f"not settled after {seconds:g} s: committed {committed} of {ends}, "
            f"{len(self.stock().kept)} batches in outboxes"
        )

    def runs_again(self, *, but_for: Collection[str] = ()) -> int:
        """Return how many runs of the handler, but for these batches, were for a record and station that had one."""
        lines = (self.folder / "runs").read_text().splitlines()
        done = [line for line in lines if line.partition(" ")[0] not in but_for]
        return len(done) - len(set(done))

    def sent_again(self, *, but_for: Collection[str] = ()) -> int:
        """Return how often the receiver was sent a batch, but for these, that it held already."""
        with closing(sqlite3.connect(self.receiver.database)) as db:
            rows = db.execute("SELECT batch_id, deliveries FROM batches").fetchall()
        return sum(deliveries - 1 for batch_id, deliveries in rows if batch_id not in but_for)

    def lost_batches(self) -> set[str]:
        """Return the ids of batches that a member had when it lost their partitions, being silent for too long.

        No drain can save these: their next owner works on them again.
        """
        return set().union(*(run.lost_batches() for each in self.services for run in each.runs))

    def figures(self) -> dict[str, object]:
        """Return the balance's figures."""
        stock, entries = self.stock(), self.ledger.entries
        kinds = [content.kind for content in entries.values()]
        return {
            "records acknowledged": len(entries),
            "good": kinds.count(Kind.GOOD),
            "poison": kinds.count(Kind.POISON),
            "lost": sum(not stock.holds(*item) for item in entries.items()),
            "double rows": stock.double_rows,
            "ids sent again": stock.sent_again,
            "handler runs again": self.runs_again(),
            "left in outboxes": len(stock.kept),
            "stations failed": stock.outcomes("failed"),
            "stations timed out": stock.outcomes("timedOut"),
        }

    def check_balance(self) -> None:
        """Check that nothing was lost, doubled or invented, and that the ledger knows the whole topic."""
        stock, entries = self.stock(), self.ledger.entries
        lost = [
            (place, content)
            for place, content in entries.items()
            if not stock.holds(place, content)
        ]
        assert not lost, f"lost {len(lost)}: {lost[:10]}"
        double_rows, misplaced = stock.double_rows, stock.misplaced(entries)
        assert double_rows == 0
        assert misplaced == []
        ends = {
            number: end
            for number, end in self.operator.end_offsets(self.ledger.topic).items()
            if end
        }
        assert sum(ends.values()) == len(entries)
        assert ends == self.ledger.ends()


@asynccontextmanager
async def open_scene(
    operator: Operator,
    folder: Path,
    ledger: Ledger,
    *,
    bootstrap: str | None = None,
    kafka: str = "",
    quickest_s: float = 0.02,
    slowest_s: float = 0.3,
) -> AsyncIterator[Scene]:
    """Open a receiver, and make the configuration of services that read the ledger's topic.

    Args:
        operator: asks the broker.
        folder: for everything that stays.
        ledger: whose topic is read.
        bootstrap: the services' way to the broker, if not the operator's.
        kafka: further lines of `[kafka]`.
        quickest_s: shortest time of a handler's run.
        slowest_s: longest time of a handler's run.
    """
    folder.mkdir(parents=True)  # noqa: ASYNC240 - once, at the start
    group = operator.new_name("chaos")
    async with open_receiver(folder) as receiver:
        config = f"""
[source]
kind = "kafka"
[kafka]
bootstrap_servers = "{bootstrap or operator.bootstrap}"
group_id = "{group}"
topics = ["{ledger.topic}"]
{kafka}
[stations]
handler = "tests.broker.chaos_handler:open_moody_handler"
[stations.options]
quickest_s = {quickest_s}
slowest_s = {slowest_s}
runs = "{folder / "runs"}"
[upload]
url = "{receiver.url}/batches"
[log]
format = "json"
[shutdown]
grace_s = {GRACE_S}
"""
        yield Scene(operator, ledger, receiver, folder, group, config)


# -------------------------------------------------------------------------------------------------------------- general


async def until(holds: Callable[[], object], what: str, *, seconds: float) -> float:
    """Wait until this holds, for what other processes do and tell nobody; return the seconds that it took."""
    began = trio.current_time()
    with trio.move_on_after(seconds):
        while not holds():  # noqa: ASYNC110 - see above
            await trio.sleep(0.05)
        return trio.current_time() - began
    raise AssertionError(f"not within {seconds:g} s: {what}")


def new_dice(default_seed: int) -> tuple[random.Random, int]:
    """Return dice and their seed, which STATIONMASTER_CHAOS_SEED sets; pytest shows the seed when a test fails."""
    seed = int(os.environ.get("STATIONMASTER_CHAOS_SEED", default_seed))
    print(f"STATIONMASTER_CHAOS_SEED={seed}")
    return random.Random(seed), seed


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Limit a test that takes longer than pytest's fault handler allows; the handler's own time grows with it."""
    faulthandler.cancel_dump_traceback_later()
    faulthandler.dump_traceback_later(seconds + 30, file=2)
    with trio.fail_after(seconds):
        yield


@attrs.define(eq=False)
class _Figures:
    """A plugin that prints figures below the results."""

    sections: list[tuple[str, Mapping[str, object]]] = attrs.field(factory=list)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(_PLUGIN)
        for title, figures in self.sections:
            terminalreporter.line(title)
            for name, figure in figures.items():
                terminalreporter.line(f"    {name}: {figure}")


def tell(config: pytest.Config, title: str, figures: Mapping[str, object]) -> None:
    """Have figures printed when all tests have run."""
    plugin = config.pluginmanager.get_plugin(_PLUGIN)
    if plugin is None:
        config.pluginmanager.register(plugin := _Figures(), _PLUGIN)
    plugin.sections.append((title, figures))
