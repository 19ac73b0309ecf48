"""stationmaster in one process: memory per idle station, or a long run in windows. argv[1]: the order as JSON."""

import gc
import itertools
import json
import statistics
import sys
import time
import tracemalloc

import resident
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster import PipelineSettings, open_pipeline
from stationmaster.abc import Accepted
from stationmaster.batch import Record

TOLD = json.loads(sys.argv[1])
PER_MESSAGE = 200  # stations, where idle ones are counted
STATIONS = 20  # a message, in the long run
KNOWN = 1000  # stations altogether, in the long run
COMPARED = 5  # windows at either end


def message(numbers):
    entries = [{"stationId": f"S{number:06d}", "t": 20.5, "p": 1013} for number in numbers]
    return json.dumps({"timestamp": 1_700_000_000_000, "stationData": entries}).encode()


class Source:
    """Polls what it is fed, and knows when all of that is accounted for."""

    def __init__(self):
        self._values = iter(())
        self._fed = trio.Event()
        self._accounted = trio.Event()
        self._to_come = 0
        self._offset = 0

    async def feed(self, values, count):
        """Give `count` messages to the pipeline; return when it has delivered them."""
        self._values, self._to_come, self._accounted = values, count, trio.Event()
        self._fed.set()
        await self._accounted.wait()

    async def poll(self):
        await trio.lowlevel.checkpoint()
        while not (values := list(itertools.islice(self._values, 10))):
            self._fed = trio.Event()
            await self._fed.wait()
        return [self._record(value) for value in values]

    def account(self, offsets):
        self._to_come -= offsets.last - offsets.first + 1
        if not self._to_come:
            self._accounted.set()

    def watch_withdrawals(self, on_withdrawn, *, on_leaving=None):
        """Nothing is ever taken away."""

    def _record(self, value):
        offset = self._offset
        self._offset += 1
        return Record(topic="air", partition=0, offset=offset, timestamp_ms=0, value=value)


class Sink:
    async def upload(self, report):
        await trio.lowlevel.checkpoint()
        return Accepted()


async def handle(station):
    await trio.lowlevel.checkpoint()
    return {"ok": 1}


async def measure_idle():
    """Let each of so many stations work once; tell what it keeps while it waits for its next job."""
    stations = TOLD["stations"]
    settings = PipelineSettings(max_live=stations + 10_000, max_in_flight=4)
    source = Source()

    def messages(first, count):
        return (
            message(range(begin, begin + PER_MESSAGE))
            for begin in range(first, first + count, PER_MESSAGE)
        )

    async with open_pipeline(source, handler=handle, sink=Sink(), settings=settings) as pipeline:
        warm = 20 * PER_MESSAGE  # what the pipeline itself takes is there before the count begins
        await source.feed(messages(stations, warm), 20)
        await wait_all_tasks_blocked()
        if TOLD["traced"]:
            tracemalloc.start()
        before = measured()
        await source.feed(messages(0, stations), stations // PER_MESSAGE)
        await wait_all_tasks_blocked()
        kept = (measured() - before) / stations
        live = pipeline.statistics().live_stations - warm
        began = time.process_time()
        gc.collect()
        full_gc_s = time.process_time() - began
    if live != stations:
        raise ValueError(f"{live} stations are live, not {stations}")
    return {"bytes": kept, "full_gc_ms": full_gc_s * 1000}


def measured():
    gc.collect()
    return tracemalloc.get_traced_memory()[0] if TOLD["traced"] else resident.resident_bytes()


async def measure_long_run():
    """Tell cost and memory per window of messages, and those of the first looked at and of the last."""
    window = TOLD["early"] // 10
    windows = TOLD["messages"] // window
    values = itertools.cycle(
        [
            message((begin + place) % KNOWN for place in range(STATIONS))
            for begin in range(0, KNOWN, 7)
        ]
    )
    source = Source()
    told = []
    began = time.perf_counter()
    async with open_pipeline(
        source, handler=handle, sink=Sink(), settings=PipelineSettings(max_in_flight=10)
    ):
        for number in range(1, windows + 1):
            cpu = time.process_time()
            await source.feed(itertools.islice(values, window), window)
            cpu_us = (time.process_time() - cpu) / window * 1e6
            told.append((number * window, cpu_us, resident.resident_bytes()))
        seconds = time.perf_counter() - began
    early, late = told[10 : 10 + COMPARED], told[-COMPARED:]
    step = max(1, windows // 100)
    return {
        "early_cpu_us": statistics.median(cpu_us for _, cpu_us, _ in early),
        "late_cpu_us": statistics.median(cpu_us for _, cpu_us, _ in late),
        "early_bytes": early[0][2],
        "late_bytes": late[-1][2],
        "messages_per_s": windows * window / seconds,
        "windows": told[::step],
    }


print(json.dumps(trio.run({"idle": measure_idle, "long": measure_long_run}[TOLD["what"]])))
