"""When batches leave, in virtual time."""

from __future__ import annotations

from functools import partial

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import BatchPolicy, open_batcher
from stationmaster.events import CallDone, CallStarted, RequestSubmitted
from stationmaster.testing import RecordingObserver, ScriptedEmbedder
from tests.batching import Bench, bench, texts

CLASSIC = BatchPolicy.seed_compat()


# ------------------------------------------------------------------------------------------------- the five classics


async def test_after_the_wait_the_row_that_completes_the_minimum_sends_at_once(
    autojump_clock: MockClock,
) -> None:
    async with bench(policy=CLASSIC) as b:
        await b.submit("a", "b", "c")
        await trio.sleep(0.08)
        await b.submit("d")
    assert b.sent() == [(0.08, 4)]
    assert b.reasons() == ["min"]


async def test_before_the_wait_is_over_the_minimum_alone_sends_nothing(
    autojump_clock: MockClock,
) -> None:
    async with bench(policy=CLASSIC) as b:
        await b.submit(*texts(6))
    assert b.sent() == [(0.05, 6)]
    assert b.reasons() == ["min"]


async def test_the_maximum_sends_at_once(autojump_clock: MockClock) -> None:
    async with bench(policy=CLASSIC) as b:
        await b.submit(*texts(16))
        assert b.sent() == [(0.0, 16)]
    assert b.reasons() == ["full"]


async def test_a_lone_request_leaves_at_the_hard_limit(autojump_clock: MockClock) -> None:
    async with bench(policy=CLASSIC) as b:
        await b.submit("lone")
    assert b.sent() == [(0.25, 1)]
    assert b.reasons() == ["hard"]
    assert b.right("lone")


async def test_the_hard_limit_counts_from_the_oldest_when_the_minimum_is_never_reached(
    autojump_clock: MockClock,
) -> None:
    async with bench(policy=CLASSIC) as b:
        for number in range(8):  # a trickle: three rows every 250 ms
            await b.submit(f"t{number}")
            await trio.sleep(0.1)
    assert b.sent() == [(0.25, 3), (0.55, 3), (0.85, 2)]
    assert b.reasons() == ["hard"] * 3


async def test_many_requests_with_the_hard_limit_all_leave_and_none_is_older_than_it(
    autojump_clock: MockClock,
) -> None:
    async with bench(policy=CLASSIC) as b:
        for burst in range(5):
            await b.submit(*texts(35, f"{burst}-"))
            await trio.sleep(0.4)
    assert b.right(*(text for burst in range(5) for text in texts(35, f"{burst}-")))
    assert [rows for _, rows in b.sent()] == [16, 16, 3] * 5
    assert b.reasons() == ["full", "full", "hard"] * 5
    assert max(event.oldest_age_s for event in b.observer.of(CallStarted)) == pytest.approx(0.25)


# -------------------------------------------------------------------------------------------------- the default policy


async def test_a_lone_request_leaves_at_once_when_nothing_is_in_flight(
    autojump_clock: MockClock,
) -> None:
    async with bench() as b:
        await b.submit("a")
        assert b.right("a")
    assert b.sent() == [(0.0, 1)]
    assert b.reasons() == ["idle"]


async def test_what_is_submitted_in_the_same_instant_travels_in_one_call(
    autojump_clock: MockClock,
) -> None:
    async with bench() as b:
        for text in texts(20):
            b.nursery.start_soon(b.ask, text)
    assert b.sent() == [(0.0, 20)]


async def test_while_a_call_is_in_flight_rows_are_gathered_for_a_little_while(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=0.1)) as b:
        await b.submit("first")
        await b.submit("a")
        await trio.sleep(0.003)
        await b.submit("b")
    assert b.sent() == [(0.0, 1), (0.005, 2)]
    assert b.reasons() == ["idle", "min"]


async def test_the_end_of_the_last_call_sends_what_was_gathered(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=0.1), max_wait_s=1, hard_timeout_s=1) as b:
        await b.submit("first", "a", "b")
    assert b.sent() == [(0.0, 1), (0.1, 2)]
    assert b.reasons() == ["idle", "idle"]


async def test_with_all_senders_busy_rows_keep_arriving_into_the_call_that_leaves_next(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1) as b:
        await b.submit("first")
        for number in range(5):
            await trio.sleep(0.1)
            await b.submit(f"t{number}")
    assert b.sent() == [(0.0, 1), (1.0, 5)]
    assert b.embedder.most_in_flight == 1


