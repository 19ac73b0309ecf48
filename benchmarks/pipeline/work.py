"""The work that every contender does, the same for all; each prints one line of JSON at its end.

Standard library and orjson only: it runs in the environment of every peer.
"""

from __future__ import annotations

import gc
import json
import sys
import time

import orjson

TOLD = json.loads(sys.argv[1])
BOOTSTRAP, TOPIC, GROUP = TOLD["bootstrap"], TOLD["topic"], TOLD["group"]
MESSAGES = TOLD["messages"]
POLL_RECORDS = 500
STATIONS = 20


def parse(value: bytes) -> list[dict]:
    return orjson.loads(value)["stationData"]


async def handler(station_id: str) -> dict:
    """The no-op station handler: one result per reading."""
    return {"stationId": station_id, "ok": 1}


class Tally:
    """A no-op upload target; knows when everything has been uploaded."""

    def __init__(self, expected: int = MESSAGES * STATIONS) -> None:
        self.started = None
        self.expected = expected
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
        return self.results >= self.expected

    def report(self) -> None:
        seconds = time.perf_counter() - self.started
        if self.results != self.expected:
            raise SystemExit(f"{self.results} results were uploaded, not {self.expected}")
        line = {
            "messages_per_s": MESSAGES / seconds,
            "cpu_us": (time.process_time() - self.cpu) / MESSAGES * 1e6,
            "uploads": self.uploads,
        }
        sys.stdout.write(orjson.dumps(line).decode() + "\n")
        sys.stdout.flush()
