"""What changes to single operators and numbers of the batcher showed to be untested."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batcher import BatchPolicy
from stationmaster.errors import (
    BatcherClosedError,
    DeadlineExceededError,
    EmbedderBusyError,
    EmbedderUnavailableError,
    RowRejectedError,
)
from stationmaster.events import CallAbandoned, CallFailed
from stationmaster.testing import ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import Bench, bench

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio.testing import MockClock

    from stationmaster.abc import Vector
    from stationmaster.batcher.calls import Call
    from stationmaster.testing.embedder import Step


def carried(b: Bench) -> set[Call]:
    """Return the calls that the batcher still holds, in flight or not: a forgotten one would be a leak."""
    return b.batcher._dispatcher.courier.calls


async def test_failed_rows_add_up_over_calls(autojump_clock: MockClock) -> None:
    embedder = ScriptedEmbedder(script=[RuntimeError("one"), RuntimeError("two")])
    async with bench(embedder) as b:
        await b.submit("a")
        await b.submit("b")
        assert b.batcher.statistics().failed_rows == 2


async def test_rows_that_are_too_late_for_a_second_try_add_up_and_are_forgotten(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(script=[EmbedderUnavailableError("reset")] * 2)
    async with bench(embedder, start_estimate_s=1.0) as b:
        for text in ("a", "b"):
            await b.submit(text, deadline=trio.current_time() + 0.5)
            assert str(b.got[text]) == "reset"
        assert b.batcher.statistics().failed_rows == 2
        assert carried(b) == set()


async def test_rows_that_cannot_wait_for_a_busy_server_add_up_and_are_forgotten(
    autojump_clock: MockClock,
) -> None:
    busy = EmbedderBusyError("429", retry_after_s=5.0)
    async with bench(ScriptedEmbedder(script=[busy, busy])) as b:
        for text in ("a", "b"):
            await b.submit(text, deadline=trio.current_time() + 1.0)
            assert str(b.got[text]) == "429"
            await trio.sleep(6)
        assert b.batcher.statistics().failed_rows == 2
        assert carried(b) == set()


async def test_a_row_that_is_due_at_the_very_instant_of_the_second_answer_is_tried(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(script=[EmbedderUnavailableError("reset")], seconds_per_call=0.25)
    async with bench(embedder, start_estimate_s=0.25) as b:
        await b.submit("a", deadline=0.5)
        await trio.sleep(0.6)
        assert b.right("a")


async def test_abandoned_calls_are_counted_and_forgotten(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(script=[hang, hang])) as b:
        for text in ("a", "b"):
            with trio.move_on_after(0.5):
                await b.batcher.embed(text)
            await wait_all_tasks_blocked()
        assert b.batcher.statistics().abandoned_calls == 2
        assert carried(b) == set()


async def test_a_refused_call_that_everybody_left_is_forgotten(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as callers:

        async def refuse_and_leave(texts: Sequence[str]) -> Sequence[Vector]:
            await trio.sleep(0.1)
            callers.cancel_scope.cancel()
            raise RowRejectedError("400")

        async with bench(ScriptedEmbedder(script=[refuse_and_leave]), min_batch_rows=2) as b:
            b.batcher.expect(2)
            callers.start_soon(b.batcher.embed, "a")
            callers.start_soon(b.batcher.embed, "b")
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
                assert len(b.embedder.calls) == 1
                assert carried(b) == set()


async def test_a_part_of_a_refused_call_is_tried_again_after_a_reset_and_counted_so(
    autojump_clock: MockClock,
) -> None:
    script = [RowRejectedError("400"), EmbedderUnavailableError("reset"), None, None]
    async with bench(ScriptedEmbedder(script=script)) as b:
        assert await b.batcher.embed_many(["a", "b"]) == [
            b.embedder.vector("a"),
            b.embedder.vector("b"),
        ]
        calls = b.batcher.statistics().calls
        assert calls == {"idle": 1, "bisect": 2, "retry": 1}


async def test_a_part_of_a_refused_call_without_time_for_another_try_says_what_stopped_it(
    autojump_clock: MockClock,
) -> None:
    slow = partial(_fail_after, 0.4, EmbedderUnavailableError("reset"))
    script: list[Step] = [RowRejectedError("400"), slow, slow]
    async with bench(ScriptedEmbedder(script=script), start_estimate_s=0.2) as b:
        results = await b.batcher.embed_many(["a", "b"], deadline=0.5, return_errors=True)
        assert str(results[0]) == "reset"
        assert isinstance(results[1], (DeadlineExceededError, EmbedderUnavailableError))


async def _fail_after(seconds: float, error: Exception, texts: Sequence[str]) -> Sequence[Vector]:
    await trio.sleep(seconds)
    raise error


async def test_a_row_that_was_never_tried_alone_says_so_and_names_the_last_refusal(
    autojump_clock: MockClock,
) -> None:
    script = [
        partial(_fail_after, 0.1, RowRejectedError("first")),
        partial(_fail_after, 0.4, RowRejectedError("second")),
    ]
    async with bench(ScriptedEmbedder(script=script), start_estimate_s=0.1) as b:
        results = await b.batcher.embed_many(list("abcd"), deadline=0.55, return_errors=True)
        assert all(isinstance(result, DeadlineExceededError) for result in results)
        assert str(results[0]) == (
            "the row was refused together with others, and there is no time left to ask for it alone"
        )
        assert isinstance(results[0], Exception)
        assert str(results[0].__cause__) == "second"
        assert carried(b) == set()


async def test_a_deadline_that_the_batcher_keeps_says_what_it_cut_short(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[hang])) as b:
        with pytest.raises(
            DeadlineExceededError,
            match=r"^the deadline passed while the request was queued or in flight$",
        ):
            await b.batcher.embed("a", deadline=0.5)


async def test_a_closed_batcher_says_no_more_than_that(autojump_clock: MockClock) -> None:
    async with bench() as b:
        pass
    with pytest.raises(BatcherClosedError, match=r"^the batcher is closed$"):
        await b.batcher.embed("a")


async def test_an_announcement_that_lapsed_does_not_add_to_the_next_one(
    autojump_clock: MockClock,
) -> None:
    async with bench(max_wait_s=0.5, hard_timeout_s=5.0) as b:
        b.batcher.expect(10)
        await trio.sleep(1.0)
        b.batcher.expect(2)
        await b.submit("a")
        assert b.sent() == []
        await b.submit("b")
        assert b.sent() == [(1.0, 2)]


@pytest.mark.parametrize("mixed", [False, True])
async def test_an_abandoned_call_that_ends_in_a_group_is_told_with_its_rows_and_time(
    autojump_clock: MockClock, mixed: bool
) -> None:
    async def one(seconds: float) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if mixed and seconds:
                raise RuntimeError("broke on its way out")

    async def in_a_nursery(texts: Sequence[str]) -> Sequence[Vector]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0)
            nursery.start_soon(one, 1)
        raise AssertionError

    async with bench(ScriptedEmbedder(script=[in_a_nursery])) as b:
        await trio.sleep(2.0)
        with trio.move_on_after(0.5):
            await b.batcher.embed_many(["a", "b"])
        await wait_all_tasks_blocked()
        told = [(event.rows, event.seconds) for event in b.observer.of(_kind(mixed))]
        assert told == [(2, 0.5)]


def _kind(mixed: bool) -> type[CallFailed | CallAbandoned]:
    return CallFailed if mixed else CallAbandoned


async def test_rows_that_come_back_from_a_busy_server_are_looked_at_anew(
    autojump_clock: MockClock,
) -> None:
    script = [EmbedderBusyError("503", retry_after_s=1.0)]
    async with bench(ScriptedEmbedder(script=script), send_when_idle=False, min_batch_rows=1) as b:
        await b.submit("a")
        await trio.sleep(0.5)
        statistics = b.batcher.statistics()
        assert statistics.queued_rows == 1
        assert statistics.oldest_age_s == pytest.approx(0.5)
        await trio.sleep(1.0)
        assert b.right("a")
        assert [when for when, _ in b.sent()] == [0.005, 1.005]


def test_the_classic_policy_has_the_classic_numbers() -> None:
    assert BatchPolicy.seed_compat() == BatchPolicy(
        min_batch_rows=4,
        max_batch_rows=16,
        max_wait_s=0.05,
        hard_timeout_s=0.25,
        send_when_idle=False,
        max_queue_rows=160,
    )
