"""What excuses a late batch: a wait for a processor that was in its life, and no other."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import trio
import trio.testing

from tests.processes import READY_S
from tests.run_queue import Waits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WORK = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
os.write(1, b"w")
while time.process_time() < float(sys.argv[2]):
    pass
os.write(1, b"d")
sys.stdin.read()
"""


def life(began: datetime, ended: datetime) -> dict[str, str]:
    return {"openedAt": began.isoformat(), "closedAt": ended.isoformat()}


@asynccontextmanager
async def open_worker(seconds: float) -> AsyncIterator[trio.Process]:
    """Run a process that works so long on the first processor, from when it works on."""
    where = str(min(os.sched_getaffinity(0)))
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", WORK, where, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert await listen(process) == b"w"
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()


async def listen(process: trio.Process) -> bytes:
    assert process.stdout is not None
    with trio.fail_after(READY_S):
        return bytes(await process.stdout.receive_some(1))


async def test_who_shares_a_processor_waits_while_the_other_works(nursery: trio.Nursery) -> None:
    began = datetime.now(UTC)
    async with open_worker(READY_S), open_worker(1.0) as mine:
        waits = Waits(lambda: mine.pid)
        nursery.start_soon(waits.watch)
        assert await listen(mine) == b"d"
    ended = datetime.now(UTC)

    # About as long as it worked.
    assert waits.in_life_of(life(began, ended)) > 0.1
    hour = timedelta(hours=1)
    assert waits.in_life_of(life(began - hour, began - hour)) == 0.0
    assert waits.in_life_of(life(ended + hour, ended + hour)) == 0.0
    assert waits.in_life_of(life(ended + hour, ended + hour), before_s=7_200.0) > 0.1


async def test_a_process_that_is_not_there_has_waited_for_nothing(nursery: trio.Nursery) -> None:
    now = datetime.now(UTC)
    nothing = Waits(lambda: None)
    assert nothing.in_life_of(life(now, now)) == 0.0
    nursery.start_soon(nothing.watch)
    await trio.testing.wait_all_tasks_blocked()
    assert nothing.in_life_of(life(now, now)) == 0.0
