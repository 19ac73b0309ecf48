"""The work that every contender does, the same for all; each prints one line of JSON at its end."""

from __future__ import annotations

import gc
import os
import sys
import time

import orjson

BOOTSTRAP, TOPIC, GROUP = sys.argv[1:4]
MESSAGES = int(sys.argv[4])
POLL_RECORDS = 500
STATIONS = 20


def parse(value: bytes) -> list[dict]:
    return orjson.loads(value)["stationData"]


async def handler(station_id: str) -> dict:
    """The no-op station handler: one result per reading."""
    return {"stationId": station_id, "ok": 1}


class Tally:
    """A no-op upload target; knows when everything has been uploaded."""

    def __init__(self) -> None:
        self.started = None
        self.results = 0
        self.uploads = 0

    def start(self) -> None:
        """Call when the first message is in hand: joining the group is not what is measured."""
        if self.started is None:
            gc.collect()
            gc.freeze()  # for all: what was imported is no part of the work
            self.started = time.perf_counter()
            self.cpu = time.process_time()

    def upload(self, results: int) -> None:
        self.results += results
        self.uploads += 1

    @property
    def done(self) -> bool:
        return self.results >= MESSAGES * STATIONS

    def report(self) -> None:
        seconds = time.perf_counter() - self.started
        line = {
            "messages_per_s": MESSAGES / seconds,
            "cpu_us_per_message": (time.process_time() - self.cpu) / MESSAGES * 1e6,
            "uploads": self.uploads,
            "complete": self.results == MESSAGES * STATIONS,
            "python": sys.version.split()[0],
            "pid": os.getpid(),
        }
        sys.stdout.write(orjson.dumps(line).decode() + "\n")
        sys.stdout.flush()
