"""A storm of callers half of whom are cancelled at random, many of them in the tick of their answer.

Afterwards nobody hangs, nothing is left in memory, every slot and connection is free, and plain calls work.
"""

from __future__ import annotations

import gc
import json
import math
import random
from collections import Counter
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.embeddings import open_openai_embedder
from stationmaster.errors import EmbedderError, EmbedderUnavailableError, RowRejectedError
from stationmaster.testing.server import Reply, open_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from stationmaster.abc import Vector
    from stationmaster.testing.server import Request

TICK_S = 2**-10  # a millisecond, exact in binary: whole ticks meet
SLOTS = 4
GUILTY = 997  # each so many-th text is refused
POLICY = BatchPolicy(max_in_flight=SLOTS, max_queue_rows=40_000, start_estimate_s=0.0)


@attrs.define(eq=False)
class PooledModel:
    """A model behind a pool of connections, no larger than the slots: it fails if one was not given back in time.

    Answers come at whole ticks, when the storm strikes as well. Some calls fail.
    """

    dice: random.Random
    calm: bool = False
    free: list[int] = attrs.field(factory=lambda: list(range(SLOTS)))
    answered: int = 0
    given_up: int = 0

    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        connection = self.free.pop()  # an IndexError ends the test
        try:
            # Seldom many ticks: then a batch is likely to lose all its callers.
            ticks = self.dice.choice((1, 2, 3, 3, 40))
            await _ticks(ticks)
        except trio.Cancelled:
            self.given_up += 1
            raise
        finally:
            self.free.append(connection)
        if not self.calm:
            if self.dice.random() < 0.02:
                raise EmbedderUnavailableError("reset")
            if any(int(text) % GUILTY == 0 for text in texts):
                raise RowRejectedError(f"one of {len(texts)} is refused")
        self.answered += 1
        return [[float(text)] for text in texts]


async def _ticks(count: int = 1) -> None:
    await trio.sleep_until((math.floor(trio.current_time() / TICK_S) + count) * TICK_S)


@attrs.define(eq=False)
class Storm:
    """Callers that ask again and again, and what strikes them."""

    batcher: Batcher
    dice: random.Random
    calls: int
    """How many are still to be made."""
    gusts: Callable[[], Awaitable[object]]
    """Returns when the storm strikes next."""
    until: int = 0
    ends: Counter[str] = attrs.field(factory=Counter)
    doomed: dict[trio.CancelScope, None] = attrs.field(factory=dict)

    async def caller(self) -> None:
        dice = self.dice
        while self.calls > self.until:
            number = self.calls
            self.calls -= 1
            with trio.CancelScope() as scope:
                fate = dice.random()
                if fate < 0.02:
                    scope.cancel()  # before it asks
                elif fate < 0.52:
                    self.doomed[scope] = None
                try:
                    await self.ask(number, rows=dice.choice((1, 1, 1, 1, 1, 1, 1, 1, 3, 40)))
                    self.ends["answered"] += 1
                except EmbedderError as error:
                    self.ends[type(error).__name__] += 1
                finally:
                    self.doomed.pop(scope, None)
            if scope.cancelled_caught:
                self.ends["cancelled"] += 1

    async def ask(self, number: int, *, rows: int) -> None:
        if rows == 1:
            await self.ask_one(number)
        else:
            texts = [str(number + row) for row in range(rows)]
            assert await self.batcher.embed_many(texts) == [[number + row] for row in range(rows)]

    async def ask_one(self, number: int) -> None:
        assert list(await self.batcher.embed(str(number))) == [number]

    async def strike(self) -> None:
        """Cancel about half of those whose turn it is, at every gust."""
        while True:
            await self.gusts()
            for scope in list(self.doomed):
                if self.dice.random() < 0.5:
                    del self.doomed[scope]
                    scope.cancel()

    async def rage(self, callers: int, *, until: int = 0) -> None:
        """Let so many callers ask until only `until` calls are left."""
        self.until = until
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.strike)
            async with trio.open_nursery() as crowd:
                for _ in range(callers):
                    crowd.start_soon(self.caller)
            nursery.cancel_scope.cancel()


def rows_in_memory() -> list[object]:
    """Return what the batcher made for its callers and calls, and somebody still holds."""
    gc.collect()
    kinds = {"Single", "Bulk", "Segment", "Call"}
    return [
        each
        for each in gc.get_objects()
        if type(each).__name__ in kinds and type(each).__module__.startswith("stationmaster.batch")
    ]


