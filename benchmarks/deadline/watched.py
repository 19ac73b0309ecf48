"""Does it make batches late that many look on: 200 event streams, 50 scrapes a second? Before and during, in one run.

    pip install '.[service]'
    python benchmarks/deadline/watched.py [--seconds 10] [--streams 200] [--scrapes 50] [--cpu 0.5]

The load is that of `benchmarks/deadline` (50 batches a second of 100 out of 1,000 stations, in each one that hangs
until the deadline), with as much work in the handlers as makes `--cpu` of one processor altogether while nobody
looks. The service's real metrics, status board and web server stand beside it; who looks is a process of its own.
Lateness is from the deadline to the decision to upload, by the wall: other load on the machine counts.
"""

import argparse
import gc
import json
import pathlib
import random
import subprocess
import sys
import time

import trio

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))

import load  # noqa: E402
from harness.contenders import machine  # noqa: E402
from harness.figures import percentile, tell_table  # noqa: E402

from stationmaster import PipelineSettings, open_pipeline  # noqa: E402
from stationmaster.abc import Accepted  # noqa: E402
from stationmaster.batch import Record  # noqa: E402
from stationmaster.events import BatchClosed  # noqa: E402
from stationmaster.service.app import Observers  # noqa: E402
from stationmaster.service.health import Health  # noqa: E402
from stationmaster.service.metrics import open_metrics  # noqa: E402
from stationmaster.service.status import StatusBoard  # noqa: E402
from stationmaster.service.web import open_web  # noqa: E402

WARM_S = 3.0


class Sink:
    async def upload(self, report):
        await trio.lowlevel.checkpoint()
        return Accepted()


class Phase:
    """What was seen in one part of the run."""

    def __init__(self, name):
        self.name = name
        self.late_ms = []
        self.jobs = 0
        self.cpu_s = self.seconds = 0.0
        self._began = 0.0

    def begin(self):
        self._began, self.cpu_s = time.perf_counter(), time.process_time()

    def end(self):
        self.seconds = time.perf_counter() - self._began
        self.cpu_s = time.process_time() - self.cpu_s


class Lateness:
    """Notes how late batches are decided, for the phase of the moment."""

    detailed = False

    def __init__(self):
        self.phase = Phase("warm")

    def observe(self, event):
        if isinstance(event, BatchClosed):
            self.phase.late_ms.append(event.lateness_s * 1000)
            self.phase.jobs += len(event.report.results)


class Handler:
    def __init__(self, seed):
        self.spin_s = 0.0
        self._chooser = random.Random(seed)

    async def __call__(self, station):
        if "hangs" in station.readings[0]:
            await trio.sleep_forever()
        await trio.sleep(self._chooser.uniform(0.005, 0.025))
        if self.spin_s:
            load.spin(self.spin_s)
        return {"ok": 1}


async def run(told):
    lateness, handler = Lateness(), Handler(told.seed)

    async def handle(station):
        return await handler(station)

    async def phase(name, seconds):
        lateness.phase = found = Phase(name)
        found.begin()
        await trio.sleep(seconds)
        found.end()
        return found

    total_s = 3 * WARM_S + 3 * told.seconds + 30
    source = load.PacedSource(Record, seconds=total_s, big=False, seed=told.seed)
    settings = PipelineSettings(deadline_s=load.DEADLINE_S, max_in_flight=70, queue_capacity=128)
    board, health = StatusBoard(), Health()
    board.watch(health=health)
    async with open_metrics() as metrics, trio.open_nursery() as nursery:
        nursery.start_soon(health.run)
        async with open_web(
            host="127.0.0.1", port=0, token=None, health=health, metrics=metrics, board=board
        ) as url:
            async with open_pipeline(
                source,
                handler=handle,
                sink=Sink(),
                settings=settings,
                observer=Observers((lateness, board, metrics, health)),
            ) as pipeline:
                board.watch(pipeline=pipeline)
                health.watch_pipeline(pipeline.statistics)
                metrics.moments.pipeline = pipeline.statistics
                await trio.sleep(WARM_S)
                gc.collect()
                gc.freeze()  # as the service does
                gc.set_threshold(50_000, 50, 1_000)
                bare = await phase("bare", WARM_S)
                spare = max(0.0, told.cpu - bare.cpu_s / bare.seconds)
                handler.spin_s = spare * bare.seconds / bare.jobs
                await trio.sleep(WARM_S)
                before = await phase("before", told.seconds)
                looker = [sys.executable, str(HERE / "lookers.py"), url]
                looker += [str(told.streams), str(told.scrapes), str(told.seconds)]
                process = await nursery.start(_start, looker)
                line = await process.stdout.receive_some()
                assert line == b"looking\n", line
                during = await phase(
                    f"{told.streams} streams, {told.scrapes} scrapes/s", told.seconds
                )
                saw = b""
                async for chunk in process.stdout:
                    saw += chunk
                await trio.sleep(1)
                after = await phase("after", told.seconds)
                pipeline.drain(grace_s=2)
                await pipeline.wait_finished()
        nursery.cancel_scope.cancel()
    return (before, during, after), json.loads(saw)


async def _start(command, task_status):
    await trio.run_process(command, stdout=subprocess.PIPE, check=False, task_status=task_status)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part of the run")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--scrapes", type=int, default=50, help="a second")
    parser.add_argument("--cpu", type=float, default=0.5, help="share of one processor")
    parser.add_argument("--seed", type=int, default=1)
    phases, saw = trio.run(run, parser.parse_args())
    print(machine("trio", "hypercorn", "starlette", "prometheus-client"))
    print("\n## deadline -> decision, ms\n")
    rows = [
        [
            phase.name,
            len(phase.late_ms),
            *(f"{percentile(phase.late_ms, share):.2f}" for share in (0.5, 0.9, 0.99, 1)),
            f"{phase.cpu_s / phase.seconds:.0%}",
        ]
        for phase in phases
    ]
    tell_table(["who looks", "batches", "p50", "p90", "p99", "max", "CPU"], rows)
    print(
        f"\nseen: {saw['events']} events in {saw['bytes'] / 1e6:.1f} MB by {saw['streams']} streams; "
        f"{saw['scrapes']} scrapes, {saw['refused']} refused, p99 {saw['scrape_p99_ms']:.0f} ms"
    )


main()
