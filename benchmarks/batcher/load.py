"""The load that every contender carries: callers that ask again as soon as they are answered.

Standard library only: it runs in the environment of every peer.
"""

import gc
import statistics
import time

BATCH_ROWS = 64
IN_FLIGHT = 4
BULK_ROWS = 16
_MOST_TIMED = 64


class Model:
    """The stub behind the batcher: after its time it answers every text with the text itself."""

    def __init__(self, sleep, *, call_s, text_s):
        self._sleep = sleep
        self._call_s = call_s
        self._text_s = text_s
        self.calls = 0
        self.texts = 0

    async def embed(self, texts):
        # With nothing to wait for this is one pass of the scheduler, on every loop.
        await self._sleep(self._cost(texts))
        return list(texts)

    def embed_blocking(self, texts):
        """For contenders that run their model in a thread."""
        cost_s = self._cost(texts)
        if cost_s:
            time.sleep(cost_s)
        return list(texts)

    def _cost(self, texts):
        self.calls += 1
        self.texts += len(texts)
        return self._call_s + self._text_s * len(texts)


class Load:
    """Counts answered rows; `ask` takes a text, or a list of `BULK_ROWS` texts if `bulk`."""

    def __init__(self, ask, *, callers, bulk, timed):
        self._ask = ask
        self._bulk = bulk
        self._timed = timed
        self._rows = [0] * callers
        self._latencies_s = []

    async def call(self, number):
        """Be a caller, until cancelled. A wrong answer ends it."""
        question = f"text {number}"
        if self._bulk:
            question = [f"{question} {row}" for row in range(BULK_ROWS)]
        rows = BULK_ROWS if self._bulk else 1
        if self._timed and number < _MOST_TIMED:
            await self._call_timed(question, number, rows)
        ask, counts = self._ask, self._rows
        while True:
            answer = await ask(question)
            if answer != question:
                raise ValueError(f"{question!r} was answered with {answer!r}")
            counts[number] += rows

    async def _call_timed(self, question, number, rows):
        ask, counts, latencies_s = self._ask, self._rows, self._latencies_s
        while True:
            began = time.perf_counter()
            answer = await ask(question)
            latencies_s.append(time.perf_counter() - began)
            if answer != question:
                raise ValueError(f"{question!r} was answered with {answer!r}")
            counts[number] += rows

    async def measure(self, sleep, model, *, warm_s, run_s):
        """Let the callers run, and tell what a row cost."""
        await sleep(warm_s)
        gc.collect()
        rows, calls, texts = sum(self._rows), model.calls, model.texts
        self._latencies_s.clear()
        began, began_cpu = time.perf_counter(), time.process_time()
        await sleep(run_s)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        rows = sum(self._rows) - rows
        if not rows:
            raise ValueError(f"nothing was answered in {run_s:g} s")
        calls, texts = model.calls - calls, model.texts - texts
        return {
            "rows_per_s": rows / seconds,
            "cpu_us": cpu_s / rows * 1e6,
            "rows_per_call": texts / calls if calls else None,
            "p50_us": statistics.median(self._latencies_s) * 1e6 if self._latencies_s else None,
        }