async def weather(calls: int, *, seed: int) -> Counter[str]:
    """Let a storm rage and look around afterwards."""
    dice = random.Random(seed)
    model = PooledModel(dice)
    old_rows = rows_in_memory()  # errors of other tests hold some: parametrize keeps its values
    before = trio.lowlevel.current_statistics().tasks_living
    async with open_batcher(model, policy=POLICY) as batcher:
        running = trio.lowlevel.current_statistics().tasks_living
        storm = Storm(batcher, dice, calls, gusts=_ticks)
        await storm.rage(1000, until=calls // 50)
        await storm.rage(3)  # few: batches lose all their callers, and calls in flight are given up
        await wait_all_tasks_blocked()
        model.calm = True

        left = batcher.statistics()
        assert left.queued_rows == left.queued_bytes == left.rows_in_flight == 0
        assert trio.lowlevel.current_statistics().tasks_living == running
        await _every_slot_works(batcher, model)
        assert [row for row in rows_in_memory() if row not in old_rows] == []
    assert sorted(model.free) == list(range(SLOTS))
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert model.given_up > 0
    return storm.ends


async def _every_slot_works(batcher: Batcher, model: PooledModel) -> None:
    """Fill all slots at once: none was lost in the storm, and everybody gets an answer."""
    fullest = SLOTS
    answers: list[Vector] = []

    async def ask(number: int) -> None:
        nonlocal fullest
        answers.append(await batcher.embed(str(number)))
        fullest = min(fullest, len(model.free))

    await trio.sleep(
        1.0
    )  # abandoned calls hold their slots until the server must be ready with them
    assert batcher.statistics().calls_in_flight == 0
    assert len(model.free) == SLOTS
    async with trio.open_nursery() as nursery:
        for number in range(10 * SLOTS * POLICY.max_batch_rows):
            nursery.start_soon(ask, number)
        await trio.sleep(TICK_S / 2)
        fullest = min(fullest, len(model.free))
    assert sorted(map(list, answers)) == [[float(number)] for number in range(len(answers))]
    assert len(answers) == 10 * SLOTS * POLICY.max_batch_rows
    assert fullest == 0


def _check(ends: Counter[str], calls: int) -> None:
    assert ends.total() == calls
    assert 0.45 < ends["cancelled"] / calls < 0.55
    assert ends["answered"] > 0.3 * calls
    assert ends["RowRejectedError"] > 0
    assert set(ends) <= {
        "answered",
        "cancelled",
        "RowRejectedError",
        "EmbedderUnavailableError",
    }


def test_fifty_thousand_calls_half_of_them_cancelled_leave_nothing_behind() -> None:
    ends = trio.run(_bounded, 50_000, 1, clock=MockClock(autojump_threshold=0))

    _check(ends, 50_000)


@pytest.mark.slow
def test_a_million_calls_half_of_them_cancelled_leave_nothing_behind(
    request: pytest.FixtureRequest,
) -> None:
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes a minute and a half: it runs with -m slow")
    ends = trio.run(_bounded, 1_000_000, 2, clock=MockClock(autojump_threshold=0))

    _check(ends, 1_000_000)


async def _bounded(calls: int, seed: int) -> Counter[str]:
    with trio.fail_after(100_000):  # virtual: a hang of every caller would jump here at once
        return await weather(calls, seed=seed)


def _answer(request: Request) -> Reply:
    texts = json.loads(request.body)["input"]
    rows = [{"index": index, "embedding": [int(text)]} for index, text in enumerate(texts)]
    return Reply(body=json.dumps({"data": rows, "model": "m"}).encode())


async def test_a_storm_over_real_connections_leaves_every_one_of_them_usable() -> None:
    dice = random.Random(3)
    with trio.fail_after(60):
        async with open_server(_answer) as server:
            async with (
                open_openai_embedder(server.url, model="m", connections=SLOTS) as embedder,
                open_batcher(embedder, policy=POLICY) as batcher,
            ):
                storm = Storm(batcher, dice, 3000, gusts=server.requests.wait_transition)
                await storm.rage(200, until=200)
                await storm.rage(3)  # requests in flight are given up
                assert storm.ends.total() == 3000
                assert 0.3 < storm.ends["cancelled"] / 3000 < 0.6
                assert set(storm.ends) == {"answered", "cancelled"}

                await server.open_connections.wait_value(lambda count: count <= SLOTS)
                async with trio.open_nursery() as nursery:
                    for number in range(10 * SLOTS * POLICY.max_batch_rows):
                        nursery.start_soon(storm.ask_one, number)
                assert server.open_connections.value <= SLOTS
                left = batcher.statistics()
                assert left.queued_rows == left.rows_in_flight == left.calls_in_flight == 0
            await server.open_connections.wait_value(0)
    assert len(set(server.connections)) > SLOTS  # some were given up, and others opened instead