async def test_a_flood_uses_all_senders_and_no_more(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=0.1), max_in_flight=3) as b:
        for text in texts(32 * 5):
            b.nursery.start_soon(b.ask, text)
    assert b.sent() == [(0.0, 32)] * 3 + [(0.1, 32)] * 2
    assert b.embedder.most_in_flight == 3
    assert b.right(*texts(32 * 5))


async def test_what_is_left_behind_by_a_full_call_keeps_its_age(autojump_clock: MockClock) -> None:
    async with bench(policy=attrs.evolve(CLASSIC, max_in_flight=1)) as b:
        await b.submit(*texts(15))
        await trio.sleep(0.04)
        for text in texts(6, "late"):
            b.nursery.start_soon(b.ask, text)
    assert b.sent() == [(0.04, 16), (0.09, 5)]


async def test_a_batch_leaves_in_time_for_its_earliest_deadline(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=0.08), policy=CLASSIC) as b:
        await b.submit("relaxed")
        await b.submit("urgent", deadline=0.2)
    # Nothing was measured yet: 0.1 s are believed, and 5 ms are the margin.
    assert b.sent() == [(0.095, 2)]
    assert b.reasons() == ["latest"]
    assert b.right("relaxed", "urgent")


async def test_the_ambient_deadline_counts_like_a_given_one(autojump_clock: MockClock) -> None:
    async with bench(policy=CLASSIC) as b:
        with trio.fail_at(0.2):
            await b.ask("a")
    assert b.sent() == [(0.095, 1)]
    assert b.right("a")


async def test_once_calls_were_measured_the_last_moment_follows_from_their_cost(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=0.02, seconds_per_text=0.001)
    async with bench(embedder, policy=CLASSIC) as b:
        for size in (1, 16, 4, 9, 2, 7, 12, 5, 3, 1):
            await b.batcher.embed_many(texts(size))
        now = trio.current_time()
        await b.submit("a", deadline=now + 0.1)
    began, rows = b.sent()[-1]
    assert rows == 1
    assert began - now == pytest.approx(0.1 - 0.021 - 0.005, abs=1e-6)
    assert b.at["a"] <= now + 0.1


async def test_urgent_rows_go_first_and_equal_ones_in_order(autojump_clock: MockClock) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1, max_batch_rows=2
    ) as b:
        await b.submit("first")
        await b.submit("a", "b", "c")
        await b.submit("urgent", deadline=20.0)
        await b.submit("favoured", priority=15.0)
    assert b.embedder.calls == [("first",), ("favoured", "urgent"), ("a", "b"), ("c",)]


async def test_a_head_start_cannot_starve_the_others(autojump_clock: MockClock) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1, max_batch_rows=1, patience_s=60.0
    ) as b:
        await b.submit("first", "patient")
        for number in range(12):
            await b.submit(f"favoured{number}", priority=5.0)
            await trio.sleep(1.0)
    assert b.embedder.calls.index(("patient",)) == 6


async def test_rows_that_arrive_at_the_very_instant_of_a_timer_travel_along(
    autojump_clock: MockClock,
) -> None:
    for _ in range(20):  # trio shuffles the tasks of one instant
        start = trio.current_time()
        async with bench(policy=CLASSIC) as b:
            b.nursery.start_soon(b.ask, "oldest")
            for text in texts(2):
                b.nursery.start_soon(_ask_at, start + 0.25, b, text)
        assert [len(call) for call in b.embedder.calls] == [3]


async def _ask_at(instant: float, b: Bench, text: str) -> None:
    await trio.sleep_until(instant)
    await b.ask(text)


async def test_when_the_oldest_leaves_the_age_is_that_of_the_next(
    autojump_clock: MockClock,
) -> None:
    async with bench(policy=CLASSIC) as b:
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.ask, "oldest")
            await trio.sleep(0.1)
            await b.submit("next")
            impatient.cancel_scope.cancel()
    assert b.sent() == [(0.35, 1)]


async def test_below_the_minimum_again_a_batch_waits_for_the_hard_limit(
    autojump_clock: MockClock,
) -> None:
    async with bench(policy=CLASSIC) as b:
        await b.submit(*texts(3))
        async with trio.open_nursery() as impatient:
            impatient.start_soon(b.ask, "leaves")
            await trio.sleep(0.04)
            impatient.cancel_scope.cancel()
    assert b.sent() == [(0.25, 3)]
    assert b.reasons() == ["hard"]


async def test_a_summoned_sender_that_finds_everybody_gone_makes_no_call(
    autojump_clock: MockClock,
) -> None:
    async with bench() as b:
        with trio.CancelScope() as scope:
            scope.cancel()
            await b.batcher.embed("gone")
        await wait_all_tasks_blocked()
        await b.submit("a")
    assert b.embedder.calls == [("a",)]
    assert b.batcher.statistics().cancelled_rows == 1


