"""Batch handlers: one call for all stations of a batch, in lanes, on a virtual clock."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import Outcome
from stationmaster.batch_handlers import BatchLanes, open_batch_lanes
from stationmaster.events import BatchHandlerTrouble, LateResult
from stationmaster.testing import RecordingObserver
from tests.telemetry import NOON, closed, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stationmaster.abc import BatchHandler, Report
    from stationmaster.batch import Batch, StationResult


@asynccontextmanager
async def lanes_of(
    handler: BatchHandler,
    *,
    ordered: bool = True,
    queue_capacity: int = 64,
    on_eased: Callable[[], None] = lambda: None,
    on_crash: Callable[[], None] = lambda: None,
    observer: RecordingObserver | None = None,
) -> AsyncIterator[BatchLanes]:
    async with open_batch_lanes(
        handler,
        ordered=ordered,
        queue_capacity=queue_capacity,
        result_bytes=10_000,
        on_eased=on_eased,
        on_crash=on_crash,
        observer=observer or RecordingObserver(),
    ) as lanes:
        yield lanes


async def run(lanes: BatchLanes, *station_ids: str, **settings: Any) -> dict[str, StationResult]:
    """Hand one new batch of these stations over, and wait for its end."""
    collector = opened(*station_ids, **settings)
    await lanes.hand_over(collector)
    return await closed(collector)


@Mapping.register
class Odd:
    """A mapping that cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def keys(self) -> object:
        raise self.error


def told(results: dict[str, StationResult]) -> dict[str, tuple[Outcome, str]]:
    return {name: (result.outcome, result.reason) for name, result in results.items()}


async def answer_all(batch: Batch, report: Report) -> None:
    """Answer at once."""
    for station_id, readings in batch.entries.items():
        report(station_id, {"readings": len(readings)})
    await trio.lowlevel.checkpoint()


# ---------------------------------------------------------------------------------------------------- what is reported


async def test_one_call_answers_for_all_stations_of_a_batch() -> None:
    async with lanes_of(answer_all) as lanes:
        results = await run(lanes, "S1", "S2")
    assert {name: result.value for name, result in results.items()} == {
        "S1": {"readings": 1},
        "S2": {"readings": 1},
    }
    assert results["S2"].encoded == b'{"stationId":"S2","readings":1}'


