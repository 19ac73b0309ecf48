"""Handlers that end-to-end tests name in their configuration."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from stationmaster import Resources, StationInput


async def brief(station: StationInput) -> Mapping[str, Any]:
    """Answer after 0.1 s."""
    await trio.sleep(0.1)
    return {"readings": len(station.readings)}


async def stuck(station: StationInput) -> Mapping[str, Any]:
    """Never answer."""
    await trio.sleep_forever()


async def blocking(station: StationInput) -> None:
    """Block the event loop for longer than any test waits."""
    time.sleep(120)  # noqa: ASYNC251 - the mistake that the last resort is for


async def in_a_thread(station: StationInput) -> None:
    """Hide in a thread that cannot be cancelled."""
    await trio.to_thread.run_sync(time.sleep, 120)


async def dying_beside_a_thread(station: StationInput) -> None:
    """Hide in a thread at the first station, and run out of memory at every other."""
    if station.station_id == next(iter(station.batch.entries)):
        await trio.to_thread.run_sync(time.sleep, 120)
    await trio.sleep(0.5)
    raise MemoryError


def not_async(station: StationInput) -> dict[str, int]:
    """Look like a handler, without the async."""
    return {"readings": len(station.readings)}


def make_number(resources: Resources) -> int:
    """Look like a factory."""
    return 7


@asynccontextmanager
async def open_number(resources: Resources) -> AsyncIterator[int]:
    """Look even more like one."""
    await trio.lowlevel.checkpoint()
    yield 7


NOT_A_HANDLER = 7
