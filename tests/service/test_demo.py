"""The demo as a newcomer runs it, and with its parts killed under it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stationmaster.service.demo import DEADLINE_S
from stationmaster.service.demo_handler import FAILING_STATION, SLOW_STATION
from stationmaster.service.demo_report import SLACK_S, balance, read_only
from tests.http_requests import post_json
from tests.processes import open_part, wait_until
from tests.run_queue import Waits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from stationmaster.service.demo_report import Books
    from tests.processes import Part


def roles(state: Path) -> dict[str, Any]:
    return dict(json.loads((state / "demo.json").read_text())["parts"])


def reports(state: Path) -> list[dict[str, Any]]:
    # Read only: otherwise whoever asks too early makes the file.
    with closing(sqlite3.connect(read_only(state / "receiver.sqlite"), uri=True)) as db:
        return [json.loads(body) for (body,) in db.execute("SELECT body FROM batches")]


async def wait_held(state: Path, count: int) -> None:
    """Wait until the receiver holds so many batches: what the demo prints of it comes seconds later."""

    def enough() -> bool:
        try:
            return len(reports(state)) >= count
        except sqlite3.OperationalError:
            return False  # it has not made its file or its tables yet

    await wait_until(enough, seconds=60)


@attrs.frozen
class Demo:
    """A running demo: its process, and how long the machine let two of its parts wait for a processor."""

    part: Part
    state: Path
    waits: dict[str, Waits]

    def judge(self, code: int, produced_by_partition: dict[int, int]) -> Books:
        """Check that nothing was lost or doubled, and nothing later than by what the service had to wait."""
        produced = sum(produced_by_partition.values())
        books = balance(self.state / "receiver.sqlite", produced_by_partition)
        assert (books.uploaded, books.lost, books.doubled) == (produced, 0, 0)
        waits = self.waits["service"]
        latest_s = max(
            report["durationSeconds"] - waits.in_life_of(report) for report in reports(self.state)
        )
        timely = attrs.evolve(books, latest_s=latest_s)
        assert timely.good(
            produced, slow=SLOW_STATION, failing=FAILING_STATION, deadline_s=DEADLINE_S
        ), (timely, self.part.lines)
        # The demo itself excuses nothing.
        assert code == (1 if books.late(DEADLINE_S) else 0), self.part.lines
        assert any(line.startswith("service ended with code 0;") for line in self.part.lines)
        return books


@asynccontextmanager
async def open_demo(state: Path, *options: str) -> AsyncIterator[Demo]:
    """Run the demo for so many messages in so many seconds."""

    def pid_of(role: str) -> int | None:
        try:
            return int(roles(state)[role]["pid"])
        except (FileNotFoundError, KeyError):
            return None  # not started yet

    waits = {role: Waits(partial(pid_of, role)) for role in ("service", "model-server")}
    async with (
        open_part("demo", "--headless", *options, "--state", str(state)) as part,
        trio.open_nursery() as nursery,
    ):
        for each in waits.values():
            nursery.start_soon(each.watch)
        yield Demo(part, state, waits)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_the_demo_loses_doubles_and_delays_nothing(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    async with open_demo(state, "--batches", "60", "--seconds", "4") as demo:
        code = await demo.part.ends(seconds=90)

    books = demo.judge(code, dict.fromkeys(range(4), 15))
    assert any(line.startswith("lost 0, duplicated 0") for line in demo.part.lines)
    assert {"broker", "model-server", "receiver", "service", "producer"} <= set(roles(state))
    assert books.outcomes["S004", "timedOut"] >= 1
    assert books.outcomes["S009", "failed"] >= 1


@pytest.mark.slow
@pytest.mark.once
async def test_an_outage_of_model_and_target_loses_nothing_and_leaves_no_trace_afterwards(
    tmp_path: Path,
) -> None:
    state = tmp_path / "demo"
    # Slower than a station's calls on a busy machine (0.1 s), or it could never work off the queue of its hang.
    async with open_demo(state, "--batches", "340", "--seconds", "54") as demo:
        await wait_held(state, 30)
        service = roles(state)["service"]["pid"]
        os.kill(roles(state)["model-server"]["pid"], signal.SIGKILL)
        await demo.part.wait_line("model-server starts again")
        control = roles(state)["receiver"]["address"] + "/control"
        assert await post_json(control, {"status": 503}) == 200
        await trio.sleep(20)  # the length of the outage
        assert await post_json(control, {"status": None}) == 200
        code = await demo.part.ends(seconds=150)

    assert roles(state)["service"]["pid"] == service
    books = demo.judge(code, dict.fromkeys(range(4), 85))
    assert sum(count for (_, outcome), count in books.outcomes.items() if outcome == "failed") > 10
    assert books.outcomes["S004", "timedOut"] >= 1
    # The demo's own last fault is at offset 69 of partition 0, and its station then has a queue to work off.
    last = [report for report in reports(state) if report["ranges"][0]["first"] >= 81]
    assert len(last) == 16
    for report in last:
        # A trace of the outage would be a failed station. One that is not in time may be the machine's doing: where
        # service and model were kept waiting, in the batch's life or when the queue before it piled up. (On a machine
        # with nothing else to do they wait half as long.)
        waited_s = sum(w.in_life_of(report, before_s=DEADLINE_S) for w in demo.waits.values())
        outcomes = {each["outcome"] for each in report["unsuccessful"]}
        assert outcomes <= {"timedOut", "rejected"}, report
        assert not outcomes or waited_s > SLACK_S, report


@pytest.mark.slow
@pytest.mark.once
async def test_a_killed_service_starts_again_and_loses_and_doubles_nothing(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    async with open_part(
        "demo", "--headless", "--batches", "60", "--seconds", "4", "--state", str(state)
    ) as demo:
        await wait_held(state, 20)
        os.kill(roles(state)["service"]["pid"], signal.SIGKILL)
        await demo.wait_line("service starts again")
        await demo.ends(seconds=120)

    books = balance(state / "receiver.sqlite", dict.fromkeys(range(4), 15))
    assert (books.uploaded, books.lost, books.doubled) == (60, 0, 0)


@pytest.mark.slow
async def test_an_interrupted_demo_ends_with_all_its_parts(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    async with open_part("demo", "--headless", "--state", str(state)) as demo:
        await wait_held(state, 1)
        pids = [part["pid"] for part in roles(state).values()]
        demo.process.send_signal(signal.SIGINT)
        code = await demo.ends()

    assert code == 1
    assert any(line.startswith("interrupted; ") for line in demo.lines)
    assert len(pids) == 5
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
