"""The contenders on trio: the floor under everything, and stationmaster."""

from collections import deque
from contextlib import asynccontextmanager

import trio
from load import BATCH_ROWS, IN_FLIGHT, Load, Model
from trio.lowlevel import Abort, checkpoint, current_task, reschedule, wait_task_rescheduled

from stationmaster.batcher import BatchPolicy, open_batcher

LIKE_PEERS = BatchPolicy(max_batch_rows=BATCH_ROWS, max_in_flight=IN_FLIGHT, max_queue_rows=20_000)


class _Woken:
    """What the floor wakes its tasks with: one for all, so that waking allocates nothing."""

    def unwrap(self):
        return None


@asynccontextmanager
async def floor(model):
    """Park each request once and wake it once, as many a pass as a batcher could: no queue bound, no model, no care."""
    parked = deque()
    woken = _Woken()

    def abort(_):
        parked.clear()  # cancelled only when all are
        return Abort.SUCCEEDED

    async def ask(text):
        parked.append(current_task())
        await wait_task_rescheduled(abort)
        return text

    async def wake():
        while True:
            await checkpoint()
            for _ in range(min(len(parked), BATCH_ROWS * IN_FLIGHT)):
                reschedule(parked.popleft(), woken)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wake)
        yield ask
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def model_alone(model):
    """Ask the stub itself: what a lone caller waits for in any case."""

    async def ask(text):
        return (await model.embed([text]))[0]

    yield ask


@asynccontextmanager
async def embed(model):
    async with open_batcher(model, policy=LIKE_PEERS) as batcher:
        yield batcher.embed


@asynccontextmanager
async def embed_with_defaults(model):
    async with open_batcher(model) as batcher:
        yield batcher.embed


@asynccontextmanager
async def embed_by_deadline(model):
    async with open_batcher(model, policy=LIKE_PEERS) as batcher:

        async def ask(text):
            return await batcher.embed(text, deadline=trio.current_time() + 30)

        yield ask


@asynccontextmanager
async def embed_many(model):
    async with open_batcher(model, policy=LIKE_PEERS) as batcher:
        yield batcher.embed_many


CONTENDERS = {
    "floor": floor,
    "model alone": model_alone,
    "embed": embed,
    "embed, defaults": embed_with_defaults,
    "embed, deadline": embed_by_deadline,
    "embed_many": embed_many,
}


def run(order):
    return trio.run(_run, order)


async def _run(order):
    model = Model(trio.sleep, call_s=order["call_s"], text_s=order["text_s"])
    async with CONTENDERS[order["contender"]](model) as ask:
        load = Load(ask, callers=order["callers"], bulk=order["bulk"], timed=order["timed"])
        async with trio.open_nursery() as nursery:
            for number in range(order["callers"]):
                nursery.start_soon(load.call, number)
            told = await load.measure(
                trio.sleep, model, warm_s=order["warm_s"], run_s=order["run_s"]
            )
            nursery.cancel_scope.cancel()
    return told
