"""A child process of the tests: it opens a state file, says so, and puts rows until it is killed."""

from __future__ import annotations

import sys
import time

import trio

from stationmaster.batch import OffsetRange
from stationmaster.state import open_state


async def main(path: str, first: int) -> None:
    async with open_state(path) as state:
        print("open", flush=True)
        number = first
        while True:
            batch_id = f"b{number:06}"
            await state.outbox.put(
                batch_id,
                topic="air",
                ranges=[OffsetRange(topic="air", partition=0, first=number, last=number)],
                body=batch_id.encode() * 2000,
                kept_at=time.time(),
                reason="down",
            )
            print(batch_id, flush=True)
            if number % 3 == 0:
                await state.outbox.delete(batch_id)
            number += 1


trio.run(main, sys.argv[1], int(sys.argv[2]))
