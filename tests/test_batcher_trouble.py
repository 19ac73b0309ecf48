"""What becomes of rows when the embedder fails."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import open_batcher
from stationmaster.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.events import CallAbandoned, CallFailed
from stationmaster.testing import ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import bench, texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stationmaster.abc import Vector


# ------------------------------------------------------------------------------------------------------ whole calls


async def test_an_error_fails_every_row_of_its_call_with_an_instance_of_its_own(
    autojump_clock: MockClock,
) -> None:
    original = EmbedderRefusedError("401: no such key")
    original.add_note("from the server")
    async with bench(ScriptedEmbedder(script=[original])) as b:
        b.batcher.expect(3)
        await b.submit("a", "b", "c")
        await b.submit("next")
    errors = [b.got[text] for text in ("a", "b", "c")]
    assert [type(error) for error in errors] == [EmbedderRefusedError] * 3
    assert len({id(error) for error in [*errors, original]}) == 4
    assert all(error.__cause__ is original for error in errors)
    assert all(str(error) == "401: no such key" for error in errors)
    errors[0].add_note("mine")
    assert errors[1].__notes__ == original.__notes__ == ["from the server"]
    assert b.right("next")
    assert [event.error for event in b.observer.of(CallFailed)] == [original]
    assert b.batcher.statistics().failed_rows == 3


async def test_the_facts_of_an_error_reach_every_row_whatever_its_constructor_wants(
    autojump_clock: MockClock,
) -> None:
    class QuotaError(EmbedderError):
        def __init__(self, *, quota: int) -> None:
            self.quota = quota
            super().__init__(f"quota of {quota} used up")

    async with bench(ScriptedEmbedder(script=[QuotaError(quota=7)])) as b:
        await b.submit("a")
    assert isinstance(b.got["a"], QuotaError)
    assert b.got["a"].quota == 7


async def test_an_error_of_another_kind_is_wrapped(autojump_clock: MockClock) -> None:
    bug = ZeroDivisionError("division by zero")
    async with bench(ScriptedEmbedder(script=[bug])) as b:
        await b.submit("a")
    assert type(b.got["a"]) is EmbedderError
    assert str(b.got["a"]) == "the embedder failed with ZeroDivisionError: division by zero"
    assert b.got["a"].__cause__ is bug


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([[1.0], [2.0]], "answered 3 texts with 2 vectors"),
        ([[1.0]] * 4, "answered 3 texts with 4 vectors"),
        (None, "answered 3 texts with NoneType, not a list of vectors"),
        ({0: [1.0], 1: [2.0], 2: [3.0]}, "answered 3 texts with dict, not a list of vectors"),
        (([1.0] for _ in range(3)), "answered 3 texts with generator, not a list of vectors"),
    ],
    ids=["short", "long", "nothing", "mapping", "generator"],
)
async def test_an_answer_that_breaks_the_contract_twice_gives_nobody_a_vector(
    autojump_clock: MockClock, answer: Any, words: str
) -> None:
    async def wrong(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.lowlevel.checkpoint()
        return answer  # type: ignore[no-any-return]

    async with bench(ScriptedEmbedder(script=[wrong, wrong, wrong])) as b:
        with pytest.raises(ProtocolError, match=words):
            await b.batcher.embed_many(texts(3))
        await b.submit("after")  # once wrong, then right
    assert b.right("after")
    assert b.reasons() == ["idle", "retry", "idle", "retry"]
    assert [len(call) for call in b.embedder.calls] == [3, 3, 1, 1]  # not taken apart


async def test_many_texts_fail_with_the_first_error_and_the_rest_is_taken_back(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0, script=[EmbedderRefusedError("403"), hang])
    async with bench(embedder, max_batch_rows=2, max_in_flight=2) as b:
        with pytest.raises(EmbedderRefusedError) as caught:
            await b.batcher.embed_many(texts(7))
        assert caught.value.__notes__ == ["rows 0 to 1 of its embed_many"]
        assert b.batcher.statistics().queued_rows == 0
        await wait_all_tasks_blocked()
    assert b.embedder.cancelled == 1
    assert b.batcher.statistics().failed_rows == 7


async def test_with_return_errors_each_row_has_its_own_end(autojump_clock: MockClock) -> None:
    script = [None, EmbedderRefusedError("403")]
    async with bench(ScriptedEmbedder(script=script), max_batch_rows=2, max_in_flight=1) as b:
        results = await b.batcher.embed_many(texts(5), return_errors=True)
    vectors = [b.embedder.vector(text) for text in texts(5)]
    assert results[:2] == vectors[:2]
    assert results[4:] == vectors[4:]
    first, second = results[2:4]
    assert isinstance(first, EmbedderRefusedError)
    assert isinstance(second, EmbedderRefusedError)
    assert first is not second
    statistics = b.batcher.statistics()
    assert (statistics.answered_rows, statistics.failed_rows) == (3, 2)


# --------------------------------------------------------------------------------------------------------- bisection


async def test_only_the_guilty_row_fails(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(refuses=lambda text: text == "t13")) as b:
        for text in texts(32):
            b.nursery.start_soon(b.ask, text)
    assert isinstance(b.got["t13"], RowRejectedError)
    assert b.right(*(text for text in texts(32) if text != "t13"))
    assert len(b.embedder.calls) == 11  # the call, and two halves in each of five rounds
    assert b.reasons() == ["full"] + ["bisect"] * 10


async def test_only_the_guilty_row_of_many_texts_fails(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(refuses=lambda text: text in {"t0", "t5"})) as b:
        results = await b.batcher.embed_many(texts(7), return_errors=True)
        for number, result in enumerate(results):
            if number in {0, 5}:
                assert isinstance(result, RowRejectedError)
            else:
                assert result == b.embedder.vector(f"t{number}")
        with pytest.raises(RowRejectedError, match="t5") as caught:
            await b.batcher.embed_many([f"t{number}" for number in range(1, 7)])
        assert caught.value.__notes__ == ["rows 4 to 4 of its embed_many"]


@settings(max_examples=60, deadline=None)
@given(guilty=st.sets(st.integers(0, 15)), cuts=st.sets(st.integers(1, 15)))
def test_whoever_is_guilty_fails_and_nobody_else_if_the_words_differ(
    guilty: set[int], cuts: set[int]
) -> None:
    async def main() -> None:
        # Every refusal names its text, so no two rows are ever refused in the same words.
        embedder = ScriptedEmbedder(refuses=lambda text: int(text[1:]) in guilty)
        results: dict[str, Any] = {}
        async with open_batcher(embedder) as batcher, trio.open_nursery() as nursery:

            async def ask(some: list[str]) -> None:
                answers = await batcher.embed_many(some, return_errors=True)
                results.update(zip(some, answers, strict=True))

            for low, high in itertools.pairwise([0, *sorted(cuts), 16]):
                nursery.start_soon(ask, texts(16)[low:high])
        for number, text in enumerate(texts(16)):
            if number in guilty:
                assert isinstance(results[text], RowRejectedError)
            else:
                assert results[text] == embedder.vector(text)
        assert len(embedder.calls) <= 2 * 16

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_a_server_that_refuses_everything_in_the_same_words_is_not_asked_row_by_row(
    autojump_clock: MockClock,
) -> None:
    refusal = RowRejectedError("400: unknown option")
    async with bench(ScriptedEmbedder(script=[refusal] * 63)) as b:
        for text in texts(32):
            b.nursery.start_soon(b.ask, text)
    assert all(isinstance(b.got[text], RowRejectedError) for text in texts(32))
    # Down to a row of one half, to one of the other, and to one of the largest part that is left.
    assert len(b.embedder.calls) == 1 + 5 + 5 + 4
    assert b.batcher.statistics().failed_rows == 32


@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(st.booleans(), min_size=1, max_size=8))
def test_few_rows_are_all_asked_for_whatever_the_words(wanted: list[bool]) -> None:
    async def refuse_some(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.lowlevel.checkpoint()
        if any("bad" in text for text in texts):
            raise RowRejectedError("422: too long")
        return [embedder.vector(text) for text in texts]

    embedder = ScriptedEmbedder(script=itertools.repeat(refuse_some))

    async def main() -> None:
        rows = [f"{'good' if good else 'bad'} {row}" for row, good in enumerate(wanted)]
        async with open_batcher(embedder) as batcher:
            results = await batcher.embed_many(rows, return_errors=True)
        for good, text, result in zip(wanted, rows, results, strict=True):
            assert (result == embedder.vector(text)) == good
            assert isinstance(result, RowRejectedError) != good

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_two_guilty_rows_at_the_worst_places_of_a_full_call_do_not_condemn_it(
    autojump_clock: MockClock,
) -> None:
    refusal = RowRejectedError("422: too long")

    async def refuse_two(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.lowlevel.checkpoint()
        if {"t0", "t16"} & set(texts):
            raise refusal
        return [b.embedder.vector(text) for text in texts]

    async with bench(ScriptedEmbedder(script=itertools.repeat(refuse_two))) as b:
        for text in texts(32):
            b.nursery.start_soon(b.ask, text)
    assert {text for text in texts(32) if isinstance(b.got[text], RowRejectedError)} == {
        "t0",
        "t16",
    }


async def test_two_guilty_rows_with_the_same_words_do_not_condemn_the_others(
    autojump_clock: MockClock,
) -> None:
    async def refuse_long(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.lowlevel.checkpoint()
        if any(len(text) > 5 for text in texts):
            raise RowRejectedError("422: too long")
        return [embedder.vector(text) for text in texts]

    embedder = ScriptedEmbedder(script=itertools.repeat(refuse_long))
    async with bench(embedder) as b:
        wanted = ["long text 1", *texts(14), "long text 2"]
        results = await b.batcher.embed_many(wanted, return_errors=True)
    assert [isinstance(result, RowRejectedError) for result in results] == [
        len(text) > 5 for text in wanted
    ]


async def test_rows_whose_callers_leave_are_not_sent_again(autojump_clock: MockClock) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0, refuses=lambda text: text == "bad")
    async with bench(embedder, start_estimate_s=0.0) as b:
        async with trio.open_nursery() as impatient:
            for text in ("bad", "good0"):
                b.nursery.start_soon(b.ask, text)
            for text in ("gone0", "gone1"):
                impatient.start_soon(b.ask, text)
            await trio.sleep(0.5)
            impatient.cancel_scope.cancel()
    assert [set(call) for call in embedder.calls[1:]] == [{text} for (text,) in embedder.calls[1:]]
    assert {text for call in embedder.calls[1:] for text in call} == {"bad", "good0"}
    assert b.right("good0")


async def test_a_refused_call_that_everybody_left_is_not_sent_again(
    autojump_clock: MockClock,
) -> None:
    async def leave_and_refuse(texts: Sequence[str]) -> Sequence[Vector]:
        scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.sleep(1.0)
        raise RowRejectedError("400")

    async with bench(ScriptedEmbedder(script=[leave_and_refuse])) as b:
        with trio.CancelScope() as scope:
            await b.batcher.embed_many(["a", "b"])
        await trio.sleep(2.0)
    assert b.sent() == [(0.0, 2)]


async def test_rows_that_could_not_be_answered_in_time_are_not_sent_again(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0, refuses=lambda text: text == "bad")
    async with bench(embedder, start_estimate_s=1.0) as b:
        b.batcher.expect(3)
        await b.submit("bad")
        await b.submit("hurried", deadline=1.5)
        await b.submit("good")
    assert isinstance(b.got["hurried"], DeadlineExceededError)
    assert isinstance(b.got["hurried"].__cause__, RowRejectedError)
    assert b.at["hurried"] == 1.0
    assert b.right("good")


async def test_a_half_that_meets_another_trouble_has_its_own_end(autojump_clock: MockClock) -> None:
    refusal = RowRejectedError("400")
    script = [
        refusal,  # four rows
        EmbedderUnavailableError("reset"),  # the first half
        EmbedderUnavailableError("reset"),  # the same once more
        refusal,  # the other half
        EmbedderBusyError("429", retry_after_s=1.0),  # its first row
    ]
    async with bench(ScriptedEmbedder(script=script)) as b:
        results = await b.batcher.embed_many(texts(4), return_errors=True)
    assert [type(result) for result in results[:2]] == [EmbedderUnavailableError] * 2
    assert results[2:] == [b.embedder.vector(text) for text in texts(4)[2:]]
    assert [len(call) for call in b.embedder.calls] == [4, 2, 2, 2, 1, 1, 1]
    assert b.embedder.began[-1] == pytest.approx(1.0)


async def test_a_half_that_everybody_leaves_is_cancelled_and_the_other_goes_on(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[RowRejectedError("400"), hang])) as b:
        b.batcher.expect(2)
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.ask, "leaves")
            await wait_all_tasks_blocked()
            await b.submit("stays")
            await trio.sleep(1.0)
            impatient.cancel_scope.cancel()
    assert b.embedder.cancelled == 1
    assert b.embedder.calls == [("leaves", "stays"), ("leaves",), ("stays",)]
    assert b.right("stays")


# ------------------------------------------------------------------------------------------------------- second chances


async def test_an_unreachable_server_is_tried_once_more(autojump_clock: MockClock) -> None:
    reset = EmbedderUnavailableError("connection reset")
    async with bench(ScriptedEmbedder(script=[reset, None, reset, reset])) as b:
        await b.submit("a")
        assert b.right("a")
        await b.submit("b")
        assert isinstance(b.got["b"], EmbedderUnavailableError)
    assert b.reasons() == ["idle", "retry"] * 2


async def test_rows_without_the_time_for_another_try_fail_with_the_error_at_hand(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0, script=[EmbedderUnavailableError("500")] * 2)
    async with bench(embedder, start_estimate_s=1.0) as b:
        b.batcher.expect(2)
        await b.submit("hurried", deadline=1.5)
        await b.submit("relaxed")
        await trio.sleep(5)
        assert isinstance(b.got["hurried"], EmbedderUnavailableError)
        assert b.at["hurried"] == 1.0
        assert b.at["relaxed"] == 2.0
        await b.submit("last", deadline=6.5)
    assert b.right("last")
    assert [len(call) for call in embedder.calls] == [2, 1, 1]


async def test_a_try_that_nobody_has_time_for_is_not_made(autojump_clock: MockClock) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0, script=[EmbedderUnavailableError("500")])
    async with bench(embedder, start_estimate_s=1.0) as b:
        await b.submit("hurried", deadline=1.5)
    assert isinstance(b.got["hurried"], EmbedderUnavailableError)
    assert len(embedder.calls) == 1


async def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(
    autojump_clock: MockClock,
) -> None:
    busy = EmbedderBusyError("429", retry_after_s=2.0)
    async with bench(ScriptedEmbedder(script=[busy])) as b:
        await b.submit("a", "b")
        await trio.sleep(0.5)
        await b.submit("c")
        assert b.batcher.statistics().queued_rows == 3
        assert b.batcher.statistics().paused_s == pytest.approx(1.5)
        assert b.batcher.statistics().oldest_age_s == pytest.approx(0.5)
    assert b.embedder.calls[1] == ("a", "b", "c")
    assert b.sent() == [(0.0, 1), (2.0, 3)] or b.sent() == [(0.0, 1), (0.0, 1), (2.0, 3)]
    assert b.right("a", "b", "c")


async def test_rows_that_cannot_wait_for_a_busy_server_fail_with_its_words(
    autojump_clock: MockClock,
) -> None:
    busy = EmbedderBusyError("429: slow down", retry_after_s=2.0)
    async with bench(ScriptedEmbedder(script=[busy])) as b:
        b.batcher.expect(2)
        await b.submit("hurried", deadline=2.05)
        await b.submit("relaxed", deadline=2.5)
        await wait_all_tasks_blocked()
        assert isinstance(b.got["hurried"], EmbedderBusyError)
        assert b.got["hurried"].retry_after_s == 2.0
        assert b.at["hurried"] == 0.0
    assert b.right("relaxed")


@pytest.mark.parametrize(
    "error", [EmbedderUnavailableError("reset"), RowRejectedError("400")], ids=["retry", "bisect"]
)
async def test_a_second_try_waits_too_while_another_call_was_asked_to_wait(
    autojump_clock: MockClock, error: Exception
) -> None:
    async def fail(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(0.3)
        raise error

    async def be_busy(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(0.2)
        raise EmbedderBusyError("429", retry_after_s=2.0)

    async with bench(
        ScriptedEmbedder(script=[fail, be_busy]), min_batch_rows=2, max_in_flight=2
    ) as b:
        b.batcher.expect(2)
        await b.submit("a", "b")
        b.batcher.expect(2)
        await b.submit("c", "d")
        await trio.sleep(5)
        assert b.right("a", "b", "c", "d")
        first, second, *later = [at for at, _ in b.sent()]
        assert (first, second) == (0.0, 0.0)
        assert min(later) == 2.2


async def test_rows_that_cannot_sit_out_a_pause_for_their_second_try_fail_at_once(
    autojump_clock: MockClock,
) -> None:
    async def fail(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(0.3)
        raise EmbedderUnavailableError("reset")

    async def be_busy(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(0.2)
        raise EmbedderBusyError("429", retry_after_s=2.0)

    async with bench(ScriptedEmbedder(script=[fail, be_busy]), max_in_flight=2) as b:
        await b.submit("a", deadline=trio.current_time() + 1.0)
        b.batcher.flush()
        await b.submit("b")
        b.batcher.flush()
        await trio.sleep(5)
        assert str(b.got["a"]) == "reset"
        assert b.at["a"] == pytest.approx(0.3)
        assert b.right("b")


async def test_a_server_that_stays_busy_without_a_word_is_asked_ever_more_seldom(
    autojump_clock: MockClock,
) -> None:
    busy = EmbedderBusyError("503")
    script = [busy, busy, busy, None, busy]
    async with bench(ScriptedEmbedder(script=script)) as b:
        await b.submit("a")
        await trio.sleep(1.0)
        assert b.right("a")
        await b.submit("b")
    assert [instant for instant, _ in b.sent()] == [0.0, 0.1, 0.3, 0.7, 1.0, 1.1]


async def test_no_pause_is_longer_than_the_patience_and_no_row_waits_longer(
    autojump_clock: MockClock,
) -> None:
    busy = EmbedderBusyError("429", retry_after_s=3600.0)
    async with bench(ScriptedEmbedder(script=[busy]), patience_s=10.0) as b:
        await b.submit("a")
        assert isinstance(b.got["a"], EmbedderBusyError)
        await b.submit("b", deadline=8.0)
        await b.submit("c")
    assert isinstance(b.got["b"], DeadlineUnreachableError)
    assert b.at["b"] == 0.0  # nothing will be sent before it is due
    assert b.at["c"] == 10.0
    assert b.right("c")


async def test_rows_that_are_in_the_queue_again_can_leave_it(autojump_clock: MockClock) -> None:
    busy = EmbedderBusyError("429", retry_after_s=2.0)
    async with bench(ScriptedEmbedder(script=[busy]), start_estimate_s=0.0) as b:
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.batcher.embed_many, texts(3))
            await wait_all_tasks_blocked()
            assert b.batcher.statistics().queued_rows == 3
            impatient.cancel_scope.cancel()
        assert b.batcher.statistics().queued_rows == 0
        await trio.sleep(3.0)
    assert b.sent() == [(0.0, 3)]


# ------------------------------------------------------------------------------------------ errors under cancellation


async def test_errors_beside_a_cancellation_are_told_and_end_nothing(
    autojump_clock: MockClock,
) -> None:
    async def fails_when_cancelled(texts: Sequence[str]) -> Sequence[Vector]:
        async def clean_up() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("the socket is gone")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_up)
            nursery.start_soon(trio.sleep_forever)
        raise AssertionError

    async def splits_when_cancelled(texts: Sequence[str]) -> Sequence[Vector]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)
        raise AssertionError

    script = [fails_when_cancelled, splits_when_cancelled]
    async with bench(ScriptedEmbedder(script=script)) as b:
        for _ in script:
            with trio.move_on_after(1.0):
                await b.batcher.embed("a")
        await b.submit("next")
    assert b.right("next")
    (failed,) = b.observer.of(CallFailed)
    assert isinstance(failed.error, ExceptionGroup)
    assert [str(error) for error in failed.error.exceptions] == ["the socket is gone"]
    assert len(b.observer.of(CallAbandoned)) == 1


async def test_an_error_in_place_of_a_cancellation_is_a_failed_call(
    autojump_clock: MockClock,
) -> None:
    async def hides_cancellation(texts: Sequence[str]) -> Sequence[Vector]:
        try:
            await trio.sleep_forever()
        finally:
            raise EmbedderUnavailableError("connection lost")

    async with bench(ScriptedEmbedder(script=[hides_cancellation])) as b:
        with trio.move_on_after(1.0):
            await b.batcher.embed("a")
        await b.submit("next")
    assert b.right("next")
    assert b.reasons() == ["idle", "idle"]
