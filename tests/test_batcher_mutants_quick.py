"""What changes to single operators and numbers showed to be untested: callers where calls are quick."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batcher import BatchPolicy, open_batcher
from stationmaster.errors import (
    DeadlineExceededError,
    EmbedderError,
    QueueFullError,
    RequestTooLargeError,
)
from stationmaster.testing import RecordingObserver, ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import texts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from trio.testing import MockClock

    from stationmaster.abc import Vector
    from stationmaster.batcher import Batcher
    from stationmaster.testing.embedder import Step


@asynccontextmanager
async def quick(
    script: Sequence[Step] = (), **policy: Any
) -> AsyncIterator[tuple[Batcher, ScriptedEmbedder, trio.Nursery]]:
    """Open a batcher that knows calls to be quick; the script begins when it does.

    Nobody observes its requests, so callers without deadline and priority are queued without a look at either.
    """
    policy = {"max_batch_rows": 2, "max_in_flight": 1, "max_queue_rows": 10} | policy
    embedder = ScriptedEmbedder(seconds_per_call=0.001, script=[None] * 8 + list(script))
    with trio.fail_after(60.0):  # whoever hangs here would hang for ever
        async with open_batcher(embedder, policy=BatchPolicy(**policy)) as batcher:
            for _ in range(8):
                await batcher.embed("measured")
            assert batcher._queue.free == batcher._policy.max_queue_rows
            embedder.calls.clear()
            async with trio.open_nursery() as nursery:
                yield batcher, embedder, nursery


# ------------------------------------------------------------------------------------------------------- many texts


async def test_a_list_does_not_squeeze_in_besides_rows_that_came_the_quick_way(
    autojump_clock: MockClock,
) -> None:
    async with quick() as (batcher, _, nursery):
        for text in ("first", *texts(6)):
            nursery.start_soon(batcher.embed, text)
            await wait_all_tasks_blocked()
        with pytest.raises(QueueFullError):
            await batcher.embed_many(texts(5))
        assert batcher.statistics().queued_rows == 6


async def test_the_deadline_of_a_list_counts(autojump_clock: MockClock) -> None:
    async with quick([hang]) as (batcher, _, _):
        with pytest.raises(DeadlineExceededError):
            await batcher.embed_many(["a", "b"], deadline=1.0)
        assert trio.current_time() == pytest.approx(1.0, abs=0.011)


@pytest.mark.parametrize("priority", [0.0, 5.0])
async def test_the_priority_of_a_list_counts(autojump_clock: MockClock, priority: float) -> None:
    async with quick() as (batcher, embedder, nursery):
        for text in ("first", "a", "b"):
            nursery.start_soon(batcher.embed, text)
            await wait_all_tasks_blocked()
        await batcher.embed_many(["c", "d"], priority=priority)
        await wait_all_tasks_blocked()
        order = [("c", "d"), ("a", "b")] if priority else [("a", "b"), ("c", "d")]
    assert embedder.calls == [("first",), *order]


async def test_a_list_may_take_its_errors(autojump_clock: MockClock) -> None:
    async with quick([None, RuntimeError("broke")]) as (batcher, embedder, _):
        results = await batcher.embed_many(["a", "b", "c"], return_errors=True)
        assert results[:2] == [embedder.vector("a"), embedder.vector("b")]
        assert isinstance(results[2], EmbedderError)


async def test_a_list_that_is_cancelled_is_taken_back(autojump_clock: MockClock) -> None:
    async with quick([hang]) as (batcher, _, _):
        with trio.move_on_after(0.5) as scope:
            await batcher.embed_many(texts(3))
        assert scope.cancelled_caught
        await wait_all_tasks_blocked()
        statistics = batcher.statistics()
        assert (statistics.queued_rows, statistics.queued_tokens) == (0, 0)
        assert (statistics.cancelled_rows, statistics.abandoned_calls) == (3, 1)


async def test_of_a_list_that_waits_no_tokens_are_counted(autojump_clock: MockClock) -> None:
    async with quick() as (batcher, _, nursery):
        nursery.start_soon(batcher.embed_many, texts(3))
        await wait_all_tasks_blocked()
        statistics = batcher.statistics()
        assert (statistics.queued_rows, statistics.queued_tokens) == (1, 0)


# --------------------------------------------------------------------------------------------------------- one text


@pytest.mark.parametrize(
    ("policy", "detailed"),
    [
        ({}, True),
        ({"max_batch_tokens": 100}, False),
        ({"share_identical": True}, False),
        ({"send_when_idle": False, "max_wait_s": 0.0}, False),
    ],
    ids=["observed", "counted", "shared", "gathered"],
)
async def test_where_requests_are_to_be_looked_at_none_is_queued_without_a_look(
    autojump_clock: MockClock, policy: dict[str, Any], detailed: bool
) -> None:
    async with open_batcher(
        ScriptedEmbedder(),
        policy=BatchPolicy(**policy),
        observer=RecordingObserver(detailed=detailed),
    ) as batcher:
        for _ in range(8):
            await batcher.embed("measured")
        assert batcher._dispatcher.cost.measured
        assert batcher._queue.free <= 0


@pytest.mark.parametrize(
    ("call_s", "calls", "rows"),
    [
        pytest.param(0.001, 7, 0, id="not measured yet"),
        pytest.param(0.001, 8, 100, id="the whole queue"),
        pytest.param(0.0, 8, 100, id="calls that take no time"),
        pytest.param(0.03, 8, 12, id="one call in flight and two more"),
        pytest.param(0.045, 8, 6, id="one call in flight and one more"),
        pytest.param(0.06, 8, 0, id="one call in flight and no time for another"),
    ],
)
async def test_as_many_rows_are_queued_without_a_look_as_are_answered_within_a_tenth_of_a_second(
    autojump_clock: MockClock, call_s: float, calls: int, rows: int
) -> None:
    policy = BatchPolicy(
        max_batch_rows=3, max_in_flight=2, max_queue_rows=100, start_estimate_s=0.001
    )
    async with open_batcher(ScriptedEmbedder(seconds_per_call=call_s), policy=policy) as batcher:
        for _ in range(calls):
            await batcher.embed("measured")
        assert batcher._queue.free == rows


async def test_a_caller_with_one_text_and_nothing_else_is_queued_without_a_look(
    autojump_clock: MockClock,
) -> None:
    async with quick([partial(slowly, 1.0)]) as (batcher, _, nursery):
        await trio.sleep(1.0)
        for text in ("first", "second", "third"):
            nursery.start_soon(batcher.embed, text)
            await wait_all_tasks_blocked()
        assert [single.text for single in batcher._queue.fresh] == ["second", "third"]
        await trio.sleep(0.5)
        assert batcher.statistics().oldest_age_s == 0.5


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("äääää", RequestTooLargeError, "10 bytes"),
        ("", ValueError, "empty"),
        (b"x", TypeError, "texts are str, not bytes"),
        ("a \ud800", ValueError, "lone surrogate"),
    ],
    ids=["long", "empty", "bytes", "surrogate"],
)
async def test_what_is_no_text_or_too_long_is_refused(
    autojump_clock: MockClock, text: Any, error: type[Exception], words: str
) -> None:
    async with quick(max_batch_bytes=8, max_queue_bytes=80) as (batcher, embedder, _):
        with pytest.raises(error, match=words):
            await batcher.embed(text)
        assert await batcher.embed("ääää") == embedder.vector("ääää")


async def test_the_deadline_of_one_text_counts(autojump_clock: MockClock) -> None:
    async with quick([hang]) as (batcher, _, _):
        with pytest.raises(DeadlineExceededError):
            await batcher.embed("a", deadline=1.0)
        assert trio.current_time() == pytest.approx(1.0, abs=0.011)


async def test_a_deadline_that_passed_is_refused(autojump_clock: MockClock) -> None:
    async with quick() as (batcher, embedder, _):
        with pytest.raises(DeadlineExceededError, match="had passed"):
            await batcher.embed("a", deadline=trio.current_time())
        assert batcher.statistics().refused_rows == 1
    assert embedder.calls == []


async def test_the_priority_of_one_text_counts(autojump_clock: MockClock) -> None:
    async with quick(max_batch_rows=1) as (batcher, embedder, nursery):
        for text in ("first", "a"):
            nursery.start_soon(batcher.embed, text)
            await wait_all_tasks_blocked()
        await batcher.embed("b", priority=5.0)
    assert embedder.calls == [("first",), ("b",), ("a",)]


async def test_one_text_that_is_cancelled_is_taken_back(autojump_clock: MockClock) -> None:
    async with quick([hang]) as (batcher, _, _):
        with trio.move_on_after(0.5) as scope:
            await batcher.embed("a")
        assert scope.cancelled_caught
        await wait_all_tasks_blocked()
        statistics = batcher.statistics()
        assert (statistics.cancelled_rows, statistics.abandoned_calls) == (1, 1)


async def test_one_text_with_a_deadline_that_is_cancelled_is_taken_back(
    autojump_clock: MockClock,
) -> None:
    async with quick([hang]) as (batcher, _, nursery):
        nursery.start_soon(batcher.embed, "first")
        await wait_all_tasks_blocked()
        nursery.start_soon(partial(batcher.embed, "second", deadline=10.0))
        await wait_all_tasks_blocked()
        assert batcher.statistics().queued_rows == 1
        nursery.cancel_scope.cancel()
    assert batcher.statistics().queued_rows == 0
    assert batcher.statistics().cancelled_rows == 2


async def test_texts_that_were_announced_are_counted_one_by_one(autojump_clock: MockClock) -> None:
    async with quick(max_batch_rows=8, max_wait_s=1.0, hard_timeout_s=1.0) as (
        batcher,
        embedder,
        nursery,
    ):
        batcher.expect(3)
        for text in ("a", "b", "c"):
            nursery.start_soon(batcher.embed, text)
            await wait_all_tasks_blocked()
    assert embedder.calls == [("a", "b", "c")]


async def test_a_short_text_does_not_squeeze_in_where_its_bytes_lack_room(
    autojump_clock: MockClock,
) -> None:
    policy: dict[str, Any] = {"max_queue_rows": 2, "max_batch_bytes": 8, "max_queue_bytes": 10}
    async with quick(**policy) as (batcher, _, nursery):
        for text in ("first", "12345678"):
            nursery.start_soon(batcher.embed, text)
            await wait_all_tasks_blocked()
        with pytest.raises(QueueFullError):
            await batcher.embed("123")
        assert batcher.statistics().queued_bytes == 8


async def slowly(seconds: float, asked: Sequence[str]) -> Sequence[Vector]:
    await trio.sleep(seconds)
    return [ScriptedEmbedder().vector(text) for text in asked]
