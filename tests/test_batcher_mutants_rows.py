"""What changes to single operators and numbers showed to be untested: the queue, its counts, and its door."""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batcher.expiries import Expiries
from stationmaster.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    EmbedderBusyError,
    QueueFullError,
)
from stationmaster.events import CallStarted
from stationmaster.testing import ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import Bench, bench, texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio.testing import MockClock

    from stationmaster.abc import Vector
    from stationmaster.batcher.callers import Caller


async def measure(b: Bench) -> None:
    """Let the batcher learn what a call takes."""
    for _ in range(8):
        await b.batcher.embed("measured")
    b.embedder.calls.clear()
    b.embedder.began.clear()


def tombstones(b: Bench) -> tuple[int, int, int]:
    """Return how many entries the queue believes to be dead, how many to be segments, and how many it holds.

    A wrong count would show in nothing but speed: the quick way of forming calls is closed while one is not 0.
    """
    queue = b.batcher._queue
    return queue._dead, queue._segments, len(queue._entries)


# ------------------------------------------------------------------------------------------------------------ the order


async def test_the_oldest_row_is_known_when_a_later_one_is_ahead_of_it(
    autojump_clock: MockClock,
) -> None:
    slow = ScriptedEmbedder(seconds_per_call=5.0)
    policy: dict[str, Any] = {"max_wait_s": 7.0, "hard_timeout_s": 7.0, "send_when_idle": False}
    async with bench(slow, max_in_flight=1, max_batch_rows=3, min_batch_rows=3, **policy) as b:
        await b.submit("x", "y", "z", "old")
        await b.submit("dated", deadline=22.0)
        await trio.sleep(3.0)
        await b.submit("new", deadline=25.0)
        await b.submit("1", "2", deadline=20.0)
        await trio.sleep(3.0)
        assert set(b.embedder.calls[1]) == {"1", "2", "dated"}
        assert [event.oldest_age_s for event in b.observer.of(CallStarted)] == [0.0, 5.0]
        statistics = b.batcher.statistics()  # "new" heads the queue, and "old" waits for 6 s
        assert (statistics.queued_rows, statistics.oldest_age_s) == (2, 6.0)


async def test_the_most_urgent_row_is_known_when_one_with_priority_is_ahead_of_it(
    autojump_clock: MockClock,
) -> None:
    async def slowly(asked: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(2.0)
        return [b.embedder.vector(text) for text in asked]

    embedder = ScriptedEmbedder(script=[slowly, slowly])
    policy: dict[str, Any] = {"max_wait_s": 50.0, "hard_timeout_s": 50.0, "send_when_idle": False}
    async with bench(embedder, max_in_flight=1, max_batch_rows=3, min_batch_rows=3, **policy) as b:
        await b.submit("x", "y", "z")
        await b.submit("with priority", deadline=20.0, priority=15.0)
        await b.submit("urgent", deadline=8.0)
        await b.submit("1", "2", "3", deadline=9.0, priority=9.0)
    assert b.right("1", "2", "3", "with priority", "urgent")
    assert b.reasons() == ["full", "full", "latest"]


async def test_the_age_of_the_oldest_row_counts_from_its_arrival(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1) as b:
        await trio.sleep(2.0)
        await b.submit("first", "second")
        await trio.sleep(0.5)
        assert b.batcher.statistics().oldest_age_s == 0.5


async def test_the_oldest_row_is_known_after_rows_came_back(autojump_clock: MockClock) -> None:
    busy = EmbedderBusyError("503", retry_after_s=1.0)
    embedder = ScriptedEmbedder(script=[busy], seconds_per_call=1.0)
    async with bench(embedder, max_batch_rows=2, max_in_flight=1) as b:
        b.batcher.expect(2)
        await b.submit("a", "b")
        await trio.sleep(0.5)
        await b.submit("c")
        await trio.sleep(1.0)
        assert b.batcher.statistics().oldest_age_s == 1.5
        await trio.sleep(1.0)
        assert [set(call) for call in embedder.calls] == [{"a", "b"}, {"a", "b"}]
        assert b.batcher.statistics().oldest_age_s == 2.0


async def test_when_all_left_the_queue_nothing_is_old_or_due(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1) as b:
        await b.submit("first")
        with trio.move_on_after(0.5):
            await b.batcher.embed("second")
        queue = b.batcher._queue
        assert (queue.oldest, queue.earliest_due, queue.rows) == (inf, inf, 0)


# ----------------------------------------------------------------------------------------------------------- the counts


@pytest.mark.parametrize("many", [False, True])
async def test_cancelled_rows_are_counted_as_dead_until_they_are_met(
    autojump_clock: MockClock, many: bool
) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1) as b:
        await b.submit("first")
        async with trio.open_nursery() as impatient:
            for text in texts(3):
                if many:
                    impatient.start_soon(b.batcher.embed_many, [text])
                else:
                    impatient.start_soon(b.batcher.embed, text)
            await b.submit("second")
            impatient.cancel_scope.cancel()
        assert tombstones(b) == (3, 3 if many else 0, 4)
        await trio.sleep(1.5)
        assert tombstones(b) == (0, 0, 0)
    assert b.embedder.calls == [("first",), ("second",)]


