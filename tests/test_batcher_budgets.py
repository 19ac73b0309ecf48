"""Calls that are bounded in tokens, and who answers for the counting."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import BatchPolicy, estimate_tokens, open_batcher
from stationmaster.errors import ConfigError, RequestTooLargeError, RowRejectedError
from stationmaster.testing import ScriptedEmbedder
from tests.batching import bench


def words(text: str) -> int:
    """Count tokens, for these tests."""
    return len(text.split())


async def test_a_call_leaves_when_its_tokens_are_full(autojump_clock: MockClock) -> None:
    async with bench(
        count_tokens=words, max_batch_tokens=5, send_when_idle=False, min_batch_rows=32
    ) as b:
        await b.submit("a b c", "d")
        assert b.batcher.statistics().queued_tokens == 4
        assert b.sent() == []
        await b.submit("e f")
        assert b.embedder.calls == [("a b c", "d")]  # the third did not fit, it heads the next
        assert b.batcher.statistics().queued_tokens == 2
    assert b.embedder.calls[1] == ("e f",)
    assert b.reasons() == ["full", "hard"]
    assert b.right("a b c", "d", "e f")


async def test_many_texts_are_cut_where_their_tokens_fill_a_call(autojump_clock: MockClock) -> None:
    async with bench(count_tokens=words, max_batch_tokens=4, max_in_flight=1) as b:
        many = ["a b", "c", "d", "e f g", "h i", "j"]
        vectors = await b.batcher.embed_many(many)
        assert vectors == [b.embedder.vector(text) for text in many]
    assert b.embedder.calls == [("a b", "c", "d"), ("e f g",), ("h i", "j")]
    assert b.batcher.statistics().queued_tokens == 0


async def test_tokens_of_those_who_leave_are_counted_no_more(autojump_clock: MockClock) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0),
        count_tokens=words,
        max_batch_tokens=4,
        max_in_flight=1,
    ) as b:
        await b.submit("first")
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.batcher.embed, "a b")
            impatient.start_soon(b.batcher.embed_many, ["c", "d"])
            await wait_all_tasks_blocked()
            assert b.batcher.statistics().queued_tokens == 4
            impatient.cancel_scope.cancel()
        assert b.batcher.statistics().queued_tokens == 0


async def test_a_text_with_too_many_tokens_is_refused_for_good(autojump_clock: MockClock) -> None:
    async with bench(count_tokens=words, max_batch_tokens=2) as b:
        with pytest.raises(RequestTooLargeError, match="a text of 3 tokens can never fit"):
            await b.batcher.embed("a b c")
        with pytest.raises(RequestTooLargeError, match="a call of 2 tokens"):
            await b.batcher.embed_many(["a", "a b c", "b"])
        assert b.batcher.statistics().refusals == {"RequestTooLargeError": 4}
    assert b.embedder.calls == []


async def test_what_the_counting_raises_is_that_callers_alone(autojump_clock: MockClock) -> None:
    counted: list[tuple[str, trio.lowlevel.Task]] = []

    def count(text: str) -> int:
        counted.append((text, trio.lowlevel.current_task()))
        if text == "bad":
            raise ZeroDivisionError("the tokenizer is broken")
        return {"negative": -1, "half": 1.5, "yes": True}.get(text, 1)  # type: ignore[return-value]

    async with bench(count_tokens=count, max_batch_tokens=4, send_when_idle=False) as b:
        await b.submit("before")
        here = trio.lowlevel.current_task()
        with pytest.raises(ZeroDivisionError, match="the tokenizer is broken"):
            await b.batcher.embed("bad")
        with pytest.raises(ZeroDivisionError):
            await b.batcher.embed_many(["fine", "bad"])
        for text in ("negative", "half", "yes"):
            with pytest.raises(ValueError, match=r"must return a whole number .* \(text 0\)"):
                await b.batcher.embed(text)
        assert b.batcher.statistics().queued_rows == 1
        assert all(task is here for text, task in counted if text != "before")
        await b.submit("after")
    assert b.right("before", "after")
    texts = [text for text, _ in counted]
    assert texts.count("before") == texts.count("after") == 1  # once per text


async def test_without_a_count_of_ones_own_tokens_are_estimated(autojump_clock: MockClock) -> None:
    async with bench(max_batch_tokens=10, max_in_flight=1) as b:
        many = ["12345678", "1234567", "äö"]
        assert list(map(estimate_tokens, many)) == [5, 4, 3]
        await b.batcher.embed_many(many)
    assert b.embedder.calls == [("12345678", "1234567"), ("äö",)]


async def test_a_refused_call_with_counted_tokens_is_taken_apart_like_any(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(refuses=lambda text: text == "c")
    async with bench(embedder, count_tokens=words, max_batch_tokens=100) as b:
        results = await b.batcher.embed_many(list("abcd"), return_errors=True)
    assert [type(result) for result in results] == [list, list, RowRejectedError, list]


async def test_counting_without_a_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens"):
        async with open_batcher(ScriptedEmbedder(), count_tokens=words):
            raise AssertionError("it must not open")
    with pytest.raises(ConfigError, match="max_batch_tokens: must be a whole number"):
        BatchPolicy(max_batch_tokens=0)
