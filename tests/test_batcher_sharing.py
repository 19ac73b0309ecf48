"""Identical rows that share one upstream row."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.errors import (
    DeadlineExceededError,
    EmbedderBusyError,
    EmbedderUnavailableError,
    RowRejectedError,
)
from stationmaster.testing import ScriptedEmbedder
from tests.batching import Bench, bench


def sharing(embedder: ScriptedEmbedder | None = None, **policy: Any) -> Any:
    return bench(embedder, share_identical=True, **policy)


async def asked(b: Bench, text: str, times: int) -> list[Any]:
    got: list[Any] = []

    async def ask() -> None:
        got.append(await b.batcher.embed(text))

    async with trio.open_nursery() as nursery:
        for _ in range(times):
            nursery.start_soon(ask)
    return got


async def test_unless_it_is_asked_for_identical_rows_are_sent_as_they_are(
    autojump_clock: MockClock,
) -> None:
    async with bench() as b:
        await asked(b, "same", 3)
    assert b.embedder.calls == [("same",) * 3]
    assert b.batcher.statistics().shared_rows == 0


async def test_identical_rows_of_a_call_are_sent_once_and_all_get_the_vector(
    autojump_clock: MockClock,
) -> None:
    async with sharing(max_batch_rows=2, max_in_flight=1) as b:
        got = await asked(b, "same", 10)
        assert got == [b.embedder.vector("same")] * 10
        assert len(set(map(id, got))) == 1
        many = ["a", "b", "a", "a"]
        assert await b.batcher.embed_many(many) == [b.embedder.vector(text) for text in many]
    assert b.embedder.calls[0] == ("same",)
    statistics = b.batcher.statistics()
    assert statistics.answered_rows == 14
    assert statistics.sent_texts + statistics.shared_rows == 14


async def test_one_who_asks_for_a_text_in_flight_gets_its_vector_without_another_call(
    autojump_clock: MockClock,
) -> None:
    async with sharing(ScriptedEmbedder(seconds_per_call=1.0)) as b:
        await b.submit("a", "b")
        await trio.sleep(0.5)
        assert len(await asked(b, "a", 2)) == 2
        assert trio.current_time() == 1.0
    assert b.sent() == [(0.0, 1), (0.005, 1)]
    assert b.batcher.statistics().shared_rows == 2


async def test_a_shared_row_lives_while_anyone_wants_it(autojump_clock: MockClock) -> None:
    async with sharing(ScriptedEmbedder(seconds_per_call=1.0)) as b:
        async with trio.open_nursery() as impatient:
            for _ in range(3):
                impatient.start_soon(b.batcher.embed, "a")
            await wait_all_tasks_blocked()
            await b.submit("a")
            impatient.cancel_scope.cancel()
    assert b.right("a")
    assert b.at["a"] == 1.0
    assert b.embedder.cancelled == 0
    assert b.batcher.statistics().cancelled_rows == 3


async def test_when_all_who_share_left_the_call_is_cancelled_and_the_next_one_asks_anew(
    autojump_clock: MockClock,
) -> None:
    async with sharing(ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=2) as b:
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.batcher.embed, "a")
            impatient.start_soon(b.batcher.embed, "a")
            await wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()
            b.nursery.start_soon(b.ask, "a")  # in the very tick in which the call is cancelled
    assert b.embedder.cancelled == 1
    assert b.embedder.calls == [("a",), ("a",)]
    assert b.right("a")
    assert b.batcher.statistics().abandoned_calls == 1


async def test_a_kept_deadline_strikes_for_the_one_who_has_it(autojump_clock: MockClock) -> None:
    async with sharing(ScriptedEmbedder(seconds_per_call=1.0)) as b:
        await b.submit("a")
        with pytest.raises(DeadlineExceededError):
            await b.batcher.embed("a", deadline=0.5)
        assert trio.current_time() == pytest.approx(0.51)
    assert b.right("a")
    assert b.at["a"] == 1.0


async def test_a_guilty_text_fails_all_who_asked_for_it_and_nobody_else(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(refuses=lambda text: text == "bad")
    async with sharing(embedder) as b:
        many = ["bad", "a", "bad", "b", "c", "a", "bad"]
        results = await b.batcher.embed_many(many, return_errors=True)
        for text, result in zip(many, results, strict=True):
            if text == "bad":
                assert isinstance(result, RowRejectedError)
            else:
                assert result == embedder.vector(text)
    assert embedder.calls == [("bad", "a", "b", "c"), ("bad", "a"), ("bad",), ("b", "c"), ("a",)]


async def test_a_refused_text_that_many_share_is_refused_at_once(autojump_clock: MockClock) -> None:
    async with sharing(ScriptedEmbedder(refuses=bool)) as b:
        results = await b.batcher.embed_many(["bad"] * 5, return_errors=True)
        assert [type(result) for result in results] == [RowRejectedError] * 5
    assert b.embedder.calls == [("bad",)]


@pytest.mark.parametrize(
    ("trouble", "reasons"),
    [
        (EmbedderUnavailableError("reset"), ["idle", "retry"]),
        (EmbedderBusyError("429", retry_after_s=1.0), ["idle", "idle"]),
    ],
    ids=["reset", "busy"],
)
async def test_one_who_joined_in_flight_has_the_second_chance_too(
    autojump_clock: MockClock, trouble: Exception, reasons: list[str]
) -> None:
    async with sharing(ScriptedEmbedder(seconds_per_call=1.0, script=[trouble])) as b:
        await b.submit("a")
        await trio.sleep(0.5)
        assert await asked(b, "a", 2) == [b.embedder.vector("a")] * 2
    assert b.right("a")
    assert b.reasons() == reasons
    assert b.embedder.calls == [("a",), ("a",)]


async def test_a_row_in_flight_is_shared_by_no_more_than_the_queue_may_hold(
    autojump_clock: MockClock,
) -> None:
    async with sharing(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=2, max_queue_rows=4, max_in_flight=2
    ) as b:
        await b.submit("a")
        await trio.sleep(0.5)
        assert len(await asked(b, "a", 6)) == 6
    assert b.embedder.calls == [("a",), ("a",)]


async def test_shared_rows_count_once_in_the_tokens_of_a_call(autojump_clock: MockClock) -> None:
    async with sharing(
        ScriptedEmbedder(seconds_per_call=1.0),
        max_batch_tokens=3,
        count_tokens=len,
        max_in_flight=1,
    ) as b:
        await b.submit("aaa", "aa", "aa", "b", "aa", "cc")
    assert b.embedder.calls == [("aaa",), ("aa", "b"), ("cc",)]
    assert b.right("aaa", "aa", "b", "cc")