@pytest.mark.parametrize("many", [False, True])
async def test_a_crowd_of_cancelled_rows_is_dropped_at_once_and_counted_no_more(
    autojump_clock: MockClock, many: bool
) -> None:
    async with bench(ScriptedEmbedder(script=[hang]), max_in_flight=1) as b:
        with trio.move_on_after(1.0):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.batcher.embed, "first")
                await wait_all_tasks_blocked()
                nursery.start_soon(b.batcher.embed_many, ["a", "b"])
                async with trio.open_nursery() as impatient:
                    for text in texts(65):
                        if many:
                            impatient.start_soon(b.batcher.embed_many, [text])
                        else:
                            impatient.start_soon(b.batcher.embed, text)
                    await wait_all_tasks_blocked()
                    impatient.cancel_scope.cancel()
                assert tombstones(b) == (0, 1, 1)


# ------------------------------------------------------------------------------------------------------------ the calls


@pytest.mark.parametrize("counted", ["tokens", "identical rows"])
async def test_a_call_is_full_however_it_is_formed(autojump_clock: MockClock, counted: str) -> None:
    policy: dict[str, Any] = (
        {"max_batch_tokens": 100} if counted == "tokens" else {"share_identical": True}
    )
    embedder = ScriptedEmbedder(seconds_per_call=1.0)
    async with bench(embedder, max_batch_rows=2, max_in_flight=1, **policy) as b:
        await b.submit("first", "a", "b", "c")
    assert b.embedder.calls == [("first",), ("a", "b"), ("c",)]


async def test_a_text_may_have_no_tokens(autojump_clock: MockClock) -> None:
    async with bench(count_tokens=lambda text: 0, max_batch_tokens=1) as b:
        await b.submit("a")
    assert b.right("a")


async def test_whatever_sequence_an_embedder_answers_with_a_list_is_returned(
    autojump_clock: MockClock,
) -> None:
    async def answer(asked: Sequence[str]) -> Sequence[Vector]:
        await trio.lowlevel.checkpoint()
        return tuple(b.embedder.vector(text) for text in asked)

    async with bench(ScriptedEmbedder(script=[answer])) as b:
        assert await b.batcher.embed_many(["a", "b"]) == list(map(b.embedder.vector, "ab"))


# ------------------------------------------------------------------------------------------------------------- the door


async def test_room_is_expected_after_one_call_if_only_bytes_are_lacking(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0),
        max_batch_rows=1,
        max_in_flight=1,
        max_batch_bytes=8,
        max_queue_bytes=8,
    ) as b:
        await measure(b)
        await b.submit("first", "12345678")
        with pytest.raises(QueueFullError) as caught:
            await b.batcher.embed("9")
        assert caught.value.retry_after_s == pytest.approx(1.0)


