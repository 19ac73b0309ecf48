"""The load that every contender carries: an endless topic in memory, one batch per message, and a meter at its end.

Standard library and orjson only: it runs in the environment of every peer.
"""

import gc
import itertools
import json
import resource
import sys
import time

POLLED = 10  # messages at a time


def order():
    """Return what this contender was told."""
    return json.loads(sys.argv[1])


def values(stations, per_batch):
    """Give messages for ever: `per_batch` stations each, going round through all `stations`."""
    ids = [f"S{number:06d}" for number in range(stations)]
    made = []
    for begin in range(0, stations, per_batch):
        entries = [
            {"stationId": ids[(begin + place) % stations], "t": 20.5 + place, "p": 1013}
            for place in range(per_batch)
        ]
        made.append(json.dumps({"timestamp": 1_700_000_000_000, "stationData": entries}).encode())
    return itertools.cycle(made)


class Meter:
    """Counts uploads: after `warm` of them it begins to measure, after `batches` more it is complete."""

    def __init__(self, *, per_batch, warm, batches):
        self._per_batch = per_batch
        self._warm = warm
        self._end = warm + batches
        self._uploads = 0
        self._cpu = self._wall = 0.0
        self.answers = 0
        self.complete = False

    def upload(self, answers, encoded_bytes):
        """Take one batch: how many stations succeeded, and the size of their results."""
        self._uploads += 1
        if self._uploads == self._warm:
            gc.collect()
            gc.freeze()  # for all: what was imported is no part of the work
            self._cpu, self._wall = time.process_time(), time.perf_counter()
            self.answers = 0
        elif self._uploads <= self._end:
            if not encoded_bytes:
                raise ValueError("a batch without results")
            self.answers += answers
            if self._uploads == self._end:
                self._cpu = time.process_time() - self._cpu
                self._wall = time.perf_counter() - self._wall
                self.complete = True

    def report(self):
        """Print the figures as the one line that is read."""
        jobs = (self._end - self._warm) * self._per_batch
        line = {
            "cpu_us": self._cpu / jobs * 1e6,
            "jobs_per_cpu_s": jobs / self._cpu,
            "jobs_per_s": jobs / self._wall,
            "batches_per_s": (self._end - self._warm) / self._wall,
            "succeeded": self.answers / jobs,
            "rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        print(json.dumps(line), flush=True)
