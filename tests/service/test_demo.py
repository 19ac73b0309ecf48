"""The demo as a newcomer runs it, and with its parts killed under it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.service.demo_report import balance
from tests.http_requests import post_json
from tests.processes import Part, open_part

if TYPE_CHECKING:
    from pathlib import Path


def roles(state: Path) -> dict[str, Any]:
    return dict(json.loads((state / "demo.json").read_text())["parts"])


def reports(state: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(state / "receiver.sqlite")) as db:
        return [json.loads(body) for (body,) in db.execute("SELECT body FROM batches")]


async def wait_uploaded(demo: Part, count: int) -> None:
    def enough(line: str) -> bool:
        return "uploaded " in line and int(line.partition("uploaded ")[2].split()[0]) >= count

    await demo.wait_line(enough, seconds=60)


@pytest.mark.slow
async def test_the_demo_loses_doubles_and_delays_nothing(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    async with open_part(
        "demo", "--headless", "--batches", "60", "--seconds", "4", "--state", str(state)
    ) as demo:
        code = await demo.ends(seconds=90)

    assert code == 0, demo.lines
    assert any(line.startswith("lost 0, duplicated 0") for line in demo.lines)
    assert {"broker", "model-server", "receiver", "service", "producer"} <= set(roles(state))
    books = balance(state / "receiver.sqlite", dict.fromkeys(range(4), 15))
    assert (books.uploaded, books.lost, books.doubled) == (60, 0, 0)
    assert books.outcomes["S004", "timedOut"] >= 1
    assert books.outcomes["S009", "failed"] >= 1


@pytest.mark.slow
@pytest.mark.once
async def test_an_outage_of_model_and_target_loses_nothing_and_leaves_no_trace_afterwards(
    tmp_path: Path,
) -> None:
    state = tmp_path / "demo"
    # Slower than a station's calls on a busy machine (0.1 s), or it could never work off the queue of its hang.
    pace = ("--batches", "340", "--seconds", "54")
    async with open_part("demo", "--headless", *pace, "--state", str(state)) as demo:
        await wait_uploaded(demo, 30)
        service = roles(state)["service"]["pid"]
        os.kill(roles(state)["model-server"]["pid"], signal.SIGKILL)
        await demo.wait_line("model-server starts again")
        control = roles(state)["receiver"]["address"] + "/control"
        assert await post_json(control, {"status": 503}) == 200
        await trio.sleep(20)  # the length of the outage
        assert await post_json(control, {"status": None}) == 200
        code = await demo.ends(seconds=150)

    assert code == 0, demo.lines
    assert roles(state)["service"]["pid"] == service
    books = balance(state / "receiver.sqlite", dict.fromkeys(range(4), 85))
    assert (books.uploaded, books.lost, books.doubled) == (340, 0, 0)
    assert sum(count for (_, outcome), count in books.outcomes.items() if outcome == "failed") > 10
    assert books.outcomes["S004", "timedOut"] >= 1
    # The demo's own last fault is at offset 69 of partition 0, and its station then has a queue to work off.
    last = [report for report in reports(state) if report["ranges"][0]["first"] >= 81]
    assert len(last) == 16
    assert all(r["counts"]["succeeded"] == r["counts"]["expected"] for r in last)


@pytest.mark.slow
@pytest.mark.once
async def test_a_killed_service_starts_again_and_loses_and_doubles_nothing(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    async with open_part(
        "demo", "--headless", "--batches", "60", "--seconds", "4", "--state", str(state)
    ) as demo:
        await wait_uploaded(demo, 20)
        os.kill(roles(state)["service"]["pid"], signal.SIGKILL)
        await demo.wait_line("service starts again")
        await demo.ends(seconds=120)

    books = balance(state / "receiver.sqlite", dict.fromkeys(range(4), 15))
    assert (books.uploaded, books.lost, books.doubled) == (60, 0, 0)


@pytest.mark.slow
async def test_an_interrupted_demo_ends_with_all_its_parts(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    async with open_part("demo", "--headless", "--state", str(state)) as demo:
        await wait_uploaded(demo, 1)
        pids = [part["pid"] for part in roles(state).values()]
        demo.process.send_signal(signal.SIGINT)
        code = await demo.ends()

    assert code == 1
    assert any(line.startswith("interrupted; ") for line in demo.lines)
    assert len(pids) == 5
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
