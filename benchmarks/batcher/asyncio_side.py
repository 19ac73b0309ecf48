"""The contenders on asyncio and uvloop: published batchers as their documentation uses them, and the classic design.

Each is opened with the model, the seconds for which it gathers, and the rows of its calls at most.
"""

import asyncio
import logging
import time
from contextlib import asynccontextmanager

from load import IN_FLIGHT, Load, Model


@asynccontextmanager
async def async_batcher(model, wait_s, rows):
    from async_batcher.batcher import AsyncBatcher

    class Batcher(AsyncBatcher):
        async def process_batch(self, batch):
            return await model.embed(batch)

    batcher = Batcher(max_batch_size=rows, max_queue_time=wait_s, concurrency=IN_FLIGHT)
    yield batcher.process
    batcher._stop.set()  # its task may swallow the cancellation that follows; then this ends it
    await batcher.stop(force=True)


@asynccontextmanager
async def bentoml(model, wait_s, rows):
    """Its dispatcher learns how long to wait. Its latency bound is lifted: else it drops what it thinks is late."""
    from bentoml._internal.marshal.dispatcher import CorkDispatcher, NonBlockSema

    dispatcher = CorkDispatcher(
        60_000,
        rows,
        shared_sema=NonBlockSema(IN_FLIGHT),
        fallback=lambda: None,
        get_batch_size=lambda _: 1,
    )
    yield dispatcher(model.embed)
    dispatcher.shutdown()


@asynccontextmanager
async def batched(model, wait_s, rows):
    """Takes a text or a list of texts."""
    from batched.aio import dynamically

    yield dynamically(model.embed, batch_size=rows, timeout_ms=wait_s * 1000)


@asynccontextmanager
async def ray(model, wait_s, rows):
    from ray import serve
    from ray.serve import batching

    # All that needs a running cluster is a warning about its settings.
    batching._BatchQueue._warn_if_max_batch_size_exceeds_max_ongoing_requests = lambda _: None

    @serve.batch(max_batch_size=rows, batch_wait_timeout_s=wait_s, max_concurrent_batches=IN_FLIGHT)
    async def ask(texts):
        return await model.embed(texts)

    yield ask


@asynccontextmanager
async def _infinity_handler(model, wait_s, rows):
    from infinity_emb.inference.batch_handler import BatchHandler

    class Stub:
        capabilities = frozenset({"embed"})

        def encode_pre(self, texts):
            return texts

        def encode_core(self, texts):
            return model.embed_blocking(texts)

        def encode_post(self, vectors):
            return vectors

        def tokenize_lengths(self, texts):
            return [len(text) for text in texts]

    handler = BatchHandler([Stub()], max_batch_size=rows, batch_delay=max(wait_s, 1e-4))
    await handler.spawn()
    yield handler
    await handler.shutdown()


@asynccontextmanager
async def infinity(model, wait_s, rows):
    """Its model runs in threads, one call at a time."""
    async with _infinity_handler(model, wait_s, rows) as handler:

        async def ask(text):
            vectors, _ = await handler.embed([text])
            return vectors[0]

        yield ask


@asynccontextmanager
async def infinity_bulk(model, wait_s, rows):
    async with _infinity_handler(model, wait_s, rows) as handler:

        async def ask(texts):
            vectors, _ = await handler.embed(texts)
            return vectors

        yield ask


def _data_loader(model, rows):
    from aiodataloader import DataLoader

    return DataLoader(model.embed, max_batch_size=rows, cache=False)


@asynccontextmanager
async def aiodataloader(model, wait_s, rows):
    yield _data_loader(model, rows).load


@asynccontextmanager
async def aiodataloader_bulk(model, wait_s, rows):
    yield _data_loader(model, rows).load_many


class Polling:
    """The classic design: who completes a batch sends it, and a loop that sleeps up to 0.1 s sends what is old."""

    NAP_S = 0.1

    def __init__(self, model, wait_s, rows):
        self._model = model
        self._wait_s = wait_s
        self._rows = rows
        self._lock = asyncio.Lock()
        self._waiting = []

    async def ask(self, text):
        answer = asyncio.get_running_loop().create_future()
        async with self._lock:
            self._waiting.append((time.monotonic(), text, answer))
            full = len(self._waiting) >= self._rows
        if full:
            await self._send()
        return await answer

    async def watch(self):
        while True:
            nap_s = self.NAP_S
            async with self._lock:
                if self._waiting:
                    nap_s = min(self._waiting[0][0] + self._wait_s - time.monotonic(), nap_s)
            if nap_s > 0:
                await asyncio.sleep(nap_s)
            else:
                await self._send()

    async def _send(self):
        async with self._lock:
            taken, self._waiting = self._waiting[: self._rows], self._waiting[self._rows :]
        if not taken:
            return
        vectors = await self._model.embed([text for _, text, _ in taken])
        for (_, _, answer), vector in zip(taken, vectors, strict=True):
            if not answer.done():
                answer.set_result(vector)


@asynccontextmanager
async def polling(model, wait_s, rows):
    design = Polling(model, wait_s, rows)
    watcher = asyncio.create_task(design.watch())
    yield design.ask
    watcher.cancel()


CONTENDERS = {
    "async-batcher": async_batcher,
    "bentoml": bentoml,
    "batched": batched,
    "batched, list": batched,
    "ray": ray,
    "infinity": infinity,
    "infinity, list": infinity_bulk,
    "aiodataloader": aiodataloader,
    "aiodataloader, list": aiodataloader_bulk,
    "polling": polling,
}


def run(order):
    # Several of them warn of their stub settings at every start.
    logging.disable(logging.WARNING)
    if order["loop"] == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(order))
    return asyncio.run(_run(order))


async def _run(order):
    model = Model(asyncio.sleep, call_s=order["call_s"], text_s=order["text_s"])
    opened = CONTENDERS[order["contender"]](model, order["wait_s"], order["rows"])
    async with opened as ask:
        load = Load(ask, callers=order["callers"], bulk=order["bulk"], timed=order["timed"])
        callers = [asyncio.create_task(load.call(number)) for number in range(order["callers"])]
        told = await load.measure(
            asyncio.sleep, model, warm_s=order["warm_s"], run_s=order["run_s"]
        )
        for caller in callers:
            if caller.done():
                caller.result()
            caller.cancel()
        await asyncio.wait(callers, timeout=5)
    return told
