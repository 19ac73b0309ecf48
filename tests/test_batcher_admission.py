"""What is refused at once, what expires, and what a cancelled caller leaves behind."""

from __future__ import annotations

import gc
from math import inf, nan

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import BatchPolicy
from stationmaster.batcher.callers import Single
from stationmaster.batcher.rows import RowQueue
from stationmaster.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    QueueFullError,
    RequestTooLargeError,
)
from stationmaster.events import CallAbandoned
from stationmaster.testing import ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import bench, texts

# -------------------------------------------------------------------------------------------------------------- bounds


async def test_a_full_queue_refuses_at_once_and_queues_nothing(autojump_clock: MockClock) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0),
        max_in_flight=1,
        max_batch_rows=4,
        max_queue_rows=10,
    ) as b:
        await b.submit("first", *texts(8))
        with pytest.raises(QueueFullError) as caught:
            await b.batcher.embed_many(texts(3, "many"))
        assert b.batcher.statistics().queued_rows == 8
        await b.submit(*texts(3, "late"))
        assert isinstance(b.got["late2"], QueueFullError)
        assert b.batcher.statistics().refused_rows == 4
    assert caught.value.capacity == 10
    assert b.right("first", *texts(8), "late0", "late1")


async def test_the_time_to_try_again_follows_from_what_calls_take(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1, max_batch_rows=4, max_queue_rows=8
    ) as b:
        for _ in range(8):
            await b.batcher.embed("measured")
        await b.submit("first", *texts(8))
        with pytest.raises(QueueFullError) as caught:
            await b.batcher.embed("x")
        assert caught.value.retry_after_s == pytest.approx(1.0)
        with pytest.raises(QueueFullError) as caught:
            await b.batcher.embed_many(texts(5))
        assert caught.value.retry_after_s == pytest.approx(2.0)


async def test_bytes_are_bounded_too(autojump_clock: MockClock) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0),
        max_in_flight=1,
        max_batch_bytes=8,
        max_queue_bytes=16,
    ) as b:
        await b.submit("first")
        await b.submit("ääää", "eeee")
        await b.submit("fffff")
        assert isinstance(b.got["fffff"], QueueFullError)
        await b.submit("gggg")
    assert b.right("ääää", "eeee", "gggg")
    assert b.embedder.calls[1:] == [("ääää",), ("eeee", "gggg")]


@pytest.mark.parametrize(
    "request_texts",
    [texts(11), ["x" * 9], ["xxxx", "x" * 9], ["xxxxxxx"] * 3],
    ids=["rows", "one text", "one text of two", "bytes together"],
)
async def test_what_can_never_fit_is_refused_for_good(
    autojump_clock: MockClock, request_texts: list[str]
) -> None:
    async with bench(
        max_batch_rows=10, max_queue_rows=10, max_batch_bytes=8, max_queue_bytes=20
    ) as b:
        with pytest.raises(RequestTooLargeError, match="can never fit"):
            await b.batcher.embed_many(request_texts)
        if len(request_texts) == 1:
            with pytest.raises(RequestTooLargeError, match="can never fit"):
                await b.batcher.embed(request_texts[0])
    assert b.sent() == []


async def test_a_queue_of_one_row_and_calls_of_one_row_work(autojump_clock: MockClock) -> None:
    async with bench(
        max_batch_rows=1, max_queue_rows=1, max_in_flight=1, max_wait_s=0.0, hard_timeout_s=0.0
    ) as b:
        await b.submit("a", "b", "c")
    assert b.right("a", "b", "c")


async def test_what_makes_no_sense_is_a_value_error(autojump_clock: MockClock) -> None:
    async with bench() as b:
        with pytest.raises(ValueError, match="empty text"):
            await b.batcher.embed("")
        with pytest.raises(ValueError, match="empty text"):
            await b.batcher.embed_many(["a", ""])
        with pytest.raises(ValueError, match="must not be NaN"):
            await b.batcher.embed("a", deadline=nan)
        for priority in (nan, inf, -1.0, 31.0):
            with pytest.raises(ValueError, match="priority must be between 0 and 30 s"):
                await b.batcher.embed("a", priority=priority)
    assert b.sent() == []


# ----------------------------------------------------------------------------------------------------------- deadlines


async def test_a_deadline_that_passed_is_refused_at_once(autojump_clock: MockClock) -> None:
    async with bench() as b:
        await trio.sleep(1.0)
        for deadline in (-inf, 0.5, 1.0):
            with pytest.raises(DeadlineExceededError, match="had passed"):
                await b.batcher.embed("a", deadline=deadline)
        assert b.batcher.statistics().refused_rows == 3
    assert b.sent() == []


async def test_a_caller_that_is_cancelled_already_is_told_so_and_not_refused(
    autojump_clock: MockClock,
) -> None:
    async with bench() as b:
        with trio.move_on_after(0) as scope:
            await b.batcher.embed("a", deadline=0.0)
        assert scope.cancelled_caught
    assert b.sent() == []


