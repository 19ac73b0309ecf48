"""The lives of stations: queues, the bound on live ones, giving up idle ones, estimates."""

from __future__ import annotations

import gc
import math
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import Outcome, StationInput
from tests.telemetry import closed, live_tasks, opened, run, stations_of, submit

if TYPE_CHECKING:
    from collections.abc import Mapping


async def one_second(station: StationInput) -> Mapping[str, Any]:
    await trio.sleep(1)
    return {}


async def at_once(station: StationInput) -> None:
    await trio.lowlevel.checkpoint()


# --------------------------------------------------------------------------------------------------------------- queue


async def test_a_job_beyond_the_queue_is_rejected_at_once_and_the_others_are_served(
    autojump_clock: MockClock,
) -> None:
    async with stations_of(one_second, queue_capacity=2) as stations:
        collectors = [submit(stations, "A", offset=0)]
        await wait_all_tasks_blocked()  # the first one runs, two may wait
        collectors += [submit(stations, "A", offset=offset) for offset in (1, 2)]
        collectors.append(submit(stations, "A", "B", offset=3))
        results = [await closed(collector) for collector in collectors]
    assert [result["A"].outcome for result in results] == [
        Outcome.SUCCEEDED,
        Outcome.SUCCEEDED,
        Outcome.SUCCEEDED,
        Outcome.REJECTED,
    ]
    assert results[3]["A"].reason == "its queue of 2 jobs is full (stations.queue_capacity)"
    assert results[3]["B"].outcome is Outcome.SUCCEEDED


# --------------------------------------------------------------------------------------- the bound, and idle stations


async def test_beyond_max_live_the_longest_idle_station_makes_room(
    autojump_clock: MockClock,
) -> None:
    async with stations_of(at_once, max_live=2) as stations:
        for station_id in ("A", "B", "A", "C"):
            assert (await run(stations, station_id))[station_id].outcome is Outcome.NO_OUTPUT
            await trio.sleep(1)
        assert len(stations) == 2
        known = [
            name
            for name in live_tasks()
            if name.startswith("station ") and name != "station reaper"
        ]
        assert sorted(known) == ["station A", "station C"]


async def test_beyond_max_live_a_new_station_is_rejected_while_all_are_busy(
    autojump_clock: MockClock,
) -> None:
    async with stations_of(one_second, max_live=2) as stations:
        collector = submit(stations, "A", "B", "C")
        await wait_all_tasks_blocked()
        assert len(stations) == 2
        results = await closed(collector)
        assert results["C"].outcome is Outcome.REJECTED
        assert results["C"].reason == "2 stations are live and busy (stations.max_live)"
        assert results["A"].outcome is Outcome.SUCCEEDED


async def test_a_station_with_a_queued_job_does_not_make_room() -> None:
    async with stations_of(at_once, max_live=1) as stations:
        await run(stations, "A")
        results = await closed(submit(stations, "A", "B", offset=1))
        assert results["A"].outcome is Outcome.NO_OUTPUT
        assert results["B"].outcome is Outcome.REJECTED


