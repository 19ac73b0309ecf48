"""The handler of the chaos tests' services: it takes its time, fails for some stations, and keeps a book of its runs.

A module of its own, because every start of a service imports it.
"""

from __future__ import annotations

import zlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from stationmaster import Resources, StationInput
    from stationmaster.abc import StationHandler


@asynccontextmanager
async def open_moody_handler(resources: Resources) -> AsyncIterator[StationHandler]:
    """Open it.

    Options: `quickest_s` and `slowest_s` bound the time of a run, which is the same for the same batch and station
    wherever it runs; `runs` is the file to which each run appends `<batch id> <station id>` when it begins.
    """
    options = resources.options
    quickest_s, slowest_s = float(options["quickest_s"]), float(options["slowest_s"])
    with open(options["runs"], "ab", buffering=0) as runs:  # noqa: ASYNC230 - once, at the start

        async def handle(station: StationInput) -> Mapping[str, Any]:
            job = f"{station.batch_id} {station.station_id}\n".encode()
            runs.write(job)  # one small write: whole even when the process is killed
            mood = zlib.crc32(job)
            await trio.sleep(quickest_s + (slowest_s - quickest_s) * (mood % 1000) / 999)
            if mood % 17 == 0:
                raise ValueError("in no mood for this one")
            return {"readings": len(station.readings)}

        await trio.lowlevel.checkpoint()
        yield handle