# --------------------------------------------------------------------------------------------------- flush and expect


async def test_flush_sends_what_is_queued_and_holds_for_nothing_that_comes_later(
    autojump_clock: MockClock,
) -> None:
    async with bench(policy=CLASSIC) as b:
        await b.submit("a", "b")
        await trio.sleep(0.01)
        b.batcher.flush()
        await wait_all_tasks_blocked()
        await trio.sleep(0.01)
        await b.submit("c")
    assert b.sent() == [(0.01, 2), (0.27, 1)]
    assert b.reasons() == ["flush", "hard"]


async def test_flush_with_an_empty_queue_is_nothing(autojump_clock: MockClock) -> None:
    async with bench() as b:
        b.batcher.flush()
        await wait_all_tasks_blocked()
    assert b.sent() == []


async def test_announced_rows_travel_together_as_soon_as_they_are_all_here(
    autojump_clock: MockClock,
) -> None:
    async with bench(max_wait_s=1.0, hard_timeout_s=2.0) as b:
        b.batcher.expect(2)
        b.batcher.expect(1)
        await b.submit("a")
        await trio.sleep(0.5)
        await b.submit("b", "c")
        assert b.right("a", "b", "c")
    assert b.sent() == [(0.5, 3)]
    assert b.reasons() == ["expected"]


async def test_an_announcement_lapses(autojump_clock: MockClock) -> None:
    async with bench(max_wait_s=1.0, hard_timeout_s=2.0) as b:
        b.batcher.expect(3)
        await b.submit("a", "b")
        await trio.sleep(1.5)
        assert b.sent() == [(1.0, 2)]
        await b.submit("c")  # nothing is expected any more
    assert b.sent() == [(1.0, 2), (1.5, 1)]
    assert b.reasons() == ["idle", "idle"]


async def test_a_bulk_can_meet_an_announcement(autojump_clock: MockClock) -> None:
    async with bench(max_wait_s=1.0, hard_timeout_s=2.0) as b:
        b.batcher.expect(3)
        assert len(await b.batcher.embed_many(texts(5))) == 5
    assert b.sent() == [(0.0, 5)]
    with pytest.raises(ValueError, match="at least 1"):
        b.batcher.expect(0)


# --------------------------------------------------------------------------------------------------------- embed_many


async def test_many_texts_are_answered_in_order_though_they_travel_in_several_calls(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=0.1), max_batch_rows=4, max_in_flight=2
    ) as b:
        wanted = texts(11)
        vectors = await b.batcher.embed_many(wanted)
    assert vectors == [b.embedder.vector(text) for text in wanted]
    assert b.sent() == [(0.0, 4), (0.0, 4), (0.1, 3)]


async def test_many_texts_share_calls_with_others_and_bytes_count(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=0.1),
        max_batch_rows=10,
        max_in_flight=1,
        max_batch_bytes=10,
    ) as b:
        await b.submit("first")
        long = ["äää", "bbbb", "cc", "dddddddddd"]
        b.nursery.start_soon(b.batcher.embed_many, long)
        await wait_all_tasks_blocked()
        await b.submit("e")
    assert b.embedder.calls == [("first",), ("äää", "bbbb"), ("cc",), ("dddddddddd",), ("e",)]


async def test_many_texts_are_cut_by_rows_where_bytes_would_allow_more(
    autojump_clock: MockClock,
) -> None:
    async with bench(max_batch_rows=2, max_batch_bytes=10, max_in_flight=1) as b:
        await b.batcher.embed_many(["aaaa", "bbbb", "cccc", "dddd"])
    assert b.embedder.calls == [("aaaa", "bbbb"), ("cccc", "dddd")]


async def test_no_texts_need_no_call(autojump_clock: MockClock) -> None:
    async with bench() as b:
        with trio.testing.assert_checkpoints():
            assert await b.batcher.embed_many([]) == []
        with pytest.raises(TypeError, match="for one text there is embed"):
            await b.batcher.embed_many("text")
    assert b.sent() == []


# ------------------------------------------------------------------------------------------------------------- idling


