"""The classic design on asyncio: a queue and a worker task per station, a collector with a lock per batch.

It does what the project does to a batch: parse (without the limits), one job per station and batch, the result
encoded at the station, one report per batch at its deadline or when all answered, the offset accounted for after the
upload, batches in flight bounded. `timeouts`: every job ends at its batch's deadline, as the project's do. Without,
it cannot cancel: a handler that hangs blocks its station for ever.
"""

import asyncio

import load
import orjson

TOLD = load.order()
TIMEOUTS = TOLD["timeouts"]
SLEEP_S = TOLD["sleep_s"]
DEADLINE_S = 60.0


class Collector:
    def __init__(self, expected, deadline):
        self.deadline = deadline
        self.closed = False
        self.done = asyncio.Event()
        self.results = {}
        self._expected = expected
        self._lock = asyncio.Lock()

    async def add(self, station_id, encoded):
        async with self._lock:
            if not self.closed:
                self.results[station_id] = encoded
                if len(self.results) == self._expected:
                    self.done.set()

    async def close(self):
        async with self._lock:
            self.closed = True
            return self.results


async def handle(station_id, readings):
    await asyncio.sleep(SLEEP_S)
    return {"ok": 1}


def encode(station_id, value):
    return orjson.dumps({"stationId": station_id, **value})


async def work_off(station_id, queue):
    while True:
        collector, readings = await queue.get()
        try:
            value = await handle(station_id, readings)
            await collector.add(station_id, encode(station_id, value))
        except Exception:
            await collector.add(station_id, None)


async def work_off_with_timeouts(station_id, queue):
    while True:
        collector, readings = await queue.get()
        if collector.closed:
            continue
        try:
            async with asyncio.timeout_at(collector.deadline):
                value = await handle(station_id, readings)
            await collector.add(station_id, encode(station_id, value))
        except Exception:
            await collector.add(station_id, None)


class Pipeline:
    def __init__(self, values, meter, in_flight):
        self._values = values
        self._meter = meter
        self._slots = asyncio.Semaphore(in_flight)
        self._queues = {}
        self._tasks = set()
        self._accounted = {}
        self._watermark = 0
        self.complete = asyncio.Event()

    async def poll(self):
        worker = work_off_with_timeouts if TIMEOUTS else work_off
        offset = 0
        while True:
            for value in [next(self._values) for _ in range(load.POLLED)]:
                readings = {}
                for entry in orjson.loads(value)["stationData"]:
                    readings.setdefault(entry.pop("stationId"), []).append(entry)
                await self._slots.acquire()
                collector = Collector(len(readings), asyncio.get_running_loop().time() + DEADLINE_S)
                self.start(self._run_batch(collector, offset))
                offset += 1
                for station_id, job in readings.items():
                    queue = self._queues.get(station_id)
                    if queue is None:
                        queue = self._queues[station_id] = asyncio.Queue(64)
                        self.start(worker(station_id, queue))
                    queue.put_nowait((collector, job))

    def start(self, coroutine):
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_batch(self, collector, offset):
        remaining_s = collector.deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(collector.done.wait(), remaining_s)
        except TimeoutError:
            pass
        results = await collector.close()
        await self._upload([result for result in results.values() if result is not None])
        self._accounted[offset] = offset
        while self._accounted.pop(self._watermark, None) is not None:
            self._watermark += 1
        self._slots.release()

    async def _upload(self, results):
        await asyncio.sleep(0)
        self._meter.upload(len(results), sum(map(len, results)))
        if self._meter.complete:
            self.complete.set()

    async def aclose(self):
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def main():
    stations, per_batch = TOLD["stations"], TOLD["per_batch"]
    meter = load.Meter(per_batch=per_batch, warm=TOLD["warm"], batches=TOLD["batches"])
    pipeline = Pipeline(load.values(stations, per_batch), meter, TOLD["in_flight"])
    pipeline.start(pipeline.poll())
    await pipeline.complete.wait()
    meter.report()
    await pipeline.aclose()


def run():
    if TOLD["loop"] == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    else:
        asyncio.run(main())


run()
