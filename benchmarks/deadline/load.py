"""The load: 50 batches a second of 100 out of 1,000 stations, one of which hangs; and a clock of our own."""

import json
import random
import time

import trio

RATE = 50  # batches a second; with a deadline of 1 s and a stuck station in each, 50 are in flight
DEADLINE_S = 1.0
STATIONS = 1000
PER_BATCH = 100
BIG_STATIONS = 10_000


class CoreClock(trio.abc.Clock, trio.abc.Instrument):
    """Time as a processor of our own would have it: CPU time used, and the time that trio asked to sleep.

    Moments in which something else had the processor do not count: neither while we run nor when we should wake.
    """

    def __init__(self):
        self._slept_s = 0.0
        self._asked_s = self._wall = self._cpu = 0.0

    def start_clock(self):
        """Nothing to start: it begins with the process."""

    def current_time(self):
        return time.process_time() + self._slept_s

    def deadline_to_sleep_time(self, deadline):
        return deadline - self.current_time()

    def before_io_wait(self, timeout):
        self._asked_s = timeout
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def after_io_wait(self, timeout):
        passed_s = min(time.perf_counter() - self._wall, self._asked_s)
        used_s = time.process_time() - self._cpu
        self._slept_s += max(0.0, passed_s - used_s)


def spin(seconds):
    """Use the CPU."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class PacedSource:
    """A message every 20 ms for a time; if `big`, one of 10,000 stations beside them every two seconds."""

    def __init__(self, record, *, seconds, big, seed):
        self._record = record
        self._count = round(seconds * RATE)
        self._big = big
        self._chooser = random.Random(seed)
        self._ids = [f"S{number:06d}" for number in range(STATIONS)]
        self._offset = 0
        self._number = 0
        self._start = None
        self._big_value = _message(f"B{number:06d}" for number in range(BIG_STATIONS))
        self.stuck = [number % STATIONS for number in range(self._count)]
        self._values = [self._value(number) for number in range(self._count)]

    async def poll(self):
        if self._start is None:
            self._start = trio.current_time()
        if self._number == self._count:
            await trio.lowlevel.checkpoint()
            raise trio.EndOfChannel
        await trio.sleep_until(self._start + self._number / RATE)
        records = [self._next(self._values[self._number])]
        if self._big and self._number % (2 * RATE) == RATE:
            records.append(self._next(self._big_value))
        self._number += 1
        return records

    def account(self, offsets):
        """Nothing is committed anywhere."""

    def watch_withdrawals(self, on_withdrawn, *, on_leaving=None):
        """Nothing is ever taken away."""

    def _next(self, value):
        offset = self._offset
        self._offset += 1
        return self._record(topic="air", partition=0, offset=offset, timestamp_ms=0, value=value)

    def _value(self, number):
        stuck = self._ids[number % STATIONS]
        chosen = self._chooser.sample(self._ids, PER_BATCH)
        return _message([stuck, *(each for each in chosen if each != stuck)][:PER_BATCH], stuck)


def _message(ids, stuck=None):
    entries = [
        {"stationId": each, "t": 20.5, **({"hangs": 1} if each == stuck else {})} for each in ids
    ]
    return json.dumps({"stationData": entries}).encode()