async def test_room_comes_sooner_if_several_calls_are_made_at_a_time(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=2, max_in_flight=2, max_queue_rows=4
    ) as b:
        await measure(b)
        await b.submit(*texts(8))
        assert b.batcher.statistics().queued_rows == 4
        with pytest.raises(QueueFullError) as caught:
            await b.batcher.embed_many(texts(4))
        assert caught.value.retry_after_s == pytest.approx(1.0)


async def test_rows_that_would_be_behind_a_new_one_do_not_make_its_deadline_unreachable(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=2, max_in_flight=1
    ) as b:
        await measure(b)
        await b.submit("first", "behind")
        await trio.sleep(0.9)
        deadline = trio.current_time() + 1.5
        assert await b.batcher.embed_many(["a", "b"], deadline=deadline) == list(
            map(b.embedder.vector, "ab")
        )
        assert b.embedder.calls[:2] == [("first",), ("a", "b")]


async def test_priority_makes_a_deadline_reachable(autojump_clock: MockClock) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=1, max_in_flight=1
    ) as b:
        await measure(b)
        await b.submit("first")
        await b.submit("behind", deadline=trio.current_time() + 5.0)
        await trio.sleep(0.9)
        await b.submit("a", deadline=trio.current_time() + 1.5, priority=30.0)
        assert b.batcher.statistics().refused_rows == 0
    assert b.right("a")
    assert b.embedder.calls[1] == ("a",)


async def test_texts_that_fill_the_queue_to_the_last_byte_are_taken(
    autojump_clock: MockClock,
) -> None:
    async with bench(max_batch_bytes=4, max_queue_bytes=8) as b:
        assert await b.batcher.embed_many(["aaaa", "bbbb"]) == [
            b.embedder.vector("aaaa"),
            b.embedder.vector("bbbb"),
        ]


async def test_where_rows_share_those_ahead_may_cost_nothing(autojump_clock: MockClock) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0),
        max_batch_rows=1,
        max_in_flight=1,
        share_identical=True,
    ) as b:
        await measure(b)
        await b.submit("first")
        await b.submit("ahead", deadline=trio.current_time() + 1.4)
        await b.submit("a", deadline=trio.current_time() + 1.5)
        assert b.batcher.statistics().refused_rows == 0


async def test_the_end_of_a_pause_is_just_in_time_and_later_is_not(
    autojump_clock: MockClock,
) -> None:
    busy = EmbedderBusyError("503", retry_after_s=1.0)
    async with bench(ScriptedEmbedder(script=[busy])) as b:
        await trio.sleep(1.0)
        await b.submit("first")
        await trio.sleep(0.5)
        await b.submit("a", deadline=2.0)
        with pytest.raises(
            DeadlineUnreachableError,
            match=r"^it would be answered in 0\.5 s at best, the deadline is in 0\.25 s$",
        ):
            await b.batcher.embed("b", deadline=1.75)
        await trio.sleep(1.0)
        assert b.right("first", "a")


async def test_a_caller_with_a_deadline_can_be_cancelled_before_it(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[hang])) as b:
        async with trio.open_nursery() as impatient:
            impatient.start_soon(partial(b.batcher.embed, "a", deadline=10.0))
            await wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert trio.current_time() == 0.0
        assert b.batcher.statistics().abandoned_calls == 1


async def test_a_list_that_takes_errors_is_admitted_if_its_first_row_can_be_in_time(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=1, max_in_flight=1
    ) as b:
        await measure(b)
        await b.submit("first")
        await trio.sleep(0.9)
        deadline = trio.current_time() + 1.5
        results = await b.batcher.embed_many(["a", "b"], deadline=deadline, return_errors=True)
        assert results[0] == b.embedder.vector("a")
        assert isinstance(results[1], DeadlineExceededError)


def test_a_deadline_that_struck_may_be_dropped_beside_one_that_came_later() -> None:
    struck: Any = object()
    later: Any = object()
    expiries = Expiries()
    expiries.add(struck, 1.001)
    taken: Sequence[Caller] = expiries.pop(1.02)
    assert taken == [struck]
    expiries.add(later, 1.002)
    expiries.discard(struck, 1.001)
    assert expiries.pop(1.02) == [later]
