"""The upload target is away for long, and the disk is full: what waits, what pauses, and what it costs."""

from __future__ import annotations

import os
import sqlite3
import statistics
import subprocess
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import httpx
import pytest
import trio

from tests.broker.chaos import Scene, Service, open_scene, patience, tell
from tests.ledger import open_ledger
from tests.processes import READY_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.broker.cluster import Broker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

PARTITIONS = 4
OUTAGE_S = float(os.environ.get("STATIONMASTER_CHAOS_OUTAGE_S", "300"))
BLOCKED = "store takes nothing: consumption pauses until it does"
MIB = 1024 * 1024


async def set_target(scene: Scene, *, status: int | None) -> None:
    async with httpx.AsyncClient(timeout=READY_S) as client:
        answer = await client.post(f"{scene.receiver.url}/control", json={"status": status})
        answer.raise_for_status()


def make_service(scene: Scene, *, state: Path | None = None, more: str = "") -> Service:
    """Make a service that waits for the target's answers, with more keys of `[outbox]`.

    This target answers everything, if only with 503, which opens the breaker at once: an attempt's limit is a guard
    here. One that a busy machine exceeds would send a batch again that the target holds already.
    """
    limits = f"timeout_s = {READY_S}\nattempt_timeout_s = {READY_S}\n"
    scene.config = scene.config.replace("[upload]\n", f"[upload]\n{limits}")
    service = scene.make_service()
    file = service.folder / "stationmaster.toml"
    text = file.read_text()
    if state is not None:
        text = text.replace(str(service.state), str(state))
        service.state.symlink_to(state)  # where the books look
    file.write_text(text + more)
    return service


@attrs.frozen
class Moment:
    """What can be seen of a service from outside."""

    at: float
    committed: int
    rows: int
    body_bytes: int
    resident_bytes: int


@attrs.define(eq=False)
class Watch:
    """Looks at a service every second or so."""

    scene: Scene
    service: Service
    began: float = attrs.field(factory=trio.current_time)
    moments: list[Moment] = attrs.field(factory=list)

    async def look(self) -> Moment:
        rows, held = query(self.service.state, "SELECT count(*), sum(length(body)) FROM outbox")
        status = Path(f"/proc/{self.service.now.process.pid}/status").read_text()  # noqa: ASYNC240
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        moment = Moment(
            trio.current_time() - self.began,
            sum((await self.scene.committed()).values()),
            rows,
            held or 0,
            int(line.split()[1]) * 1024,
        )
        self.moments.append(moment)
        return moment

    async def run(self, seconds: float) -> list[Moment]:
        """Look for so long; return what was seen."""
        first = len(self.moments)
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            await self.look()
            await trio.sleep(1)
        return self.moments[first:]

    async def until_it_stands_still(self, filler: Path, *, seconds: float) -> int:
        """Fill the disk up until nothing was committed for 5 s; return how much was."""
        with trio.fail_after(seconds):
            while True:
                fill_up(filler)
                moments = await self.run(5)
                if moments[0].committed == moments[-1].committed:
                    return moments[0].committed

    def is_blocked(self) -> bool:
        """Whether the service has said that its outbox takes nothing, and not that it does again."""
        said = [
            sum(line["store"] == "outbox" for line in self.service.now.events(event))
            for event in (BLOCKED, "store works again")
        ]
        return bool(said[0] > said[1])

    async def until_all_is_delivered(self, *, seconds: float) -> float:
        """End production and wait for its end; return the seconds that it took."""
        await trio.to_thread.run_sync(self.scene.ledger.finish)
        total = sum(self.scene.ledger.ends().values())
        began = trio.current_time()
        with trio.fail_after(seconds):
            while True:
                moment = await self.look()
                if not moment.rows and moment.committed == total:
                    return trio.current_time() - began
                await trio.sleep(0.5)


def query(file: Path, statement: str) -> tuple[int, int]:
    with closing(sqlite3.connect(file, timeout=10)) as db:
        found: tuple[int, int] = db.execute(statement).fetchone()
        return found


async def end(service: Service) -> None:
    """End a service in order."""
    (run,) = service.runs
    service.retire()
    await run.process.wait()
    assert run.process.returncode == 0


def median_bytes(moments: list[Moment]) -> float:
    return statistics.median(moment.resident_bytes for moment in moments)


