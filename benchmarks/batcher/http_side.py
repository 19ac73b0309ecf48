"""Stations that ask a model server over HTTP: each for itself, through the batcher, and the server's own limit."""

import subprocess
import sys
from contextlib import asynccontextmanager

import trio

from stationmaster.batcher import open_batcher
from stationmaster.embeddings import open_openai_embedder

CALL_MS = 25
TEXT_MS = 4
STATIONS = 64
BATCH_ROWS = 32
CONNECTIONS = {"each for itself": STATIONS, "batched": 4, "back to back": 2}
_START_S = 30


@asynccontextmanager
async def open_server():
    """Run a model server of its own process; gives its URL."""
    cost = ["--pretend-ms", str(CALL_MS), "--pretend-ms-per-text", str(TEXT_MS)]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "stationmaster", "model-server", "--port", "0", *cost],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    async with process.stdin, process.stdout, trio.open_nursery() as nursery:
        try:
            with trio.fail_after(_START_S):
                url = await _read_url(process.stdout)
            nursery.start_soon(_drain, process.stdout)
            yield url
        finally:
            process.kill()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                await process.wait()
            nursery.cancel_scope.cancel()


async def _read_url(stream):
    said = b""
    async for chunk in stream:
        said += chunk
        for line in said.split(b"\n")[:-1]:
            _, found, url = line.decode().rpartition("listening on ")
            if found:
                return url.strip()
    raise RuntimeError(f"the model server did not start: {said.decode()}")


async def _drain(stream):
    async for _ in stream:
        pass


async def measure(way, url, *, warm_s, run_s):
    """Return the texts per second of one way, after a while and over a while."""
    answered = []  # (instant, texts)

    async def station(number, ask):
        text = f'{{"station": "S{number:03}", "PM2.5": {number}.5, "TEMP": -1.5, "WSPM": 2}}'
        while True:
            await ask(text)
            answered.append((trio.current_time(), 1))

    async def batches(embedder):
        texts = [f'{{"PM2.5": {row}.5, "TEMP": -1.5, "WSPM": 2}}' for row in range(BATCH_ROWS)]
        while True:
            await embedder.embed(texts)
            answered.append((trio.current_time(), BATCH_ROWS))

    async with open_openai_embedder(
        url + "/v1", model="readings-128", connections=CONNECTIONS[way]
    ) as embedder:

        async def alone(text):
            await embedder.embed([text])

        async with open_batcher(embedder) as batcher, trio.open_nursery() as nursery:
            if way == "back to back":  # two at a time: the server always has the next call at hand
                nursery.start_soon(batches, embedder)
                nursery.start_soon(batches, embedder)
            else:
                ask = batcher.embed if way == "batched" else alone
                for number in range(STATIONS):
                    nursery.start_soon(station, number, ask)
            # Not a deadline: the batcher would look at it and refuse what cannot be answered before.
            await trio.sleep(warm_s + run_s)
            nursery.cancel_scope.cancel()
    # From answer to answer: cut at fixed instants, a whole batch would lie inside or outside by chance.
    middle = answered[-1][0] - run_s
    first = max(instant for instant, _ in answered if instant <= middle)
    texts = sum(rows for instant, rows in answered if instant > first)
    return texts / (answered[-1][0] - first)
