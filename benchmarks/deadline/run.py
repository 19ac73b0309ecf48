"""One run: prints how late each batch was decided, the CPU share, and the longest pause of the garbage collector."""

import gc
import json
import random
import sys
import time

import load
import trio

from stationmaster import PipelineSettings, open_pipeline
from stationmaster.abc import Accepted
from stationmaster.batch import Outcome, Record
from stationmaster.events import BatchClosed, BatchOpened

TOLD = json.loads(sys.argv[1])
CHOOSER = random.Random(TOLD["seed"])
WARM_S = min(1.5, TOLD["seconds"] / 2)  # the stations come to life


async def handle(station):
    if "hangs" in station.readings[0]:
        await trio.sleep_forever()
    await trio.sleep(CHOOSER.uniform(0.005, 0.025))
    if TOLD["spin_s"]:
        load.spin(TOLD["spin_s"])
    return {"ok": 1}


class Sink:
    async def upload(self, report):
        await trio.lowlevel.checkpoint()
        return Accepted()


class Observer:
    """Notes how late every batch was decided, once the pipeline is warm."""

    detailed = False

    def __init__(self, pauses):
        self.pauses = pauses
        self.tuned = False
        self.lateness_s = []
        self.beside_big_s = []
        self.big_s = []
        self.succeeded = self.expected = self.jobs = 0
        self.open_big = 0
        self.started = self.cpu = None

    def observe(self, event):
        if isinstance(event, BatchOpened):
            self._opened(event)
        elif isinstance(event, BatchClosed):
            self._closed(event)

    def _opened(self, event):
        if self.started is None:
            self.started, self.cpu = trio.current_time(), time.process_time()
        self.open_big += len(event.batch.entries) > load.PER_BATCH

    def _closed(self, event):
        report = event.report
        self.jobs += len(report.results)
        if len(report.batch.entries) > load.PER_BATCH:
            self.open_big -= 1
            self.big_s.append(report.duration_s)
            return
        self.expected += len(report.results) - 1
        self.succeeded += report.counts[Outcome.SUCCEEDED]
        passed_s = trio.current_time() - self.started
        if not self.tuned and passed_s > WARM_S / 2:
            self.tuned = True
            self._tune()
        if passed_s > WARM_S:
            self.lateness_s.append(event.lateness_s)
            if self.open_big:
                self.beside_big_s.append(event.lateness_s)

    def _tune(self):
        """See to the garbage collector once the stations live."""
        if TOLD["gc"] == "tuned":
            gc.collect()
            gc.freeze()  # they are not looked at again
            gc.set_threshold(5_000, 20, 1000)
        elif TOLD["gc"] == "off":
            gc.disable()
        self.pauses.longest_s = 0.0


class Pauses:
    """The longest run of the garbage collector."""

    def __init__(self):
        self.longest_s = self._began = 0.0
        gc.callbacks.append(self)

    def __call__(self, phase, info):
        if phase == "start":
            self._began = time.process_time()
        else:
            self.longest_s = max(self.longest_s, time.process_time() - self._began)


async def main():
    pauses = Pauses()
    observer = Observer(pauses)
    seconds = TOLD["seconds"]
    source = load.PacedSource(Record, seconds=seconds, big=TOLD["big"], seed=TOLD["seed"])
    gc.collect()
    gc.freeze()  # the load itself is no part of it
    settings = PipelineSettings(deadline_s=load.DEADLINE_S, max_in_flight=70, queue_capacity=128)
    async with open_pipeline(
        source, handler=handle, sink=Sink(), settings=settings, observer=observer
    ) as pipeline:
        await pipeline.wait_finished()
        cpu = time.process_time() - observer.cpu
        seconds = trio.current_time() - observer.started
    line = {
        "lateness_s": observer.lateness_s,
        "beside_big_s": observer.beside_big_s,
        "big_s": observer.big_s,
        "cpu": cpu / seconds,
        "succeeded": observer.succeeded / observer.expected,
        "longest_gc_s": pauses.longest_s,
        "jobs": observer.jobs,
        "seconds": seconds,
    }
    print(json.dumps(line), flush=True)


if TOLD["clock"] == "core":
    clock = load.CoreClock()
    trio.run(main, clock=clock, instruments=[clock])
else:
    trio.run(main)