async def test_a_target_that_is_away_for_five_minutes_costs_nothing_but_time(
    broker: Broker, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bound = 3 * MIB
    topic = broker.create_topic(partitions=PARTITIONS)
    with (
        patience(OUTAGE_S + 400),
        open_ledger(broker.bootstrap, topic, partitions=PARTITIONS, per_s=60, seed=3) as ledger,
    ):
        async with (
            open_scene(broker, tmp_path / "scene", ledger) as scene,
            trio.open_nursery() as nursery,
        ):
            service = make_service(scene, more=f"max_bytes = {bound}\n")
            nursery.start_soon(service.keep_running)
            await scene.receiver.wait_batches(1)
            watch = Watch(scene, service)
            before = await watch.run(20)
            await set_target(scene, status=503)
            away = await watch.run(OUTAGE_S)
            await set_target(scene, status=None)
            took_s = await watch.until_all_is_delivered(seconds=240)
            after = await watch.run(10)
            pid = service.now.process.pid
            blocked = service.now.events(BLOCKED)
            await end(service)

            fullest = max(moment.body_bytes for moment in away)
            full = [moment for moment in away if moment.body_bytes > bound - 2_000]
            figures = {
                "one process all the time": len(service.runs) == 1 and bool(pid),
                "outage s": OUTAGE_S,
                "batches kept, most at once": max(moment.rows for moment in away),
                "outbox bytes at most": f"{fullest} of {bound}",
                "consumption paused for s": round(full[-1].at - full[0].at, 1) if full else 0,
                "committed while the outbox filled": full[0].committed - away[0].committed,
                "all delivered after s": round(took_s, 1),
                "memory before, away (most), after: MB": " ".join(
                    f"{number / 1e6:.1f}"
                    for number in (
                        median_bytes(before),
                        max(moment.resident_bytes for moment in away),
                        median_bytes(after),
                    )
                ),
                **scene.figures(),
            }
            tell(request.config, "target away", figures)
            scene.check_balance()
            assert fullest <= bound
            assert full, "the outbox never filled"
            assert full[-1].committed == full[len(full) // 2].committed, "it did not pause"
            assert [line["store"] for line in blocked] == ["outbox"]
            assert scene.stock().sent_again == 0, "this target lost no answer"
            assert max(each.resident_bytes for each in away) < median_bytes(before) + 48 * MIB
            assert median_bytes(after) < median_bytes(before) + 48 * MIB


@contextmanager
def small_disk(folder: Path, *, mebibytes: int) -> Iterator[Path]:
    """Mount a file system of this size; needs root."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        if os.environ.get("STATIONMASTER_REQUIRE_BROKER") == "1":
            raise AssertionError(f"no small disk here: {done.stderr}")
        pytest.skip(f"no small disk here: {done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_up(filler: Path) -> None:
    """Let this file take all the room that is left."""
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_full_disk_pauses_consumption_and_nothing_else(
    broker: Broker, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    topic = broker.create_topic(partitions=PARTITIONS)
    with (
        small_disk(tmp_path / "disk", mebibytes=32) as disk,
        patience(400),
        open_ledger(broker.bootstrap, topic, partitions=PARTITIONS, per_s=60, seed=4) as ledger,
    ):
        async with (
            open_scene(broker, tmp_path / "scene", ledger) as scene,
            trio.open_nursery() as nursery,
        ):
            service = make_service(scene, state=disk / "state.db")
            nursery.start_soon(service.keep_running)
            await scene.receiver.wait_batches(1)
            watch = Watch(scene, service)

            # Full while the target is away: it stands still, until somebody makes room.
            await set_target(scene, status=503)
            await watch.run(5)
            filler = disk / "filler"
            stood = await watch.until_it_stands_still(filler, seconds=120)
            assert watch.is_blocked()
            filler.unlink()
            with trio.fail_after(60):
                while (await watch.look()).committed <= stood + 200:  # noqa: ASYNC110
                    await trio.sleep(0.5)
            # Full, and the target comes back: what lies there leaves all the same.
            await watch.until_it_stands_still(filler, seconds=120)
            assert watch.is_blocked()
            await set_target(scene, status=None)
            with trio.fail_after(120):
                while (await watch.look()).rows or watch.is_blocked():  # noqa: ASYNC110
                    await trio.sleep(0.5)
            filler.unlink()
            took_s = await watch.until_all_is_delivered(seconds=120)
            kinds = [line["kind"] for line in service.now.events(BLOCKED)]
            await end(service)
            with closing(sqlite3.connect(service.state)) as db:
                integrity = db.execute("PRAGMA integrity_check").fetchall()
            figures = {
                "blocked as": kinds,
                "integrity": integrity,
                "all delivered after s": round(took_s, 1),
                **scene.figures(),
            }
            tell(request.config, "disk full", figures)
            scene.check_balance()
            assert set(kinds) == {"disk-full"}
            assert integrity == [("ok",)]