async def test_an_idle_station_is_given_up_after_its_time_and_a_busy_one_never(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        await trio.sleep(100 if station.station_id == "busy" else 1)

    async with stations_of(handle, idle_s=10) as stations:
        busy = submit(stations, "busy", deadline_s=200)
        await run(stations, "idle", offset=1)
        await trio.sleep(8)
        assert len(stations) == 2
        await trio.sleep(7)  # at latest after one and a half times idle_s
        assert len(stations) == 1
        await trio.sleep(40)
        assert len(stations) == 1
        assert (await closed(busy))["busy"].outcome is Outcome.NO_OUTPUT
        await trio.sleep(15)
        assert len(stations) == 0


async def test_many_idle_stations_are_given_up_together(autojump_clock: MockClock) -> None:
    async with stations_of(at_once, idle_s=10) as stations:
        await run(stations, *(f"S{number}" for number in range(100)))
        await trio.sleep(5)
        await run(stations, "S50", offset=1)
        await trio.sleep(8)
        assert len(stations) == 1
        assert [name for name in live_tasks() if name.startswith("station S")] == ["station S50"]


async def test_a_job_right_after_giving_up_makes_a_new_station_and_order_holds(
    autojump_clock: MockClock,
) -> None:
    running: list[str] = []
    ran: list[str] = []

    async def handle(station: StationInput) -> None:
        assert not running
        running.append(station.batch_id)
        await trio.sleep(0.5)
        running.remove(station.batch_id)
        ran.append(station.batch_id)

    async with stations_of(handle, max_live=1) as stations:
        first = submit(stations, "A")
        await closed(first)
        await wait_all_tasks_blocked()
        await closed(submit(stations, "B", offset=1))  # pushes A out
        again = [submit(stations, "A", offset=offset) for offset in (2, 3)]  # pushes B out
        for collector in again:
            assert (await closed(collector))["A"].outcome is Outcome.NO_OUTPUT
    assert ran == ["air_0_0_0", "air_0_1_0", "air_0_2_0", "air_0_3_0"]


# ----------------------------------------------------------------------------------------------------------- estimates


async def test_a_station_that_rests_keeps_no_batch_alive(autojump_clock: MockClock) -> None:
    async def by_its_name(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep({"answers": 1, "times out": 10, "comes too late": 6}[station.station_id])
        return {}

    names = ("answers", "times out", "comes too late")
    async with stations_of(by_its_name) as stations:
        collector = submit(stations, *names)
        batch = weakref.ref(collector.batch)
        await closed(collector)
        await wait_all_tasks_blocked()
        del collector
        gc.collect()  # an error's traceback may go round in a circle
        assert batch() is None


async def test_an_unknown_or_idle_station_is_expected_to_answer_at_once() -> None:
    async with stations_of(at_once) as stations:
        assert stations.expected_wait_s([], topic="air") == 0
        assert stations.expected_wait_s(["A"], topic="air") == 0
        await run(stations, "A")
        assert stations.expected_wait_s(["A", "B"], topic="air") == 0


async def test_nothing_is_expected_of_a_station_that_works_on_its_first_job(
    autojump_clock: MockClock,
) -> None:
    eased: list[float] = []
    async with stations_of(
        one_second, on_eased=lambda: eased.append(trio.current_time())
    ) as stations:
        collector = submit(stations, "A")
        assert stations.expected_wait_s(["A"], topic="air") == math.inf
        await wait_all_tasks_blocked()
        assert stations.expected_wait_s(["A"], topic="air") == math.inf
        assert eased == []
        await closed(collector)
        assert eased == [1, 1]  # its service time is known, and it is idle
        assert stations.expected_wait_s(["A"], topic="air") == 0


async def test_the_expected_wait_is_the_queue_times_the_mean_service_time(
    autojump_clock: MockClock,
) -> None:
    async with stations_of(one_second) as stations:
        await run(stations, "A", "B", "C")
        queued = [submit(stations, "A", offset=offset) for offset in range(1, 4)]
        await wait_all_tasks_blocked()
        assert stations.expected_wait_s(["A"], topic="air") == 3  # two wait, one runs
        assert (
            stations.expected_wait_s(["A", "B"], topic="air") == 3
        )  # of an even number the longer one
        assert stations.expected_wait_s(["A", "B", "C"], topic="air") == 0
        await trio.sleep(1)
        await wait_all_tasks_blocked()
        assert stations.expected_wait_s(["A"], topic="air") == 2
        await closed(queued[-1])
        assert stations.expected_wait_s(["A"], topic="air") == 0


async def test_the_mean_service_time_follows_the_last_jobs(autojump_clock: MockClock) -> None:
    async def handle(station: StationInput) -> None:
        await trio.sleep(1 if station.batch_id == "air_0_0_0" else 2)

    async with stations_of(handle) as stations:
        await run(stations, "A")
        await run(stations, "A", offset=1)
        submit(stations, "A", offset=2)
        await wait_all_tasks_blocked()
        assert stations.expected_wait_s(["A"], topic="air") == pytest.approx(1.2)


async def test_a_station_that_was_cancelled_is_left_out_until_it_answers_again(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        await trio.sleep(100 if station.batch_id == "air_0_1_0" else 2)

    async with stations_of(handle) as stations:
        await run(stations, "A", "B")
        hung, behind = (
            submit(stations, "A", offset=1),
            submit(stations, "A", offset=2, deadline_s=9),
        )
        await wait_all_tasks_blocked()
        assert stations.expected_wait_s(["A"], topic="air") == 4
        assert (await closed(hung))["A"].outcome is Outcome.TIMED_OUT
        await wait_all_tasks_blocked()
        assert (
            stations.expected_wait_s(["A"], topic="air") == 0
        )  # nobody healthy is left to wait for
        assert stations.expected_wait_s(["A", "B"], topic="air") == 0
        assert (await closed(behind))["A"].outcome is Outcome.NO_OUTPUT
        submit(stations, "A", offset=3)
        await wait_all_tasks_blocked()
        assert stations.expected_wait_s(["A"], topic="air") == 2


async def test_an_estimate_looks_at_a_bounded_number_of_stations() -> None:
    looked_at = 0

    def ids() -> Any:
        nonlocal looked_at
        for looked_at in range(1, 10_001):
            yield f"S{looked_at}"

    async with stations_of(at_once) as stations:
        assert stations.expected_wait_s(ids(), topic="air") == 0
    assert looked_at == 64


async def test_what_its_first_job_took_is_known_whenever_that_was(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        await trio.sleep(2)

    async with stations_of(handle) as stations:
        await trio.sleep(100)
        await run(stations, "A")
        submit(stations, "A", offset=1)
        assert stations.expected_wait_s(["A"], topic="air") == 4


async def test_an_answer_beyond_its_own_limit_tells_how_long_the_job_took(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)

    async with stations_of(handle, job_timeout_s=2.0) as stations:
        await trio.sleep(100)
        assert (await run(stations, "A"))["A"].outcome is Outcome.NO_OUTPUT
        submit(stations, "A", offset=1)
        assert stations.expected_wait_s(["A"], topic="air") == 6


class Steps(trio.abc.Instrument):
    """Counts how often the task of this name had its turn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.taken = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # type: ignore[explicit-override]
        self.taken += task.name == self.name


async def test_a_hand_over_lets_others_run_between_slices_finer_ones_after_a_pause(
    autojump_clock: MockClock,
) -> None:
    names = [f"S{number}" for number in range(64)]
    steps, taken = Steps(trio.lowlevel.current_task().name), []
    trio.lowlevel.add_instrument(steps)
    async with stations_of(at_once) as stations:
        before = steps.taken
        await stations.create(names)
        assert steps.taken - before == 5  # 16 at a time, and one more
        for offset, pause_s in enumerate((1.0, 0.0, 0.009, 0.01)):
            await wait_all_tasks_blocked()
            await trio.sleep(pause_s)
            before = steps.taken
            await stations.hand_over(opened(*names, offset=offset))
            taken.append(steps.taken - before)
    trio.lowlevel.remove_instrument(steps)
    assert taken == [8, 1, 1, 8]


async def test_many_idle_stations_are_given_up_in_slices(autojump_clock: MockClock) -> None:
    steps = Steps("station reaper")
    trio.lowlevel.add_instrument(steps)
    async with stations_of(at_once, idle_s=10.0) as stations:
        await stations.create(f"S{number}" for number in range(100))
        before = steps.taken
        await trio.sleep(20)
        assert len(stations) == 0
        assert steps.taken - before >= 50  # two at a time
    trio.lowlevel.remove_instrument(steps)


async def test_one_cancel_scope_serves_job_after_job_and_is_renewed_after_a_cancel(
    autojump_clock: MockClock,
) -> None:
    scopes = []

    async def handle(station: StationInput) -> None:
        scopes.append(stations._live["A"]._scope)
        await trio.sleep(6 if station.batch_id == "air_0_2_0" else 1)

    async with stations_of(handle) as stations:
        for offset in range(5):
            await run(stations, "A", offset=offset)
    assert scopes[0] is scopes[1] is scopes[2]
    assert scopes[2] is not scopes[3]
    assert scopes[3] is scopes[4]
