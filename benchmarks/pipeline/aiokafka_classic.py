"""asyncio and aiokafka in the classic architecture, classic or grouped.

classic: one unbounded queue and one worker task per station, a queue entry per (message, station), a collector with a
lock per batch, `wait_for(5)` and one upload per poll; offsets are committed automatically, polling never waits.
grouped: the control. The same program with one queue entry per (batch, station).
"""

import asyncio
import collections

import work
from aiokafka import AIOKafkaConsumer

GROUPED = work.TOLD["grouped"]
tally = work.Tally()


class Collector:
    def __init__(self, expected):
        self.expected, self.results = expected, []
        self.lock, self.full = asyncio.Lock(), asyncio.Event()

    async def add(self, *results):
        async with self.lock:
            self.results.extend(results)
            if len(self.results) >= self.expected:
                self.full.set()

    async def run(self):
        try:
            await asyncio.wait_for(self.full.wait(), 5.0)
        except TimeoutError:
            pass
        tally.upload(len([result for result in self.results if result is not None]))


async def handle(station):
    try:
        return await work.handler(station["stationId"])
    except Exception:
        return None


async def work_off(queue):
    while True:
        collector, stations = await queue.get()
        await collector.add(*[await handle(station) for station in stations])


def jobs(stations):
    if not GROUPED:
        return [(station["stationId"], [station]) for station in stations]
    grouped = collections.defaultdict(list)
    for station in stations:
        grouped[station["stationId"]].append(station)
    return list(grouped.items())


async def main():
    consumer = AIOKafkaConsumer(
        work.TOPIC,
        bootstrap_servers=work.BOOTSTRAP,
        group_id=work.GROUP,
        auto_offset_reset="earliest",
        enable_auto_commit=True,
        fetch_max_wait_ms=100,
        session_timeout_ms=6000,
        heartbeat_interval_ms=500,
    )
    await consumer.start()
    queues, tasks, seen = {}, [], 0
    while seen < work.MESSAGES:
        polled = await consumer.getmany(timeout_ms=1000, max_records=work.POLL_RECORDS)
        messages = [message for batch in polled.values() for message in batch]
        if not messages:
            continue
        tally.start()
        seen += len(messages)
        stations = [station for message in messages for station in work.parse(message.value)]
        collector = Collector(len(stations))
        tasks.append(asyncio.create_task(collector.run()))
        for station_id, job in jobs(stations):
            queue = queues.get(station_id)
            if queue is None:
                queue = queues[station_id] = asyncio.Queue()
                tasks.append(asyncio.create_task(work_off(queue)))
            await queue.put((collector, job))
    while not tally.done:  # noqa: ASYNC110 - as the classic design does it
        await asyncio.sleep(0.001)
    tally.report()
    await consumer.stop()


asyncio.run(main())
