"""One run: everything starts, things go wrong, all is mended, and the books are balanced."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio
from confluent_kafka import KafkaException

from stationmaster.service.demo_report import read_only
from tests.chaos.books import Books, read_books, unsound
from tests.chaos.machine import Disk, UnavailableError, build_clock
from tests.chaos.plan import SERVICES, draw_plan
from tests.chaos.scene import DEADLINE_S, GROUP, PARTITIONS, TOPIC, Scene, open_scene
from tests.ledger import Kind, open_ledger
from tests.processes import committed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.chaos.plan import Fault
    from tests.ledger import Ledger, Place

SETTLE_S: Final = 180.0
STUCK_S: Final = 60.0
"""After this long without any fault, what has not settled is stuck: that is a fault of ours."""
_LOOK_EVERY_S: Final = 2.0
_STEADY_S: Final = 0.5


@attrs.frozen(kw_only=True)
class Order:
    """What is wanted."""

    seconds: float
    seed: int
    kinds: tuple[str, ...]
    per_s: float
    folder: Path
    say: Callable[[str], object]
    """Takes a line for the terminal."""
    show: Callable[[str], object]
    """Takes a line about how far it is, more often than anybody wants to read; the last one counts."""


@attrs.define(eq=False)
class Outcome:
    """What came of it."""

    books: Books
    faults: list[str] = attrs.field(factory=list)
    """What is wrong, in words: of the books, of processes, of state files."""
    struck: Counter[str] = attrs.field(factory=Counter)
    figures: dict[str, object] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Watch:
    """Looks at the running services from outside: what they committed must stand somewhere at that moment."""

    scene: Scene
    ledger: Ledger
    committed: dict[int, int] = attrs.field(factory=dict)
    in_outboxes: int = 0
    looks: int = 0
    blind: int = 0
    """Looks at which somebody did not answer."""
    why_blind: str = ""
    """At the last look; empty if all answered."""
    _known: set[Place] = attrs.field(factory=set)
    _checked: dict[int, int] = attrs.field(factory=dict)
    _row: int = 0

    @property
    def uploaded(self) -> int:
        """Batches at the target, as far as was looked."""
        return self._row

    async def look(self) -> list[str]:
        """Return what is committed and nowhere."""
        # A broker that is stopped answers late, or never: who interrupts this does not wait for it.
        return await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)

    def _look(self) -> list[str]:
        try:
            # In this order: a batch is committed when it stands somewhere, and goes from an outbox to the target.
            now = committed(self.scene.bootstrap, GROUP, TOPIC)
            waiting: set[Place] = set()
            for service in self.scene.services.values():
                with closing(sqlite3.connect(read_only(service.state), uri=True, timeout=2)) as db:
                    waiting |= {
                        _place(name) for (name,) in db.execute("SELECT batch_id FROM outbox")
                    }
                    letters = db.execute('SELECT partition, "offset" FROM dead_letters')
                    self._known |= set(letters)
            with closing(sqlite3.connect(read_only(self.scene.target_file), uri=True)) as db:
                query = "SELECT rowid, batch_id FROM batches WHERE rowid > ? ORDER BY rowid"
                for row, name in db.execute(query, (self._row,)):
                    self._known.add(_place(name))
                    self._row = row
        except (KafkaException, sqlite3.Error) as error:
            self.blind += 1
            self.why_blind = repr(error)
            return []
        self.looks, self.why_blind = self.looks + 1, ""
        self.committed, self.in_outboxes = now, len(waiting)
        vain = []
        for partition, end in now.items():
            for offset in range(self._checked.get(partition, 0), end):
                place = (partition, offset)
                content = self.ledger.entries.get(place)
                empty = content is not None and content.kind is Kind.EMPTY
                if not empty and place not in self._known and place not in waiting:
                    vain.append(f"lost: {place} was committed when it stood nowhere")
            self._checked[partition] = max(end, self._checked.get(partition, 0))
        return vain


def _place(batch_id: str) -> Place:
    _, partition, offset, _ = batch_id.rsplit("_", 3)
    return int(partition), int(offset)


async def run(order: Order) -> Outcome:
    """Do it all; raises only if it could not be done.

    Raises:
        PartError: a process did not start or end within its time.
        UnavailableError: the machine lacks what a kind of fault needs; to be asked before with `prepare`.
    """
    dice = random.Random(order.seed)
    events: Counter[str] = Counter()
    plan = draw_plan(dice, kinds=order.kinds, seconds=order.seconds)
    clock = build_clock(order.folder) if "clock" in order.kinds else None
    async with open_scene(
        order.folder, dice, events=events, clock=clock, disks="disk" in order.kinds
    ) as scene:
        bootstrap = scene.bootstrap
        with open_ledger(
            bootstrap, TOPIC, partitions=PARTITIONS, per_s=order.per_s, seed=order.seed
        ) as ledger:
            watch = Watch(scene, ledger)
            faults: list[str] = []
            struck = await _strike_all(order, plan, scene, watch, faults)
            order.say("all is mended; waiting until everything has arrived")
            await scene.heal()
            await trio.to_thread.run_sync(ledger.finish, abandon_on_cancel=True)
            settled_s = await _settle(order, watch, faults)
        faults += await _end_services(scene)
        faults += [
            f"{part.role} {fault}"
            for part in scene.parts.values()
            for end in part.ends
            if (fault := end.fault())
        ]
        outcome = await trio.to_thread.run_sync(_audit, scene, ledger, faults)
    outcome.struck = struck
    outcome.figures |= _figures(scene, watch, events) | {"settled after s": round(settled_s, 1)}
    return outcome


async def _strike_all(
    order: Order, plan: list[Fault], scene: Scene, watch: Watch, faults: list[str]
) -> Counter[str]:
    """Let the faults of the plan happen at their times, over one another; all have ended on return."""
    began = trio.current_time()
    struck: Counter[str] = Counter()
    with order.folder.joinpath("faults.log").open("w", buffering=1) as log:
        ended = trio.Event()
        async with trio.open_nursery() as looking, trio.open_nursery() as striking:
            looking.start_soon(
                partial(_keep_looking, order, watch, faults, began=began, ended=ended)
            )
            for number, fault in enumerate(plan):
                await trio.sleep_until(began + fault.at_s)
                line = f"{trio.current_time() - began:6.1f} s  {fault.told()}"
                log.write(f"{time.strftime('%H:%M:%S')} {line}\n")
                order.say(line)
                struck[fault.kind] += 1
                striking.start_soon(scene.strike, fault, number, name=fault.told())
            await trio.sleep_until(began + order.seconds)
            ended.set()
    return struck


async def _keep_looking(
    order: Order, watch: Watch, faults: list[str], *, began: float, ended: trio.Event
) -> None:
    while not ended.is_set():
        with trio.move_on_after(_LOOK_EVERY_S):
            await ended.wait()
        faults += await watch.look()
        order.show(_progress(watch, watch.scene, trio.current_time() - began))


def _progress(watch: Watch, scene: Scene, seconds: float) -> str:
    return (
        f"{seconds:6.1f} s  produced {len(watch.ledger.entries)}, uploaded {watch.uploaded}, "
        f"in outboxes {watch.in_outboxes}, committed {sum(watch.committed.values())}, "
        f"lives {sum(len(scene.parts[name].ends) + 1 for name in SERVICES)}"
    )


async def _settle(order: Order, watch: Watch, faults: list[str]) -> float:
    """Wait until everything is committed and the outboxes are empty; returns the seconds that it took.

    Services that are stuck are restarted, once, as an operator would: whether that heals them tells what kind of fault
    it is, and the books can be balanced. The run has failed all the same.
    """
    restarted = False
    began = trio.current_time()
    ends = watch.ledger.ends()
    while trio.current_time() < began + SETTLE_S:
        faults += await watch.look()
        now = {partition: offset for partition, offset in watch.committed.items() if offset}
        if now == ends and not watch.in_outboxes:
            break
        seconds = trio.current_time() - began
        order.show(_progress(watch, watch.scene, seconds))
        if seconds > STUCK_S and not restarted:
            restarted = True
            stuck = (
                f"stuck {STUCK_S:g} s after the last fault: committed {watch.committed} of {ends}"
            )
            faults.append(stuck)
            order.say(f"{stuck}; the services are restarted")
            for name in SERVICES:
                watch.scene.parts[name].send(signal.SIGTERM)
        await trio.sleep(_STEADY_S)
    else:
        faults.append(
            f"not settled after {SETTLE_S:g} s: committed {watch.committed} of {ends}, "
            f"{watch.in_outboxes} batches in outboxes {watch.why_blind}"
        )
    return trio.current_time() - began


async def _end_services(scene: Scene) -> list[str]:
    codes: dict[str, int] = {}

    async def end(name: str) -> None:
        codes[name] = await scene.parts[name].retire()

    async with trio.open_nursery() as nursery:
        for name in SERVICES:
            nursery.start_soon(end, name)
    return [f"{name} ended with code {code}, not 0" for name, code in codes.items() if code]


def _audit(scene: Scene, ledger: Ledger, faults: list[str]) -> Outcome:
    states = {name: service.state for name, service in scene.services.items()}
    books = read_books(TOPIC, ledger.entries, target=scene.target_file, states=states)
    faults += books.faults()
    faults += unsound([*states.values(), scene.target_file])
    if sum(ledger.ends().values()) != len(ledger.entries):
        faults.append("the log has records that the ledger does not know")
    return Outcome(books, faults)


def _figures(scene: Scene, watch: Watch, events: Counter[str]) -> dict[str, object]:
    ends = [end for name in SERVICES for end in scene.parts[name].ends]
    services = scene.services.values()
    late = sum(service.late for service in services)
    excused = sum(service.late_when_stopped for service in services)
    longest_s = max(service.longest_s for service in services)
    closed = {by: events[f"batch {by}"] for by in ("complete", "quorum", "deadline")}
    return {
        "kills survived (services)": sum(signal.SIGKILL in end.signals for end in ends),
        "exit codes (services)": dict(Counter(end.code for end in ends)),
        "ended by themselves": [end.excuse for end in ends if not end.signals],
        "tracebacks in logs": {p.role: p.tracebacks for p in scene.parts.values() if p.tracebacks},
        "looks at commits": f"{watch.looks}, blind {watch.blind}",
        "batches through outboxes": events["upload done from outbox"],
        "partitions revoked, lost": f"{events['partitions revoked']}, {events['partitions lost']}",
        "batches closed by": closed,
        f"late (deadline {DEADLINE_S:g} s)": f"{late} (longest {longest_s:.2f} s), "
        f"besides {excused} around a SIGSTOP",
        "faults missed": scene.missed,
    }


def prepare(kinds: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Mount disks and try the compiler; returns which kinds of faults cannot be had here, and why."""
    missing: dict[str, str] = {}
    for name in SERVICES:
        (folder / name).mkdir(parents=True)
        try:
            if "disk" in kinds:
                Disk(folder / name).mount()
        except UnavailableError as error:
            missing["disk"] = str(error)
    try:
        if "clock" in kinds:
            build_clock(folder)
    except UnavailableError as error:
        missing["clock"] = str(error)
    return missing
