"""stationmaster: its whole pipeline between a source and a sink in memory, everything on."""

import load
import trio

from stationmaster import PipelineSettings, open_pipeline
from stationmaster.abc import Accepted
from stationmaster.batch import Outcome, Record

TOLD = load.order()
SLEEP_S = TOLD["sleep_s"]
STUCK = TOLD.get("stuck")


class EndlessSource:
    """Polls without waiting; keeps what a source must: the watermark of the accounted prefix."""

    def __init__(self, values):
        self._values = values
        self._next = 0
        self._done = {}
        self.watermark = 0

    async def poll(self):
        await trio.lowlevel.checkpoint()
        first = self._next
        self._next += load.POLLED
        return [
            Record(
                topic="air",
                partition=0,
                offset=offset,
                timestamp_ms=1_700_000_000_000,
                value=next(self._values),
            )
            for offset in range(first, self._next)
        ]

    def account(self, offsets):
        self._done[offsets.first] = offsets.last
        while (last := self._done.pop(self.watermark, None)) is not None:
            self.watermark = last + 1

    def watch_withdrawals(self, on_withdrawn, *, on_leaving=None):
        """Nothing is ever taken away."""


class Sink:
    def __init__(self, meter):
        self._meter = meter
        self.complete = trio.Event()

    async def upload(self, report):
        await trio.lowlevel.checkpoint()
        self._meter.upload(
            report.counts[Outcome.SUCCEEDED], sum(len(result.encoded) for result in report.results)
        )
        if self._meter.complete:
            self.complete.set()
        return Accepted()


async def pause():
    if SLEEP_S:
        await trio.sleep(SLEEP_S)
    else:
        await trio.lowlevel.checkpoint()


async def handle(station):
    if station.station_id == STUCK:
        await trio.sleep_forever()
    await pause()
    return {"ok": 1}


async def handle_batch(batch, report):
    await pause()
    for station_id in batch.entries:
        report(station_id, {"ok": 1})


HANDLERS = {"station": handle, "batch": handle_batch}


async def main():
    stations, per_batch = TOLD["stations"], TOLD["per_batch"]
    meter = load.Meter(per_batch=per_batch, warm=TOLD["warm"], batches=TOLD["batches"])
    sink = Sink(meter)
    settings = PipelineSettings(
        deadline_s=TOLD.get("deadline_s", 60.0),
        idle_s=600.0,
        max_in_flight=TOLD["in_flight"],
        queue_capacity=max(64, TOLD["in_flight"]),
        breaker_failures=TOLD.get("breaker_failures", 3),
    )
    source = EndlessSource(load.values(stations, per_batch))
    handler = HANDLERS[TOLD["handler"]]
    async with open_pipeline(source, handler=handler, sink=sink, settings=settings) as pipeline:
        await sink.complete.wait()
        meter.report()
        pipeline.drain(grace_s=1.0)


trio.run(main)
