"""The classic design's idle stations on asyncio, for comparison: a bounded queue and a worker task each."""

import asyncio
import gc
import json
import sys
import time
import tracemalloc

import resident

TOLD = json.loads(sys.argv[1])


async def work_off(queue):
    while True:
        job = await queue.get()
        async with asyncio.timeout(60):
            await asyncio.sleep(0)
        job.set_result(None)


def measured():
    gc.collect()
    return tracemalloc.get_traced_memory()[0] if TOLD["traced"] else resident.resident_bytes()


async def main():
    queues, tasks = {}, []

    async def work_once(numbers):
        jobs = []
        for number in numbers:
            queue = queues[f"S{number:06d}"] = asyncio.Queue(64)
            tasks.append(asyncio.create_task(work_off(queue)))
            jobs.append(asyncio.get_running_loop().create_future())
            queue.put_nowait(jobs[-1])
        await asyncio.gather(*jobs)

    stations = TOLD["stations"]
    for begin in range(stations, stations + 4000, 200):
        await work_once(range(begin, begin + 200))
    if TOLD["traced"]:
        tracemalloc.start()
    before = measured()
    for begin in range(0, stations, 200):
        await work_once(range(begin, begin + 200))
    kept = (measured() - before) / stations
    began = time.process_time()
    gc.collect()
    print(json.dumps({"bytes": kept, "full_gc_ms": (time.process_time() - began) * 1000}))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


asyncio.run(main())