class Steps(trio.abc.Instrument):
    """Counts the steps of tasks by name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # type: ignore[explicit-override]
        self.names.append(task.name)


@pytest.mark.parametrize("policy", [BatchPolicy(), CLASSIC], ids=["default", "classic"])
async def test_an_idle_batcher_wakes_nobody(autojump_clock: MockClock, policy: BatchPolicy) -> None:
    async with bench(policy=policy) as b:
        await b.submit("a", "b", deadline=1000.0)
        await trio.sleep(1.0)
        assert b.right("a", "b")
        await trio.sleep(1000)  # what a kept deadline or an old alarm left behind is over by then
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(24 * 3600)
        trio.lowlevel.remove_instrument(steps)
        assert not [name for name in steps.names if name.startswith("batcher")]


async def test_a_waiting_row_costs_no_wakeups_but_the_one_that_sends_it(
    autojump_clock: MockClock,
) -> None:
    async with bench(policy=CLASSIC) as b:
        await b.submit("a")
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(0.24)
        assert steps.names == [trio.lowlevel.current_task().name]
        await trio.sleep(0.02)
        trio.lowlevel.remove_instrument(steps)
    woken = [name for name in steps.names if name.startswith("batcher")]
    assert woken[0] == "batcher timekeeper"
    assert b.sent() == [(0.25, 1)]


# ------------------------------------------------------------------------------------------------------------- events


async def test_calls_are_always_told_and_requests_to_detailed_observers(
    autojump_clock: MockClock,
) -> None:
    for detailed in (True, False):
        observer = RecordingObserver(detailed=detailed)
        async with (
            open_batcher(ScriptedEmbedder(seconds_per_call=0.5), observer=observer) as batcher,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(batcher.embed, "a")
            await wait_all_tasks_blocked()
            nursery.start_soon(batcher.embed_many, ["b", "c"])
        first, second = observer.of(CallStarted)
        assert first == CallStarted(rows=1, reason="idle", oldest_age_s=0.0, queue_rows=0)
        assert (second.rows, second.reason, second.queue_rows) == (2, "min", 0)
        assert second.oldest_age_s == pytest.approx(0.005)
        assert [event.seconds for event in observer.of(CallDone)] == [pytest.approx(0.5)] * 2
        assert observer.of(RequestSubmitted) == (
            [RequestSubmitted(rows=1, queue_rows=1), RequestSubmitted(rows=2, queue_rows=2)]
            if detailed
            else []
        )


async def test_statistics_tell_what_is_queued_in_flight_and_done(autojump_clock: MockClock) -> None:
    async with bench(ScriptedEmbedder(seconds_per_call=1.0), max_in_flight=1) as b:
        await b.submit("first")
        await b.submit("äh", "b", "c")
        await trio.sleep(0.5)
        now = b.batcher.statistics()
        assert (now.queued_rows, now.queued_bytes) == (3, 5)
        assert now.oldest_age_s == pytest.approx(0.5)
        assert (now.calls_in_flight, now.rows_in_flight, now.answered_rows) == (1, 1, 0)
        assert now.call_estimate_s == 0.1
    done = b.batcher.statistics()
    assert done.answered_rows == 4
    assert done.calls == {"idle": 2}
    assert done.oldest_age_s == done.paused_s == 0.0


async def test_where_calls_are_quick_callers_with_and_without_care_are_served_alike(
    autojump_clock: MockClock,
) -> None:
    quick = ScriptedEmbedder(seconds_per_call=0.001)
    async with bench(quick, max_batch_rows=2, detailed=False) as b:
        for _ in range(20):
            await b.batcher.embed("measured")
        assert b.batcher._queue.free > 0
        for text in texts(100):
            b.nursery.start_soon(b.ask, text)
        for text in texts(20, "dated"):
            b.nursery.start_soon(partial(b.ask, text, deadline=trio.current_time() + 1.0))
        b.nursery.start_soon(b.batcher.embed_many, texts(20, "many"))
    assert b.right(*texts(100), *texts(20, "dated"))
    assert b.batcher.statistics().answered_rows == 160


async def test_an_observer_that_changes_its_mind_about_requests_is_heeded_from_the_next_call_on(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver(detailed=False)
    quick = ScriptedEmbedder(seconds_per_call=0.001)
    async with open_batcher(quick, observer=observer) as batcher:
        for _ in range(20):
            await batcher.embed("measured")
        assert batcher._queue.free > 0

        observer.detailed = True
        await batcher.embed("the call after which it is asked")
        await batcher.embed("told")
        await batcher.embed_many(["told", "too"])
        assert [event.rows for event in observer.of(RequestSubmitted)] == [1, 2]

        observer.detailed = False
        await batcher.embed("told, the last one")
        await batcher.embed_many(["not", "told"])
        await batcher.embed("nor this")
        assert [event.rows for event in observer.of(RequestSubmitted)] == [1, 2, 1]
        assert batcher._queue.free > 0
