"""The stations under load: hopeless jobs, breakers, time-outs of one job, many stations."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.abc import NullObserver
from stationmaster.batch import Outcome, StationInput, StationResult
from stationmaster.collector import Collector
from stationmaster.events import StationBreakerClosed, StationBreakerOpened
from stationmaster.testing import RecordingObserver
from tests.telemetry import batch, closed, live_tasks, opened, run, stations_of, submit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster.abc import StationHandler
    from stationmaster.stations import Stations


async def at_once(station: StationInput) -> None:
    await trio.lowlevel.checkpoint()


async def never(station: StationInput) -> None:
    await trio.sleep_forever()


class Switch:
    """A handler that hangs while it is told to, and takes `seconds` otherwise."""

    def __init__(self, *, hangs: bool = True, seconds: float = 0.1) -> None:
        self.hangs = hangs
        self.seconds = seconds
        self.started: list[float] = []

    async def __call__(self, station: StationInput) -> Mapping[str, Any]:
        self.started.append(trio.current_time())
        await trio.sleep(math.inf if self.hangs else self.seconds)
        return {}


# -------------------------------------------------------------------------------------------------------- hopeless jobs


async def every(
    interval_s: float, stations: Stations, *, batches: int, first: int = 0
) -> dict[int, StationResult]:
    """Open a batch of station A at regular intervals; return what became of it in each."""
    results: dict[int, StationResult] = {}

    async def wait(number: int, collector: Collector) -> None:
        results[number] = (await closed(collector))["A"]

    async with trio.open_nursery() as nursery:
        for number in range(first, first + batches):
            nursery.start_soon(wait, number, submit(stations, "A", offset=number))
            await trio.sleep(interval_s)
    return results


def hanging_once(seconds: float, *, at: int = 0) -> StationHandler:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(math.inf if station.batch_id == f"air_0_{at}_0" else seconds)
        return {}

    return handle


@pytest.mark.parametrize(
    ("seconds", "hung_at", "least"),
    [(0.01, 0, 99), (0.09, 0, 99), (0.1, 0, 97), (0.2, 0, 46), (0.1, 20, 97), (0.2, 20, 56)],
)
async def test_a_station_that_hung_once_works_on_even_if_its_jobs_fill_its_time(
    autojump_clock: MockClock, seconds: float, hung_at: int, least: int
) -> None:
    async with stations_of(hanging_once(seconds, at=hung_at), breaker_failures=3) as stations:
        results = await every(0.1, stations, batches=100)
    outcomes = Counter(result.outcome for result in results.values())
    assert results[hung_at].outcome is Outcome.TIMED_OUT
    assert outcomes[Outcome.SUCCEEDED] >= least


async def test_a_waiting_job_that_cannot_end_in_time_is_rejected_at_once_and_says_why(
    autojump_clock: MockClock,
) -> None:
    async with stations_of(hanging_once(2.0, at=1)) as stations:
        await run(stations, "A")
        hung = submit(stations, "A", offset=1)
        hopeless = submit(stations, "A", offset=2, deadline_s=6.9)
        in_time = submit(stations, "A", offset=3, deadline_s=7.1)
        await closed(hung)
        result = (await closed(hopeless))["A"]
        assert result.outcome is Outcome.REJECTED
        assert result.reason == "cannot end in time: 1.9 s are left, its jobs take 2 s"
        assert trio.current_time() == 7.0
        assert (await closed(in_time))["A"].outcome is Outcome.SUCCEEDED


async def test_a_job_that_finds_its_station_idle_is_tried_whatever_its_past_says(
    autojump_clock: MockClock,
) -> None:
    handler = Switch(hangs=False, seconds=4.0)
    async with stations_of(handler) as stations:
        await run(stations, "A")
        handler.seconds = 0.1
        result = (await run(stations, "A", offset=1, deadline_s=0.5))["A"]
        assert result.outcome is Outcome.SUCCEEDED


async def test_a_station_that_became_fast_again_is_believed_after_its_waiting_jobs_were_given_back(
    autojump_clock: MockClock,
) -> None:
    handler = Switch(hangs=False, seconds=3.0)
    async with stations_of(handler, breaker_failures=3) as stations:
        await run(stations, "A")
        handler.hangs = True
        await closed(submit(stations, "A", offset=1))  # its mean is more than a deadline now
        await wait_all_tasks_blocked()
        handler.hangs, handler.seconds = False, 0.01
        results = await every(0.02, stations, batches=100, first=2)
    assert {result.outcome for result in results.values()} == {Outcome.SUCCEEDED}


@pytest.mark.parametrize(
    ("jobs_s", "strikes"),
    [
        ((2.5,), True),  # the next one has half of its batch's time, to the tick
        ((0.5, 3.2), False),  # 1.8 s: less than half of the time, less than twice the usual
    ],
)
async def test_a_job_that_waited_too_long_to_have_a_fair_chance_is_no_strike(
    autojump_clock: MockClock, jobs_s: tuple[float, ...], strikes: bool
) -> None:
    handler, observer = Switch(hangs=False), RecordingObserver()
    async with stations_of(handler, breaker_failures=1, observer=observer) as stations:
        await trio.sleep(64)
        for offset, handler.seconds in enumerate(jobs_s[:-1]):
            await run(stations, "A", offset=offset)
        handler.seconds = jobs_s[-1]
        submit(stations, "A", offset=7, deadline_s=20)
        hangs = submit(stations, "A", offset=8, deadline_s=5)
        await trio.sleep(1)
        handler.hangs = True
        await closed(hangs)
        await wait_all_tasks_blocked()
    assert len(handler.started) == len(jobs_s) + 1
    assert observer.of(StationBreakerOpened) == (
        [StationBreakerOpened(station_id="A", failures=1)] if strikes else []
    )


async def test_a_job_with_just_the_time_that_jobs_take_is_started(
    autojump_clock: MockClock,
) -> None:
    handler = Switch(hangs=False, seconds=2.0)
    async with stations_of(handler) as stations:
        await run(stations, "A")
        first = submit(stations, "A", offset=1)
        just = submit(stations, "A", offset=2, deadline_s=4.0)
        await closed(first)
        await closed(just)
    assert handler.started == [0.0, 2.0, 4.0]


async def test_hopeless_jobs_are_no_strikes(autojump_clock: MockClock) -> None:
    observer = RecordingObserver()
    async with stations_of(
        hanging_once(2.0, at=1), breaker_failures=2, observer=observer
    ) as stations:
        await run(stations, "A")
        hung = submit(stations, "A", offset=1)
        hopeless = [submit(stations, "A", offset=n, deadline_s=6.0) for n in (2, 3, 4)]
        await closed(hung)  # the first strike
        for collector in hopeless:
            assert (await closed(collector))["A"].outcome is Outcome.REJECTED
        await wait_all_tasks_blocked()
        assert (await run(stations, "A", offset=5))["A"].outcome is Outcome.SUCCEEDED
    assert observer.events == []


# --------------------------------------------------------------------------------------- stations that do not answer


async def test_after_so_many_time_outs_in_a_row_a_station_is_rejected_at_once(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver()
    async with stations_of(never, breaker_failures=3, observer=observer) as stations:
        for number in range(3):
            result = (await run(stations, "A", offset=number))["A"]
            assert result.outcome is Outcome.TIMED_OUT
        await wait_all_tasks_blocked()
        assert observer.events == [StationBreakerOpened(station_id="A", failures=3)]
        result = (await run(stations, "A", offset=3))["A"]
        assert trio.current_time() == 15.0
        assert result.outcome is Outcome.REJECTED
        assert (
            result.reason
            == "timed out too often, tried again every 10 s (stations.breaker_failures)"
        )


async def test_while_its_breaker_is_open_one_job_tries_a_station_every_so_often(
    autojump_clock: MockClock,
) -> None:
    handler = Switch()
    async with stations_of(handler, breaker_failures=1, breaker_probe_s=10.0) as stations:
        await every(1.0, stations, batches=50)
    assert handler.started == [0.0, 15.0, 30.0, 45.0]  # 5 s each, and 10 s between


async def test_a_station_that_makes_room_is_told_with_its_open_breaker(
    autojump_clock: MockClock,
) -> None:
    handler, observer = Switch(), RecordingObserver()
    async with stations_of(handler, max_live=1, breaker_failures=1, observer=observer) as stations:
        await trio.sleep(64)
        await run(stations, "A")
        await trio.sleep(3)
        handler.hangs = False
        await run(stations, "B")
    assert observer.of(StationBreakerClosed) == [
        StationBreakerClosed(station_id="A", open_s=3.0, given_up=True)
    ]


async def test_the_first_answer_closes_the_breaker(autojump_clock: MockClock) -> None:
    handler, observer = Switch(), RecordingObserver()
    async with stations_of(handler, breaker_failures=2, observer=observer) as stations:
        await every(1.0, stations, batches=12)
        await trio.sleep(20)
        handler.hangs = False
        observer.events.clear()
        probe, beside = submit(stations, "A", offset=20), submit(stations, "A", offset=21)
        assert (await closed(beside))["A"].outcome is Outcome.REJECTED
        assert (await closed(probe))["A"].outcome is Outcome.SUCCEEDED
        [event] = observer.of(StationBreakerClosed)
        assert event.station_id == "A"
        assert event.open_s == pytest.approx(trio.current_time() - 10.0, abs=5.0)
        results = await every(0.5, stations, batches=4, first=22)
        assert {result.outcome for result in results.values()} == {Outcome.SUCCEEDED}


async def test_jobs_that_wait_when_the_breaker_opens_are_rejected_at_once(
    autojump_clock: MockClock,
) -> None:
    async with stations_of(never, breaker_failures=1) as stations:
        first = submit(stations, "A")
        waiting = [submit(stations, "A", offset=number, deadline_s=20) for number in (1, 2, 3)]
        await closed(first)
        for collector in waiting:
            assert (await closed(collector))["A"].outcome is Outcome.REJECTED
        assert trio.current_time() == 5.0


async def test_a_job_that_its_batch_gave_up_before_its_deadline_is_no_strike(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver()
    async with stations_of(never, breaker_failures=1, observer=observer) as stations:
        for number in range(5):
            collector = submit(stations, "A", offset=number)
            await trio.sleep(4.9)
            collector.drop()  # as a quorum would
            await wait_all_tasks_blocked()
    assert observer.events == []


async def test_a_probe_that_its_batch_gave_up_lets_the_next_job_be_the_probe(
    autojump_clock: MockClock,
) -> None:
    handler = Switch()
    async with stations_of(handler, breaker_failures=1) as stations:
        await run(stations, "A")
        await trio.sleep(10)
        probe = submit(stations, "A", offset=1)
        await trio.sleep(1)
        probe.drop()
        await wait_all_tasks_blocked()
        handler.hangs = False
        assert (await run(stations, "A", offset=2))["A"].outcome is Outcome.SUCCEEDED


async def test_a_probe_whose_batch_closes_before_it_starts_lets_the_next_job_be_the_probe(
    autojump_clock: MockClock,
) -> None:
    handler = Switch()
    async with stations_of(handler, breaker_failures=1) as stations:
        await run(stations, "A")
        await trio.sleep(10)
        handler.hangs = False
        submit(stations, "A", offset=1).drop()
        assert (await run(stations, "A", offset=2))["A"].outcome is Outcome.REJECTED
        await wait_all_tasks_blocked()
        assert (await run(stations, "A", offset=3))["A"].outcome is Outcome.SUCCEEDED
    assert len(handler.started) == 2


async def test_a_failing_helper_that_takes_the_probe_along_lets_the_next_job_be_the_probe(
    autojump_clock: MockClock,
) -> None:
    async def fail() -> None:
        raise ValueError("the helper fell")

    async def handle(station: StationInput) -> None:
        if station.batch_id == "air_0_1_0":
            station.nursery.start_soon(fail)
        if station.batch_id != "air_0_2_0":
            await trio.sleep_forever()

    async with stations_of(handle, breaker_failures=1) as stations:
        await run(stations, "A")
        await trio.sleep(10)
        assert (await run(stations, "A", offset=1))["A"].reason == "a helper task failed"
        await wait_all_tasks_blocked()
        assert (await run(stations, "A", offset=2))["A"].outcome is Outcome.NO_OUTPUT


async def test_a_probe_that_cannot_end_in_time_any_more_lets_the_next_job_be_the_probe(
    autojump_clock: MockClock,
) -> None:
    falls = trio.Event()
    probes: list[Collector] = []

    async def fail() -> None:
        await falls.wait()
        raise ValueError("the helper fell")

    async def send_probe() -> None:
        try:
            await trio.sleep_forever()
        finally:  # the station is between two nurseries: the probe has to wait
            probes.append(submit(stations, "A", offset=2, deadline_s=1.0))

    async def handle(station: StationInput) -> None:
        if station.batch_id == "air_0_0_0":
            station.nursery.start_soon(fail)
            station.nursery.start_soon(send_probe)
        await trio.sleep(math.inf if station.batch_id == "air_0_1_0" else 2.0)

    async with stations_of(handle, breaker_failures=1) as stations:
        await run(stations, "A")
        await run(stations, "A", offset=1)
        await trio.sleep(10)
        falls.set()
        await wait_all_tasks_blocked()
        assert (await closed(probes[0]))["A"].reason.startswith("cannot end in time: 1 s are left")
        assert (await run(stations, "A", offset=3))["A"].outcome is Outcome.NO_OUTPUT


async def test_without_breakers_a_stuck_station_is_tried_with_every_batch(
    autojump_clock: MockClock,
) -> None:
    async with stations_of(never, breaker_failures=0) as stations:
        for number in range(10):
            result = (await run(stations, "A", offset=number))["A"]
            assert result.outcome is Outcome.TIMED_OUT


async def test_a_failure_is_an_answer_and_no_strike(autojump_clock: MockClock) -> None:
    async def handle(station: StationInput) -> None:
        if station.batch_id in ("air_0_1_0", "air_0_3_0"):
            raise ValueError("no")
        await trio.sleep_forever()

    async with stations_of(handle, breaker_failures=2) as stations:
        outcomes = [(await run(stations, "A", offset=number))["A"].outcome for number in range(7)]
    timed_out, failed = Outcome.TIMED_OUT, Outcome.FAILED
    assert outcomes[:6] == [timed_out, failed, timed_out, failed, timed_out, timed_out]
    assert outcomes[6] is Outcome.REJECTED


async def test_a_station_given_up_with_an_open_breaker_is_forgotten_with_it(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver()
    async with stations_of(never, breaker_failures=1, idle_s=20, observer=observer) as stations:
        await run(stations, "A")
        await trio.sleep(40)
        assert len(stations) == 0
        assert (await run(stations, "A", offset=1))["A"].outcome is Outcome.TIMED_OUT
    [event] = observer.of(StationBreakerClosed)
    assert event.given_up


async def test_a_station_that_does_not_come_back_from_its_clean_up_is_rejected_at_once(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        if station.batch_id == "air_0_0_0":
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(60)

    async with stations_of(handle) as stations:
        await run(stations, "A")
        await trio.sleep(0.9)
        patient = submit(stations, "A", offset=1)  # a second may pass with cleaning up
        await trio.sleep(0.2)
        result = (await run(stations, "A", offset=2))["A"]
        assert trio.current_time() == pytest.approx(6.1)
        assert result.reason == "it does not come back from a job that was cancelled"
        assert result.outcome is Outcome.REJECTED
        assert (await closed(patient))["A"].outcome is Outcome.TIMED_OUT
        await trio.sleep_until(66)
        assert (await run(stations, "A", offset=3))["A"].outcome is Outcome.NO_OUTPUT


# ------------------------------------------------------------------------------------------------- time-outs of one job


async def test_a_job_is_cancelled_at_its_own_time_out_and_the_batch_goes_on(
    autojump_clock: MockClock,
) -> None:
    limits: list[float] = []

    async def handle(station: StationInput) -> None:
        limits.append(trio.current_effective_deadline())
        await trio.sleep(math.inf if station.station_id == "A" else 1)

    async with stations_of(handle, job_timeout_s=2.0) as stations:
        results = await run(stations, "A", "B")
        assert trio.current_time() == 2.0
        assert results["A"].outcome is Outcome.TIMED_OUT
        assert results["A"].reason == "no answer within 2 s (stations.job_timeout_s)"
        assert results["B"].outcome is Outcome.NO_OUTPUT
        await run(stations, "A", deadline_s=1.5)
    assert limits == [2.0, 2.0, 3.5]


async def test_a_job_time_out_is_a_strike_however_late_it_began(autojump_clock: MockClock) -> None:
    observer = RecordingObserver()
    async with stations_of(
        never, job_timeout_s=1.0, breaker_failures=3, observer=observer
    ) as stations:
        collectors = [submit(stations, "A", offset=number) for number in range(5)]
        results = [(await closed(collector))["A"] for collector in collectors]
        assert trio.current_time() == 3.0
    assert [result.outcome for result in results] == [Outcome.TIMED_OUT] * 3 + [
        Outcome.REJECTED
    ] * 2
    assert len(observer.of(StationBreakerOpened)) == 1


async def test_an_error_of_the_clean_up_at_a_jobs_own_time_out_does_not_hide_the_time_out(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("the connection would not close")

    async with stations_of(handle, job_timeout_s=1.0) as stations:
        assert (await run(stations, "A"))["A"].outcome is Outcome.TIMED_OUT


async def test_a_job_that_timed_out_before_its_batch_makes_no_quorum_smaller() -> None:
    collector = Collector(
        batch(*"ABCD"), opened=0.0, quorum=0.5, report_bytes=10**6, observer=NullObserver()
    )
    collector.settle(StationResult("A", Outcome.NO_OUTPUT))
    collector.settle(StationResult("B", Outcome.TIMED_OUT))
    collector.settle(StationResult("C", Outcome.TIMED_OUT))
    assert not collector.done.is_set()
    collector.settle(StationResult("D", Outcome.NO_OUTPUT))
    assert collector.done.is_set()


async def test_what_a_handler_returns_after_its_own_time_out_counts_while_the_batch_is_open(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
        return {}

    async with stations_of(handle, job_timeout_s=1.0, breaker_failures=1) as stations:
        assert (await run(stations, "A"))["A"].outcome is Outcome.SUCCEEDED
        assert (await run(stations, "A", offset=1))["A"].outcome is Outcome.SUCCEEDED


# -------------------------------------------------------------------------------------------------------- many stations


async def test_a_batch_is_handed_over_in_slices_to_the_stations_that_it_has_data_of(
    autojump_clock: MockClock,
) -> None:
    names = [f"S{number}" for number in range(1_000)]
    alive: list[int] = []

    async def watch() -> None:
        while True:
            alive.append(len(stations))
            await trio.lowlevel.checkpoint()

    async with stations_of(never) as stations, trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.lowlevel.checkpoint()
        collector = opened(*names)
        await stations.hand_over(collector)
        nursery.cancel_scope.cancel()
        steps = [later - earlier for earlier, later in pairwise(alive)]
        assert max(steps) <= 64  # who looks may miss one slice
        assert len(stations) == 1_000
        assert {result.outcome for result in (await closed(collector)).values()} == {
            Outcome.TIMED_OUT
        }


async def test_a_batch_that_closes_while_it_is_handed_over_gives_nobody_else_a_job() -> None:
    async with stations_of(never) as stations:
        collector = opened(*(f"S{number}" for number in range(1_000)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stations.hand_over, collector)
            while len(stations) < 100:
                await trio.lowlevel.checkpoint()
            collector.drop()
        assert len(stations) < 200


async def test_known_stations_are_made_before_they_have_data(autojump_clock: MockClock) -> None:
    names = [f"S{number}" for number in range(100)]
    async with stations_of(at_once, max_live=90, idle_s=100) as stations:
        await run(stations, "S3")
        await stations.create(names)
        assert len(stations) == 90
        assert stations.expected_wait_s(names, topic="air") == 0
        await stations.create(names)  # nothing to do
        assert len(stations) == 90
        await trio.sleep(60)
        assert (await run(stations, "S0"))["S0"].outcome is Outcome.NO_OUTPUT
        await trio.sleep(95)
        assert len(stations) == 1  # the others were idle for as long as any station may be
        await stations.create([])


def opened_unparsed(names: list[str]) -> Collector:
    """Open a batch of more stations than a message may hold."""
    collector = opened("S0")
    collector.batch = attrs.evolve(
        collector.batch,
        entries=dict.fromkeys(names, ({},)),
        last_message=dict.fromkeys(names, collector.batch.last_message["S0"]),
    )
    now = trio.current_time()
    return Collector(
        collector.batch, opened=now, quorum=1.0, report_bytes=10**9, observer=NullObserver()
    )


@pytest.mark.parametrize(
    "max_live",
    [400, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.once])],
    ids=lambda n: f"live-{n}",
)
async def test_more_stations_in_one_message_than_may_live_do_not_go_beyond_the_bound(
    autojump_clock: MockClock, max_live: int
) -> None:
    async def handle(station: StationInput) -> None:
        await trio.sleep(1)

    names = [f"S{number}" for number in range(max_live * 5 // 2)]
    async with stations_of(handle, max_live=max_live) as stations:
        collector = opened_unparsed(names)
        await stations.hand_over(collector)
        assert len(stations) == max_live
        results = await closed(collector)
        assert trio.current_time() == 1.0
        outcomes = Counter(result.outcome for result in results.values())
        assert outcomes == {Outcome.NO_OUTPUT: max_live, Outcome.REJECTED: max_live * 3 // 2}
        await wait_all_tasks_blocked()
        # The next ones find room: those that answered are idle.
        await stations.hand_over(collector := opened_unparsed(names[-max_live:]))
        assert {r.outcome for r in (await closed(collector)).values()} == {Outcome.NO_OUTPUT}
        assert len(stations) == max_live


@pytest.mark.parametrize(
    "max_live",
    [2_000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.once])],
    ids=lambda n: f"live-{n}",
)
async def test_five_times_more_stations_over_time_keep_to_the_bound_and_the_longest_idle_go(
    autojump_clock: MockClock, max_live: int
) -> None:
    each = max_live // 10
    async with stations_of(at_once, max_live=max_live) as stations:
        for offset in range(50):
            names = [f"S{number}" for number in range(each * offset, each * (offset + 1))]
            collector = opened(*names, "always", offset=offset)
            await stations.hand_over(collector)
            results = await closed(collector)
            assert all(result.outcome is Outcome.NO_OUTPUT for result in results.values())
            assert len(stations) <= max_live
            await trio.sleep(1)
        assert len(stations) == max_live
        alive = {name for name in live_tasks() if name.startswith("station ")}
    newest = range(4 * max_live + each, 5 * max_live)  # of the oldest batch one had to go
    assert alive > {"station reaper", "station always", *(f"station S{n}" for n in newest)}
    assert len(alive) == max_live + 1


async def test_every_station_stuck_at_once_costs_each_its_strikes_and_then_no_batch_any_time(
    autojump_clock: MockClock,
) -> None:
    names = [f"S{number}" for number in range(1_000)]
    handler, observer = Switch(seconds=0.1), RecordingObserver()
    async with stations_of(handler, breaker_failures=3, observer=observer) as stations:
        took: list[float] = []
        for offset in range(6):
            began = trio.current_time()
            await stations.hand_over(collector := opened(*names, offset=offset))
            await closed(collector)
            took.append(trio.current_time() - began)
        assert took == [5.0, 5.0, 5.0, 0.0, 0.0, 0.0]
        assert len(observer.of(StationBreakerOpened)) == 1_000
        handler.hangs = False
        await trio.sleep(10)
        await stations.hand_over(collector := opened(*names, offset=6))
        assert {r.outcome for r in (await closed(collector)).values()} == {Outcome.SUCCEEDED}
        assert len(observer.of(StationBreakerClosed)) == 1_000