async def test_a_kept_deadline_strikes_within_ten_milliseconds_whatever_the_server_does(
    autojump_clock: MockClock,
) -> None:
    deadlines = {f"t{number}": 1.0 + number * 0.0037 for number in range(20)}
    async with bench(ScriptedEmbedder(script=[hang]), max_in_flight=1) as b:
        await b.submit("hangs", deadline=5.0)
        for text, deadline in deadlines.items():
            await b.submit(text, deadline=deadline)
    assert b.embedder.calls == [("hangs",)]
    for text, deadline in deadlines.items():
        assert isinstance(b.got[text], DeadlineExceededError)
        assert deadline <= b.at[text] <= deadline + 0.01 + 1e-9
    assert 5.0 <= b.at["hangs"] <= 5.01 + 1e-9
    assert b.batcher.statistics().expired_rows == 21
    assert b.embedder.cancelled == 1


async def test_the_callers_own_scope_strikes_exactly(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(script=[hang, hang])) as b:
        with trio.move_on_at(0.7) as scope:
            await b.batcher.embed("a")
        assert scope.cancelled_caught
        assert trio.current_time() == pytest.approx(0.7, abs=1e-9)
        # A kept deadline that is not nearer changes nothing.
        with trio.move_on_at(1.5) as scope:
            await b.batcher.embed("b", deadline=1.5)
        assert scope.cancelled_caught


async def test_a_deadline_that_calls_cannot_meet_is_refused_while_calls_are_in_flight(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0)) as b:
        for _ in range(7):
            await b.batcher.embed("measured")
        await b.submit("busy")
        with trio.move_on_after(0.5) as scope:
            await b.batcher.embed("seven calls tell nothing")
        assert scope.cancelled_caught
        await trio.sleep(2)

        await b.submit("busy again")
        before = trio.current_time()
        with trio.move_on_after(0.5):
            with pytest.raises(DeadlineUnreachableError, match="answered in 1 s at best"):
                await b.batcher.embed("a")
        with pytest.raises(DeadlineUnreachableError, match="the deadline is in"):
            await b.batcher.embed_many(["a", "b"], deadline=before + 0.5)
        assert trio.current_time() == before
        assert b.batcher.statistics().refused_rows == 3


async def test_an_idle_batcher_tries_so_that_a_server_that_became_quick_is_found_out(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0)
    async with bench(embedder) as b:
        for _ in range(8):
            await b.batcher.embed("measured")
        embedder.seconds_per_call = 0.01
        with trio.fail_after(0.5):
            await b.batcher.embed("a")


async def test_what_was_answered_before_the_deadline_is_kept_with_return_errors(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=2, max_in_flight=1
    ) as b:
        results = await b.batcher.embed_many(texts(5), deadline=2.5, return_errors=True)
        assert results[:4] == [b.embedder.vector(text) for text in texts(4)]
        assert isinstance(results[4], DeadlineExceededError)
        with pytest.raises(DeadlineExceededError):
            await b.batcher.embed_many(texts(5), deadline=4.0)


async def test_kept_deadlines_leave_nothing_behind(autojump_clock: MockClock) -> None:
    async with bench() as b:
        for _ in range(50):
            await b.batcher.embed("a", deadline=trio.current_time() + 60.0)
        assert b.batcher._dispatcher._expiries.next() == inf


# -------------------------------------------------------------------------------------------------------- cancellation


async def test_a_cancelled_caller_takes_its_row_back_and_harms_nobody(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1) as b:
        await b.submit("first")
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.ask, "queued")
            impatient.start_soon(b.batcher.embed_many, texts(3))
            await b.submit("stays")
            impatient.cancel_scope.cancel()
        assert b.batcher.statistics().queued_rows == 1
        assert b.batcher.statistics().queued_bytes == len("stays")
    assert b.embedder.calls == [("first",), ("stays",)]
    assert b.batcher.statistics().cancelled_rows == 4


async def test_a_caller_that_leaves_a_call_in_flight_harms_nobody(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0)) as b:
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.ask, "leaves")
            b.nursery.start_soon(b.ask, "stays")
            await wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()
    assert b.right("stays")
    assert b.embedder.cancelled == 0


async def test_the_last_caller_that_leaves_cancels_the_call(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(script=[hang])) as b:
        async with trio.open_nursery() as impatient:
            for text in texts(3):
                impatient.start_soon(b.ask, text)
            impatient.start_soon(b.batcher.embed_many, texts(3, "many"))
            await wait_all_tasks_blocked()
            assert b.sent() == [(0.0, 6)]
            assert b.batcher.statistics().rows_in_flight == 6
            await trio.sleep(1.0)
            impatient.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert b.embedder.in_flight == 0
        assert b.embedder.cancelled == 1
        (abandoned,) = b.observer.of(CallAbandoned)
        assert abandoned.rows == 6
        assert abandoned.seconds == pytest.approx(1.0)
        await b.submit("next")
    assert b.right("next")


