"""What changes to single operators and numbers showed to be untested: calls in trouble, and rows that share."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batcher.cost import CostModel
from stationmaster.errors import EmbedderBusyError, RowRejectedError
from stationmaster.events import CallAbandoned, CallDone, CallFailed
from stationmaster.testing import ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import bench, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trio.testing import MockClock

    from stationmaster.abc import Vector
    from stationmaster.testing.embedder import Step


def refusing(
    guilty: set[str], then: Callable[[Sequence[str]], bool] | None = None
) -> Iterator[Step]:
    """Refuse calls with one of these, always in the same words; fail otherwise where `then` says so."""

    async def step(asked: Sequence[str]) -> Sequence[Vector]:
        await trio.lowlevel.checkpoint()
        if guilty & set(asked):
            raise RowRejectedError("422: too long")
        if then is not None and then(asked):
            raise RuntimeError("broke")
        return [ScriptedEmbedder().vector(text) for text in asked]

    return itertools.repeat(step)


# -------------------------------------------------------------------------------------------------------- bisection


async def test_once_a_part_was_accepted_the_same_words_condemn_nobody(
    autojump_clock: MockClock,
) -> None:
    wanted = texts(16)
    guilty = set(wanted[8:15])
    async with bench(ScriptedEmbedder(script=refusing(guilty))) as b:
        results = await b.batcher.embed_many(wanted, return_errors=True)
    assert {
        text
        for text, result in zip(wanted, results, strict=True)
        if isinstance(result, RowRejectedError)
    } == guilty


async def test_a_part_that_fails_otherwise_speaks_for_no_row(autojump_clock: MockClock) -> None:
    wanted = texts(16)
    script = refusing(set(wanted[8:]), lambda asked: len(asked) == 8)
    async with bench(ScriptedEmbedder(script=script)) as b:
        results = await b.batcher.embed_many(wanted, return_errors=True)
        assert [str(result) for result in results[8:]] == ["422: too long"] * 8
        # After three witnesses nobody asks for the other five.
        assert len({text for call in b.embedder.calls if len(call) == 1 for text in call}) == 3


@pytest.mark.parametrize(("rows", "asked_alone"), [(8, 8), (9, 3)])
async def test_eight_rows_are_all_asked_for_and_of_nine_three(
    autojump_clock: MockClock, rows: int, asked_alone: int
) -> None:
    wanted = texts(rows)
    async with bench(ScriptedEmbedder(script=refusing(set(wanted)))) as b:
        results = await b.batcher.embed_many(wanted, return_errors=True)
        assert all(isinstance(result, RowRejectedError) for result in results)
        assert len([call for call in b.embedder.calls if len(call) == 1]) == asked_alone


async def test_identical_rows_that_do_not_share_are_asked_for_one_by_one(
    autojump_clock: MockClock,
) -> None:
    script: list[Step] = [RowRejectedError("400")] * 3
    async with bench(ScriptedEmbedder(script=script)) as b:
        results = await b.batcher.embed_many(["a", "a"], return_errors=True)
        assert [str(result) for result in results] == ["400", "400"]
    assert b.embedder.calls == [("a", "a"), ("a",), ("a",)]


async def test_who_was_answered_with_its_half_does_not_keep_the_other_half_alive(
    autojump_clock: MockClock,
) -> None:
    script: list[Step] = [RowRejectedError("400"), None, hang]
    async with bench(ScriptedEmbedder(script=script), min_batch_rows=4, send_when_idle=False) as b:
        got: list[list[Vector]] = []

        async def ask(wanted: list[str]) -> None:
            got.append(await b.batcher.embed_many(wanted))

        b.nursery.start_soon(ask, ["a", "b"])
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.batcher.embed_many, ["c", "d"])
            await trio.sleep(1.0)
            assert b.embedder.calls == [("a", "b", "c", "d"), ("a", "b"), ("c", "d")]
            assert got == [[b.embedder.vector("a"), b.embedder.vector("b")]]
            impatient.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert b.batcher.statistics().abandoned_calls == 1


# ------------------------------------------------------------------------------------------------------ what is shared


async def test_rows_that_share_a_call_are_bounded_like_the_queue(autojump_clock: MockClock) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0),
        share_identical=True,
        max_batch_rows=3,
        max_queue_rows=3,
        max_in_flight=1,
    ) as b:
        await b.submit(*["a"] * 4)
        statistics = b.batcher.statistics()
        assert (statistics.rows_in_flight, statistics.queued_rows) == (3, 1)


async def test_when_all_who_share_a_row_leave_the_call_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[hang]), share_identical=True) as b:
        async with trio.open_nursery() as impatient:
            for _ in range(3):
                impatient.start_soon(b.batcher.embed, "a")
                await wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert b.batcher.statistics().abandoned_calls == 1
        assert b.embedder.calls == [("a",)]


async def test_a_list_whose_rows_were_dealt_to_both_halves_fails_once(
    autojump_clock: MockClock,
) -> None:
    refusal = RowRejectedError("400")
    async with bench(ScriptedEmbedder(script=[refusal, refusal]), share_identical=True) as b:
        with pytest.raises(RowRejectedError):
            await b.batcher.embed_many(["a", "b", "a", "b"])
        await wait_all_tasks_blocked()
        assert b.batcher.statistics().failed_rows == 4
        assert b.batcher.statistics().queued_rows == 0


async def test_without_a_bound_of_tokens_none_are_counted_even_where_a_list_is_cut(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=2, max_in_flight=1
    ) as b:
        b.nursery.start_soon(b.batcher.embed_many, texts(3))
        await wait_all_tasks_blocked()
        statistics = b.batcher.statistics()
        assert (statistics.queued_rows, statistics.queued_bytes) == (1, 2)
        assert statistics.queued_tokens == 0


async def test_the_priority_of_one_who_shares_counts_when_the_call_comes_back(
    autojump_clock: MockClock,
) -> None:
    async def be_busy(asked: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(1.0)
        raise EmbedderBusyError("503", retry_after_s=1.0)

    async with bench(
        ScriptedEmbedder(script=[be_busy]), share_identical=True, max_batch_rows=1, max_in_flight=1
    ) as b:
        await b.submit("a")
        await b.submit("b", deadline=15.0)
        await b.submit("a", priority=20.0)
        assert b.batcher.statistics().rows_in_flight == 2
    assert b.embedder.calls == [("a",), ("a",), ("b",), ("a",)]


# ------------------------------------------------------------------------------------------------------------- endings


class Abort(BaseException):
    """Like KeyboardInterrupt."""


async def test_what_is_no_exception_is_raised_even_by_a_call_that_everybody_left(
    autojump_clock: MockClock,
) -> None:
    async def abort() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise Abort("on its way out")

    async def in_a_nursery(asked: Sequence[str]) -> Sequence[Vector]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(abort)
            nursery.start_soon(trio.sleep_forever)
        raise AssertionError

    async def leave() -> None:
        async with bench(ScriptedEmbedder(script=[in_a_nursery])) as b:
            with trio.move_on_after(0.5):
                await b.batcher.embed("a")
            await trio.sleep(1.0)

    with pytest.raises(Abort):
        await leave()


async def test_an_abandoned_call_is_told_with_the_time_since_it_began(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[hang])) as b:
        await trio.sleep(2.0)
        with trio.move_on_after(0.5):
            await b.batcher.embed("a")
        await wait_all_tasks_blocked()
        assert [event.seconds for event in b.observer.of(CallAbandoned)] == [0.5]


async def test_a_call_of_more_rows_than_are_woken_at_a_time_is_counted_and_forgotten(
    autojump_clock: MockClock,
) -> None:
    async with bench(max_batch_rows=600) as b:
        b.batcher.expect(600)
        for text in texts(600):
            b.nursery.start_soon(b.ask, text)
        await trio.sleep(1.0)
        assert b.right(*texts(600))
        assert b.sent() == [(0.0, 600)]
        assert b.batcher.statistics().answered_rows == 600
        assert b.batcher._dispatcher.courier.calls == set()


async def test_calls_are_told_with_their_rows_and_time_however_they_end(
    autojump_clock: MockClock,
) -> None:
    script: list[Step] = [RuntimeError("broke"), None]
    async with bench(ScriptedEmbedder(script=script, seconds_per_text=0.25)) as b:
        await trio.sleep(2.0)
        for _ in range(2):
            await b.batcher.embed_many(["a", "b"], return_errors=True)
        failed, done = b.observer.of(CallFailed), b.observer.of(CallDone)
        assert [(event.rows, event.seconds) for event in failed] == [(2, 0.5)]
        assert [(event.rows, event.seconds) for event in done] == [(2, 0.5)]


async def test_nobody_joins_a_call_that_everybody_left(autojump_clock: MockClock) -> None:
    async def leave_slowly(asked: Sequence[str]) -> Sequence[Vector]:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1.0)
        raise AssertionError

    async with bench(ScriptedEmbedder(script=[leave_slowly]), share_identical=True) as b:
        with trio.move_on_after(0.5):
            await b.batcher.embed("a")
        await b.submit("a")
        await trio.sleep(2.0)
        assert b.right("a")
    assert b.embedder.calls == [("a",), ("a",)]


# ---------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("rows", [1, 13, 100, 1000])
def test_calls_of_one_size_say_nothing_of_the_cost_of_a_row(rows: int) -> None:
    cost = CostModel(0.1)
    for call in range(300):
        cost.learn(rows=rows, seconds=0.1 + call % 3 * 0.1)
        assert cost.per_row_s == 0.0


def test_where_a_line_would_begin_below_zero_it_begins_at_zero() -> None:
    cost = CostModel(0.1)
    for _ in range(10):
        cost.learn(rows=10, seconds=1.0)
        cost.learn(rows=20, seconds=4.0)
    assert cost.fixed_s == 0.0
    assert 0.1 <= cost.per_row_s <= 0.2
