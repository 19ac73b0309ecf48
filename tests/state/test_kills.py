"""Real processes that are killed while they write."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from random import Random
from typing import TYPE_CHECKING

import pytest
import trio

from stationmaster.errors import ConfigError
from stationmaster.state import open_state
from tests.processes import open_part

if TYPE_CHECKING:
    from pathlib import Path


async def write_until_killed(path: Path, first: int, *, rows: int) -> list[str]:
    """Let a process put rows from this number on; kill it after it told of so many. Return all that it told of."""
    async with open_part(str(path), str(first), module="tests.state") as part:
        last = f"b{first + rows:06}"
        await part.wait_line(lambda line: line >= last if line.startswith("b0") else False)
        part.process.kill()
        await part.ends()
    return [line for line in part.lines if line.startswith("b")]


async def test_what_was_put_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    random = Random(3)
    told: list[str] = []
    for round_number in range(10):
        told += await write_until_killed(path, 1000 * round_number, rows=random.randrange(1, 60))
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            there = dict(db.execute("SELECT batch_id, CAST(body AS TEXT) FROM outbox"))
        lost = [each for each in told if each not in there and int(each[1:]) % 3]
        assert lost == []
        assert all(body == batch_id * 2000 for batch_id, body in there.items()), "nothing is half"
    assert len(told) > 100


async def test_a_second_service_is_told_who_holds_the_file_and_a_kill_frees_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.sqlite"
    async with open_part(str(path), "0", module="tests.state") as part:
        await part.wait_line("open")
        with pytest.raises(ConfigError) as caught:
            async with open_state(path):
                pytest.fail("two at once")
        [fault] = caught.value.faults
        assert fault == (
            f"outbox.path: {path} is in use by process {part.process.pid}; "
            "give every instance a file of its own"
        )
        part.process.kill()
        await part.ends()
        with trio.fail_after(20):
            async with open_state(path) as state:
                assert state.statistics().outbox.rows >= 0
