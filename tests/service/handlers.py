"""Handlers that end-to-end tests name in their configuration."""

from __future__ import annotations

import gc
import os
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from stationmaster import Batch, Resources, StationInput, StationResult
    from stationmaster.abc import BatchHandler, BlockingHandler, Report, ResultHook, StationHandler


async def brief(station: StationInput) -> Mapping[str, Any]:
    """Answer after 0.1 s."""
    await trio.sleep(0.1)
    return {"readings": len(station.readings)}


async def stuck(station: StationInput) -> Mapping[str, Any]:
    """Never answer."""
    await trio.sleep_forever()


@asynccontextmanager
async def open_gated(resources: Resources) -> AsyncIterator[StationHandler]:
    """Give a handler that answers when the file is there that the options name; with `only`, for that station."""
    await trio.lowlevel.checkpoint()
    gate = trio.Path(resources.options["file"])
    only = resources.options.get("only")

    async def handle(station: StationInput) -> Mapping[str, Any]:
        if only in {None, station.station_id}:
            while not await gate.exists():  # noqa: ASYNC110 - another process makes it
                await trio.sleep(0.01)
        return {}

    yield handle


async def blocking(station: StationInput) -> None:
    """Block the event loop for longer than any test waits, and say so before."""
    print("the loop is blocked now", flush=True)
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


def not_async(batch: Batch, report: Report) -> None:
    """Look like a batch handler, without the async."""


def plain(station: StationInput) -> dict[str, Any]:
    """Answer from a thread."""
    return {"thread": threading.current_thread().name}


async def whole(batch: Batch, report: Report) -> None:
    """Answer for all stations of a batch."""
    await trio.lowlevel.checkpoint()
    for station_id in batch.entries:
        report(station_id, {"stations": len(batch.entries)})


@asynccontextmanager
async def open_hook(resources: Resources) -> AsyncIterator[ResultHook]:
    """Write each result as a line into the file that the options name."""
    async with await trio.open_file(resources.options["file"], "w") as file:

        async def on_result(station: StationInput, result: StationResult) -> None:
            await file.write(f"{station.station_id} {result.outcome.value}\n")

        yield on_result


def make_number(resources: Resources) -> int:
    """Look like a factory."""
    return 7


@asynccontextmanager
async def open_number(resources: Resources) -> AsyncIterator[int]:
    """Look even more like one."""
    await trio.lowlevel.checkpoint()
    yield 7


NOT_A_HANDLER = 7


@asynccontextmanager
async def open_whole(resources: Resources) -> AsyncIterator[BatchHandler]:
    """Give a batch handler."""
    await trio.lowlevel.checkpoint()
    yield whole


class OpenPlain:
    """Gives a plain function; a factory that is a class."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    async def __aenter__(self) -> BlockingHandler:
        await trio.lowlevel.checkpoint()
        return plain

    async def __aexit__(self, *error: object) -> None:
        await trio.lowlevel.checkpoint()


_HANGS = threading.Event()


def hanging_thread(station: StationInput) -> dict[str, Any] | None:
    """Never come back for one of the stations; the others answer when it is so far."""
    if station.station_id == "S1":
        _HANGS.set()
        threading.Event().wait()
    _HANGS.wait()
    return {}


_FROZEN_BEFORE = gc.get_freeze_count()  # by Python itself: from 3.12 on it is not 0


async def once_frozen(station: StationInput) -> Mapping[str, object]:
    """Answer when what existed at the start is out of garbage collection."""
    while gc.get_freeze_count() <= _FROZEN_BEFORE:  # noqa: ASYNC110 - the collector tells nobody
        await trio.sleep(0.01)
    return {"thresholds": gc.get_threshold()}


async def environment(station: StationInput) -> Mapping[str, Any]:
    """Answer with what systemd's variables are called that a child would inherit."""
    await trio.lowlevel.checkpoint()
    ours = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")
    return {"names": [name for name in ours if name in os.environ]}
