"""The demo as a newcomer runs it, and with its parts killed under it."""

from __future__ import annotations

import json
import os
import signal
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
async def test_the_demo_survives_the_loss_of_its_parts(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    async with open_part(
        "demo", "--headless", "--batches", "200", "--seconds", "20", "--state", str(state)
    ) as demo:
        await wait_uploaded(demo, 30)
        os.kill(roles(state)["model-server"]["pid"], signal.SIGKILL)
        await demo.wait_line("model-server starts again")
        control = roles(state)["receiver"]["address"] + "/control"
        await post_json(control, {"status": 503})
        await trio.sleep(float(os.environ.get("STATIONMASTER_OUTAGE_S", "5")))
        await post_json(control, {"status": None})
        os.kill(roles(state)["service"]["pid"], signal.SIGKILL)
        await demo.wait_line("service starts again")
        code = await demo.ends(seconds=120)

    assert code == 0, demo.lines
    books = balance(state / "receiver.sqlite", dict.fromkeys(range(4), 50))
    assert (books.uploaded, books.lost, books.doubled) == (200, 0, 0)
    named = {outcome for _, outcome in books.outcomes}
    assert "failed" in named
