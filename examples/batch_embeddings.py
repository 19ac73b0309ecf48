"""Sixty-four tasks ask for one embedding each; the model is called a handful of times.

The model is any "list in, list out" coroutine: here feature hashing of character trigrams, computed in a worker thread,
with the fixed cost that every real model has per call. Run it alone: `python examples/batch_embeddings.py`.
"""

from __future__ import annotations

import math
import time
import zlib
from typing import TYPE_CHECKING

import trio

from stationmaster import open_batcher
from stationmaster.errors import RowRejectedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

CALL_S = 0.010  # what a call costs, however many texts it carries
DIMENSIONS = 64
TEXTS = [
    f"station S{number:03} reports wind {number % 17} m/s, {number % 9} °C" for number in range(64)
]


def hash_trigrams(text: str) -> list[float]:
    """Count the text's trigrams in hashed buckets, scaled to length 1."""
    counts = [0.0] * DIMENSIONS
    for start in range(len(text) - 2):
        counts[zlib.crc32(text[start : start + 3].encode()) % DIMENSIONS] += 1
    length = math.hypot(*counts)
    return [count / length for count in counts]


class HashingModel:
    """An embedder: `async def embed(texts) -> vectors` is all it takes."""

    def __init__(self) -> None:
        self.calls = 0

    async def embed(self, texts: Sequence[str], /) -> list[list[float]]:
        """Embed in a worker thread, one call at a time, and refuse what is no telemetry."""
        self.calls += 1
        return await trio.to_thread.run_sync(self._compute, texts, limiter=ONE_AT_A_TIME)

    def _compute(self, texts: Sequence[str]) -> list[list[float]]:
        time.sleep(CALL_S)
        for text in texts:
            if not text.startswith("station "):
                raise RowRejectedError(f"not a report: {text!r}")
        return [hash_trigrams(text) for text in texts]


ONE_AT_A_TIME = trio.CapacityLimiter(1)


async def measure(ask: Callable[[str], Awaitable[object]]) -> float:
    """Ask for all texts at once, each in a task of its own; return the seconds."""
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for text in TEXTS:
            nursery.start_soon(ask, text)
    return trio.current_time() - began


async def main() -> None:
    """Compare, then show what happens to a bad text and to a hurried caller."""
    model = HashingModel()

    async def alone(text: str) -> None:
        await model.embed([text])

    seconds = await measure(alone)
    print(f"one call per text: {model.calls} calls, {seconds:.2f} s")

    model.calls = 0
    async with open_batcher(model) as batcher:
        seconds = await measure(batcher.embed)
        print(f"batched:           {model.calls} calls, {seconds:.2f} s")

        results = await batcher.embed_many([*TEXTS[:5], "spam", *TEXTS[5:10]], return_errors=True)
        bad = [result for result in results if isinstance(result, Exception)]
        print(f"{len(results) - len(bad)} of {len(results)} embedded, refused: {bad[0]}")

        with trio.move_on_after(CALL_S / 10) as hurry:
            await batcher.embed(TEXTS[0])
        print(f"a hurried caller left without its vector: {hurry.cancelled_caught}")

        done = batcher.statistics()
        print(
            f"rows answered: {done.answered_rows}, failed: {done.failed_rows}, "
            f"taken back: {done.cancelled_rows}"
        )


if __name__ == "__main__":
    trio.run(main)