async def test_a_bulk_that_leaves_is_withdrawn_from_the_queue_and_from_all_its_calls(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[hang, hang]), max_batch_rows=4, max_in_flight=2) as b:
        with trio.move_on_after(1.0):
            await b.batcher.embed_many(texts(11))
        assert b.batcher.statistics().queued_rows == 0
        await wait_all_tasks_blocked()
        assert b.embedder.cancelled == 2
        assert b.batcher.statistics().cancelled_rows == 11


async def test_a_server_counts_as_busy_for_the_usual_time_of_an_abandoned_call(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1) as b:
        for _ in range(8):
            await b.batcher.embed("measured")
        now = trio.current_time()
        with trio.move_on_after(0.25):
            await b.batcher.embed("abandoned")
        await b.submit("next")
    assert b.embedder.began[-2:] == pytest.approx([now, now + 1.0])


async def test_an_embedder_that_will_not_be_cancelled_answers_to_nobody(
    autojump_clock: MockClock,
) -> None:
    async def stubborn(texts: object) -> list[list[float]]:
        with trio.CancelScope(shield=True):
            await trio.sleep(1.0)
        return [[1.0]]

    async with bench(ScriptedEmbedder(script=[stubborn]), max_in_flight=1) as b:
        with trio.move_on_after(0.5):
            await b.batcher.embed("abandoned")
        await b.submit("next")
    assert b.right("next")
    assert b.sent()[1] == (1.0, 1)
    assert b.batcher.statistics().answered_rows == 1


async def test_a_crowd_that_comes_and_goes_does_not_fill_the_memory(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[hang]), max_in_flight=1) as b:
        await b.submit("hangs", deadline=10.0)
        for _ in range(50):
            async with trio.open_nursery() as impatient:
                for text in texts(20, "x" * 1000):
                    impatient.start_soon(b.ask, text)
                await wait_all_tasks_blocked()
                impatient.cancel_scope.cancel()
        assert len(b.batcher._queue._entries) <= 200
        assert b.batcher.statistics().queued_bytes == 0
        held = [entry for entry in gc.get_objects() if type(entry).__name__ == "Single"]
        assert sum(len(single.text) for single in held) < 1000


async def test_no_error_is_shared_between_callers_and_none_keeps_its_caller_alive(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[hang]), max_in_flight=1) as b:
        await b.submit(*texts(3), deadline=1.0)
    errors = [b.got[text] for text in texts(3)]
    assert len(set(map(id, errors))) == 3
    depth = {len(list(_frames(error))) for error in errors}
    assert len(depth) == 1


def _frames(error: BaseException) -> list[object]:
    frames: list[object] = []
    traceback = error.__traceback__
    while traceback:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames


async def test_the_queue_knows_its_oldest_and_most_urgent_rows() -> None:
    queue = RowQueue(BatchPolicy(), on_empty=lambda: None)
    assert queue.oldest == queue.earliest_due == inf
    task = trio.lowlevel.current_task()
    callers = [Single("text", task, queue) for _ in range(3)]
    for number, caller in enumerate(callers):
        queue.put(caller, float(number), 10.0 - number, 10.0 - number)
    assert (queue.oldest, queue.earliest_due) == (0.0, 8.0)
    for caller in (callers[2], callers[0]):
        caller(None)  # as trio does on cancellation
    assert (queue.earliest_due, queue.oldest) == (9.0, 1.0)
    assert (queue.rows, queue.size_bytes, queue.cancelled) == (1, 4, 2)
    await trio.lowlevel.checkpoint()


async def test_rows_that_need_no_care_are_bounded_in_rows_and_bytes_all_the_same() -> None:
    policy = BatchPolicy(max_batch_rows=2, max_queue_rows=8, max_batch_bytes=10, max_queue_bytes=40)
    queue = RowQueue(policy, on_empty=lambda: None)
    task = trio.lowlevel.current_task()
    queue.quicken(8)
    assert (queue.free, queue.fresh_bytes) == (8, 5)
    queue.fresh_since = 1.0
    queue.fresh.extend(Single("five.", task, queue) for _ in range(3))
    assert queue.rows == 3
    assert queue.size_bytes == 15
    assert queue.free == 5
    queue.put(Single("x" * 10, task, queue), 2.0, 3.0, 3.0)
    assert queue.free == 3  # of five bytes each
    assert [queue.take().texts for _ in range(3)] == [["x" * 10], ["five."] * 2, ["five."]]
    assert (queue.rows, queue.size_bytes, queue.oldest) == (0, 0, inf)
    await trio.lowlevel.checkpoint()


async def test_two_rows_that_do_not_fit_together_leave_one_by_one_though_more_wait() -> None:
    queue = RowQueue(BatchPolicy(max_batch_rows=2, max_batch_bytes=10), on_empty=lambda: None)
    task = trio.lowlevel.current_task()
    for number in range(3):
        arrived = float(number)
        queue.put(Single("six...", task, queue), arrived, arrived + 30.0, arrived + 30.0)
    assert [(queue.take().texts, queue.oldest) for _ in range(2)] == [
        (["six..."], 1.0),
        (["six..."], 2.0),
    ]
    await trio.lowlevel.checkpoint()