async def test_a_report_counts_at_once_and_not_when_the_call_returns(
    autojump_clock: MockClock,
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        report("S1", {})
        await trio.sleep(2)
        report("S2", {})

    async with lanes_of(handle) as lanes:
        collector = opened("S1", "S2", observer=(observer := RecordingObserver()))
        await lanes.hand_over(collector)
        await trio.sleep(1)
        assert [event.station_id for event in observer.events] == ["S1"]  # type: ignore[union-attr]
        await closed(collector)
        assert trio.current_time() == 2.0


async def test_every_kind_of_answer_is_the_outcome_of_its_own_station() -> None:
    answers: dict[str, Any] = {
        "mapping": {"x": float("nan")},
        "none": None,
        "error": ValueError("no such turbine"),
        "number": 7,
        "no-json": {"x": object()},
        "odd": Odd(RuntimeError("no keys")),
        "large": {"x": "x" * 10_000_000},
    }

    async def handle(batch: Batch, report: Report) -> None:
        for station_id, answer in answers.items():
            report(station_id, answer)
        await trio.lowlevel.checkpoint()

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        results = await run(lanes, *answers)
    assert results["mapping"].encoded == b'{"stationId":"mapping","x":null}'
    assert told(results) == {
        "mapping": (Outcome.SUCCEEDED, ""),
        "none": (Outcome.NO_OUTPUT, "the handler returned None"),
        "error": (Outcome.FAILED, "ValueError: no such turbine"),
        "number": (Outcome.FAILED, "the handler returned int, expected a mapping or None"),
        "no-json": (Outcome.FAILED, "TypeError: Type is not JSON serializable: object"),
        "odd": (Outcome.FAILED, "RuntimeError: no keys"),
        "large": (
            Outcome.FAILED,
            "the result has 10000028 bytes, limit 10000 (limits.result_bytes)",
        ),
    }
    assert not observer.events


async def test_a_station_that_is_never_reported_failed_when_the_call_returns() -> None:
    async def handle(batch: Batch, report: Report) -> None:
        report("S2", {})
        await trio.lowlevel.checkpoint()

    async with lanes_of(handle) as lanes:
        results = await run(lanes, "S1", "S2", "S3")
    assert told(results) == {
        "S1": (Outcome.FAILED, "the batch handler did not report it"),
        "S2": (Outcome.SUCCEEDED, ""),
        "S3": (Outcome.FAILED, "the batch handler did not report it"),
    }


async def test_results_that_are_returned_instead_of_reported_are_told_as_the_mistake() -> None:
    async def handle(batch: Batch, report: Report) -> Any:
        await trio.lowlevel.checkpoint()
        return {"S1": {}}

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        results = await run(lanes, "S1")
    reason = "TypeError: returned dict; results go through report()"
    assert told(results) == {"S1": (Outcome.FAILED, reason)}
    (trouble,) = observer.of(BatchHandlerTrouble)
    assert (trouble.batch_id, trouble.unreported) == ("air_0_0_0", 1)


async def test_an_error_of_the_call_fails_only_what_it_had_not_reported() -> None:
    async def handle(batch: Batch, report: Report) -> None:
        report("S1", {})
        await trio.lowlevel.checkpoint()
        if not batch.ranges[0].first:
            raise ConnectionError("the database went away")

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        results = await run(lanes, "S1", "S2")
        assert told(await run(lanes, "S1", offset=1))["S1"][0] is Outcome.SUCCEEDED
    assert told(results) == {
        "S1": (Outcome.SUCCEEDED, ""),
        "S2": (Outcome.FAILED, "ConnectionError: the database went away"),
    }
    assert [event.unreported for event in observer.of(BatchHandlerTrouble)] == [1]


async def test_an_error_after_the_last_report_harms_nobody_but_is_told() -> None:
    async def handle(batch: Batch, report: Report) -> None:
        report("S1", {})
        raise ValueError("afterthought")

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        assert (await run(lanes, "S1"))["S1"].outcome is Outcome.SUCCEEDED
    (trouble,) = observer.of(BatchHandlerTrouble)
    assert (str(trouble.error), trouble.unreported) == ("afterthought", 0)


@pytest.mark.parametrize(
    ("station_id", "complaint"),
    [
        ("S9", "this call for batch air_0_0_0 has no station 'S9'"),
        ("S1", "station S1 of air_0_0_0 was reported before"),
    ],
)
async def test_a_wrong_report_is_an_error_where_it_is_made(station_id: str, complaint: str) -> None:
    complaints = []

    async def handle(batch: Batch, report: Report) -> None:
        report("S1", {"first": True})
        try:
            report(station_id, {})
        except ValueError as error:
            complaints.append(str(error))
            raise
        await trio.lowlevel.checkpoint()

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        results = await run(lanes, "S1", "S2")
    assert complaints == [complaint]
    assert results["S1"].value == {"first": True}
    assert told(results)["S2"] == (Outcome.FAILED, f"ValueError: {complaint}")
    assert len(observer.of(BatchHandlerTrouble)) == 1


async def test_the_failures_of_a_huge_batch_are_settled_in_slices() -> None:
    async def handle(batch: Batch, report: Report) -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError

    counts: list[int] = []

    async def watch(observer: RecordingObserver) -> None:
        while len(counts) < 3 or counts[-1] < 1_000:
            counts.append(len(observer.events))
            await trio.lowlevel.checkpoint()

    async with lanes_of(handle) as lanes, trio.open_nursery() as nursery:
        observer = RecordingObserver()
        nursery.start_soon(watch, observer)
        await run(lanes, *(f"S{n}" for n in range(1_000)), observer=observer)
    assert max(later - earlier for earlier, later in pairwise(counts)) <= 128


# ------------------------------------------------------------------------------------------------------------ closing


async def test_the_deadline_cancels_the_call_and_what_it_had_reported_stands(
    autojump_clock: MockClock,
) -> None:
    deadlines = []

    async def handle(batch: Batch, report: Report) -> None:
        deadlines.append(trio.current_effective_deadline())
        report("S1", {})
        await trio.sleep_forever()

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        results = await run(lanes, "S1", "S2", deadline_s=3)
        await wait_all_tasks_blocked()
        assert len(lanes) == 0
    assert deadlines == [3.0]
    assert told(results) == {
        "S1": (Outcome.SUCCEEDED, ""),
        "S2": (Outcome.TIMED_OUT, "no answer when the deadline closed the batch"),
    }
    assert not observer.of(BatchHandlerTrouble)


async def test_the_last_report_ends_the_call_so_that_the_lane_goes_on(
    autojump_clock: MockClock,
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        await answer_all(batch, report)
        await trio.sleep_forever()

    async with lanes_of(handle) as lanes:
        await run(lanes, "S1")
        await run(lanes, "S1")
        assert trio.current_time() == 0.0


async def test_a_report_after_the_closing_is_counted_and_dropped(
    autojump_clock: MockClock,
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(7)
        report("S1", {})
        report("S2", ValueError())

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        results = await run(lanes, "S1", "S2", "S3")
        await trio.sleep(3)
        assert len(lanes) == 0
    assert {result.outcome for result in results.values()} == {Outcome.TIMED_OUT}
    assert observer.events == [
        LateResult(batch_id="air_0_0_0", station_id="S1"),
        LateResult(batch_id="air_0_0_0", station_id="S2"),
    ]


async def test_a_task_that_outlives_the_call_cannot_report_any_more(
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as leaked:

        async def later(report: Report) -> None:
            await trio.sleep(1)
            report("S1", {})

        async def handle(batch: Batch, report: Report) -> None:
            leaked.start_soon(later, report)
            await trio.lowlevel.checkpoint()

        observer = RecordingObserver()
        async with lanes_of(handle, observer=observer) as lanes:
            results = await run(lanes, "S1")
            await trio.sleep(2)
    assert results["S1"].reason == "the batch handler did not report it"
    assert observer.events == [LateResult(batch_id="air_0_0_0", station_id="S1")]


async def test_a_report_in_the_tick_of_the_deadline_is_decided_by_the_collector(
    autojump_clock: MockClock,
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep_until(batch.deadline)
        report("S1", {})

    async with lanes_of(handle) as lanes:
        for _ in range(20):
            observer = RecordingObserver()
            collector = opened("S1", observer=observer)
            await lanes.hand_over(collector)
            results = await closed(collector)
            await wait_all_tasks_blocked()
            outcome = results["S1"].outcome
            assert outcome in {Outcome.SUCCEEDED, Outcome.TIMED_OUT}


@pytest.mark.parametrize("mixed", [False, True])
async def test_an_error_while_being_cancelled_is_told_and_the_lane_goes_on(
    autojump_clock: MockClock, mixed: bool
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        if batch.ranges[0].first:
            await answer_all(batch, report)
            return
        async with trio.open_nursery() as nursery:
            if mixed:
                nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("clean-up failed")

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        results = await run(lanes, "S1")
        assert results["S1"].outcome in {Outcome.TIMED_OUT, Outcome.FAILED}
        assert (await run(lanes, "S1", offset=1))["S1"].outcome is Outcome.SUCCEEDED
    (trouble,) = observer.of(BatchHandlerTrouble)
    assert isinstance(trouble.error, ExceptionGroup)


async def test_swallowing_the_cancellation_holds_up_nothing_but_the_lane_of_its_topic(
    autojump_clock: MockClock,
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        try:
            await trio.sleep_forever()
        except BaseException:  # noqa: BLE001 - the mistake
            pass
        with trio.CancelScope(shield=True):
            await trio.sleep(10)

    async with lanes_of(handle) as lanes:
        first = await run(lanes, "S1", offset=1)
        second = await run(lanes, "S1", offset=2)  # waits behind the first for all of its time
        assert trio.current_time() == 10.0
        await trio.sleep(5.5)
        assert len(lanes) == 0
        third = await run(lanes, "S1", offset=3)
    assert told(first)["S1"][1] == "no answer when the deadline closed the batch"
    assert told(second)["S1"][1] == "not started when the deadline closed the batch"
    assert told(third)["S1"][1] == "no answer when the deadline closed the batch"


async def test_what_the_handler_does_to_its_batch_is_its_own_affair() -> None:
    async def handle(batch: Batch, report: Report) -> None:
        batch.entries.clear()  # type: ignore[attr-defined]
        batch.last_message.clear()  # type: ignore[attr-defined]
        report("S1", {})
        report("S2", {})
        await trio.lowlevel.checkpoint()

    async with lanes_of(handle) as lanes:
        results = await run(lanes, "S1", "S2")
    assert [result.outcome for result in results.values()] == [Outcome.SUCCEEDED] * 2


# -------------------------------------------------------------------------------------------------------------- lanes


async def test_stations_that_join_an_open_batch_get_a_call_of_their_own() -> None:
    calls = []

    async def handle(batch: Batch, report: Report) -> None:
        calls.append((list(batch.entries), list(batch.last_message)))
        await answer_all(batch, report)

    async with lanes_of(handle) as lanes:
        collector = opened("S1", "S2", "S3")
        await lanes.hand_over(collector, ["S1", "S3"])
        await wait_all_tasks_blocked()
        await lanes.hand_over(collector, ["S2"])
        await lanes.hand_over(collector, [])
        await closed(collector)
    assert calls == [(["S1", "S3"], ["S1", "S3"]), (["S2"], ["S2"])]


async def test_stations_that_join_while_a_call_of_their_batch_waits_are_called_with_it(
    autojump_clock: MockClock,
) -> None:
    calls = []

    async def handle(batch: Batch, report: Report) -> None:
        calls.append((batch.batch_id, list(batch.entries)))
        await trio.sleep(1)
        await answer_all(batch, report)

    async with lanes_of(handle, queue_capacity=2) as lanes:
        first, second = opened("S1", "S2", "S3"), opened("S1", "S2", offset=1)
        await lanes.hand_over(first, ["S1"])
        await wait_all_tasks_blocked()
        await lanes.hand_over(second, ["S1"])
        await lanes.hand_over(first, ["S2"])
        await lanes.hand_over(second, ["S2"])  # the lane is full, but nothing of this is one more
        await lanes.hand_over(first, ["S3"])
        assert len(lanes) == 3
        results = {**await closed(second), **await closed(first)}
        await wait_all_tasks_blocked()
        assert len(lanes) == 0
    assert calls == [
        ("air_0_0_0", ["S1"]),
        ("air_0_1_0", ["S1", "S2"]),
        ("air_0_0_0", ["S2", "S3"]),
    ]
    assert {result.outcome for result in results.values()} == {Outcome.SUCCEEDED}


class Log:
    """A handler of one second that remembers when it was called for what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, float]] = []

    async def __call__(self, batch: Batch, report: Report) -> None:
        self.calls.append((batch.topic, batch.ranges[0].first, trio.current_time()))
        await trio.sleep(1)
        await answer_all(batch, report)


async def test_batches_of_a_topic_are_called_one_after_another_in_the_order_of_opening(
    autojump_clock: MockClock,
) -> None:
    log = Log()
    async with lanes_of(log) as lanes:
        collectors = [opened("S1", offset=n) for n in range(4)]
        for collector in collectors:
            await lanes.hand_over(collector)
        assert len(lanes) == 4
        for collector in collectors:
            await closed(collector)
    assert log.calls == [("air", n, float(n)) for n in range(4)]


async def test_topics_have_lanes_of_their_own(autojump_clock: MockClock) -> None:
    log = Log()
    async with lanes_of(log) as lanes:
        for topic in "air", "wind":
            collector = opened("S1")
            collector.batch = attrs.evolve(collector.batch, topic=topic)
            await lanes.hand_over(collector)
        await trio.sleep(0.5)
    assert log.calls == [("air", 0, 0.0), ("wind", 0, 0.0)]


async def test_without_order_all_open_batches_are_called_at_once(
    autojump_clock: MockClock,
) -> None:
    log = Log()
    async with lanes_of(log, ordered=False) as lanes:
        collectors = [opened("S1", offset=n) for n in range(3)]
        for collector in collectors:
            await lanes.hand_over(collector)
        assert len(lanes) == 3
        for collector in collectors:
            await closed(collector)
        assert trio.current_time() == 1.0
        assert lanes.expected_wait_s(["S1"], topic="air") == 0.0
        await wait_all_tasks_blocked()
        assert len(lanes) == 0
    assert sorted(log.calls) == [("air", n, 0.0) for n in range(3)]


async def test_what_waits_in_a_lane_behind_a_stuck_call_is_never_called_late(
    autojump_clock: MockClock,
) -> None:
    called = []

    async def handle(batch: Batch, report: Report) -> None:
        called.append(batch.ranges[0].first)
        await trio.sleep_forever()

    async with lanes_of(handle) as lanes:
        collectors = [
            opened("S1", offset=n, deadline_s=deadline_s) for n, deadline_s in enumerate((2, 2, 3))
        ]
        for collector in collectors:
            await lanes.hand_over(collector)
        results = [await closed(collector) for collector in collectors]
        assert trio.current_time() == 3.0
    assert called == [0, 2]  # the second's time was over with the first's
    reasons = [result["S1"].reason for result in results]
    assert reasons[1] == "not started when the deadline closed the batch"


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_full_lane_rejects_the_stations_of_a_batch(
    autojump_clock: MockClock, ordered: bool
) -> None:
    async with lanes_of(Log(), ordered=ordered, queue_capacity=1) as lanes:
        collectors = [opened("S1", "S2", offset=n) for n in range(3)]
        for collector in collectors:
            await lanes.hand_over(collector)
            await wait_all_tasks_blocked()
        results = [await closed(collector) for collector in collectors]
    rejected = [all(r.outcome is Outcome.REJECTED for r in each.values()) for each in results]
    assert rejected == ([False, False, True] if ordered else [False, True, True])
    assert results[2]["S1"].reason == (
        "1 calls of the batch handler run or wait (stations.queue_capacity)"
    )


async def test_a_batch_that_is_closed_while_it_is_rejected_is_left_alone() -> None:
    async with lanes_of(Log(), ordered=False, queue_capacity=1) as lanes:
        await lanes.hand_over(opened("S1"))
        observer = RecordingObserver()
        collector = opened(*(f"S{number}" for number in range(1_000)), observer=observer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lanes.hand_over, collector)
            while not observer.events:
                await trio.lowlevel.checkpoint()
            collector.drop()
    assert 64 <= len(observer.events) < 1_000


async def test_the_expected_wait_grows_with_the_lane_and_with_what_calls_take(
    autojump_clock: MockClock,
) -> None:
    eased: list[float] = []
    async with lanes_of(Log(), on_eased=lambda: eased.append(trio.current_time())) as lanes:
        assert lanes.expected_wait_s(["S1"], topic="air") == 0.0
        first = opened("S1")
        await lanes.hand_over(first)
        assert lanes.expected_wait_s(["S1"], topic="air") == float("inf")  # nobody knows yet
        await closed(first)
        await wait_all_tasks_blocked()
        assert eased == [1.0]
        assert lanes.expected_wait_s(["S1"], topic="air") == 0.0
        for number in range(3):
            await lanes.hand_over(opened("S1", offset=number))
        assert lanes.expected_wait_s(["S1"], topic="air") == 4.0
        assert lanes.expected_wait_s(["S1"], topic="wind") == 0.0


async def test_a_lane_whose_calls_are_cut_does_not_hold_up_what_is_opened(
    autojump_clock: MockClock,
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        if batch.ranges[0].first < 2:
            await trio.sleep_forever()
        await trio.sleep(1)
        await answer_all(batch, report)

    async with lanes_of(handle) as lanes:
        await run(lanes, "S1", offset=0)
        await lanes.hand_over(opened("S1", offset=1))
        await lanes.hand_over(opened("S1", offset=2))
        assert lanes.expected_wait_s(["S1"], topic="air") == 0.0  # not healthy: says nothing
        await trio.sleep(20)
        await run(lanes, "S1", offset=3)
        await wait_all_tasks_blocked()
        await lanes.hand_over(opened("S1", offset=4))
        assert lanes.expected_wait_s(["S1"], topic="air") == 2.0


# -------------------------------------------------------------------------------------------------------- fatal errors


class Weird(BaseException):
    """No Exception."""


def grouped(*errors: BaseException) -> BaseException:
    return BaseExceptionGroup("several", errors)


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (MemoryError(), [MemoryError]),
        (Weird(), [Weird]),
        (grouped(MemoryError(), ValueError()), [MemoryError, ValueError]),
        (grouped(MemoryError(), Weird()), [MemoryError, Weird]),
        (grouped(ValueError(), Weird()), [Weird]),
    ],
    ids=["memory", "weird", "memory-in-group", "memory-and-weird", "weird-in-group"],
)
async def test_what_is_no_outcome_ends_the_pipeline_and_says_so_before(
    error: BaseException, left: list[type[BaseException]]
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    crashes: list[bool] = []
    collector = opened("S1")
    with pytest.RaisesGroup(*left, flatten_subgroups=True):
        async with lanes_of(handle, on_crash=lambda: crashes.append(True)) as lanes:
            await lanes.hand_over(collector)
            await trio.sleep_forever()
    assert crashes == [True]
    assert not collector.done.is_set()  # no half answers


@pytest.mark.parametrize("error", [MemoryError(), ExceptionGroup("", [MemoryError()])])
async def test_lack_of_memory_is_no_answer_of_a_station(error: Exception) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        report("S1", error)

    with pytest.RaisesGroup(MemoryError, flatten_subgroups=True):
        async with lanes_of(handle) as lanes:
            await run(lanes, "S1")


async def test_lack_of_memory_while_a_result_is_encoded_ends_the_pipeline() -> None:
    async def handle(batch: Batch, report: Report) -> None:
        report("S1", cast("Any", Odd(MemoryError())))

    with pytest.RaisesGroup(MemoryError, flatten_subgroups=True):
        async with lanes_of(handle) as lanes:
            await run(lanes, "S1")


async def test_leaving_cancels_calls_and_is_no_crash(autojump_clock: MockClock) -> None:
    crashes: list[bool] = []
    async with lanes_of(Log(), on_crash=lambda: crashes.append(True)) as lanes:
        await lanes.hand_over(opened("S1"))
        await wait_all_tasks_blocked()
    assert trio.current_time() == 0.0
    assert not crashes


async def test_a_report_after_the_call_ended_is_late_although_its_batch_is_open(
    autojump_clock: MockClock,
) -> None:
    kept: list[Report] = []

    async def handle(batch: Batch, report: Report) -> None:
        if batch.batch_id == "air_0_0_0":
            kept.append(report)
            return
        await answer_all(batch, report)

    observer = RecordingObserver()
    async with lanes_of(handle, observer=observer) as lanes:
        collector = opened("S1", "S2")
        await lanes.hand_over(collector)
        await wait_all_tasks_blocked()
        assert not collector.closed
        kept[0]("S1", {})
        results = await closed(collector)
    assert [(event.batch_id, event.station_id) for event in observer.of(LateResult)] == [
        ("air_0_0_0", "S1")
    ]
    assert told(results)["S1"] == (Outcome.FAILED, "the batch handler did not report it")


async def test_who_was_not_reported_when_the_deadline_cut_the_call_has_timed_out_not_failed(
    autojump_clock: MockClock,
) -> None:
    async def handle(batch: Batch, report: Report) -> None:
        report("S1", {})
        await trio.sleep_forever()

    async with lanes_of(handle) as lanes:
        collector = opened("S1", "S2")
        await lanes.hand_over(collector)
        await trio.sleep(6)  # at a tie the call may be cut before anybody closes its batch
        results = {item.station_id: item for item in collector.close(closed_at=NOON).results}
    assert told(results) == {
        "S1": (Outcome.SUCCEEDED, ""),
        "S2": (Outcome.TIMED_OUT, "no answer when the deadline closed the batch"),
    }
