"""The stations when batches close over them, and what ends them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.abc import NullObserver
from stationmaster.batch import Outcome
from stationmaster.events import LateResult
from stationmaster.stations import open_stations
from stationmaster.testing import RecordingObserver
from tests.telemetry import NOON, closed, opened, run, stations_of, submit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster.batch import StationInput

# ------------------------------------------------------------------------------------- cancelled when the batch closes


async def test_a_stuck_handler_is_cancelled_at_the_deadline_and_its_next_job_is_unharmed(
    autojump_clock: MockClock,
) -> None:
    ended: list[float] = []

    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.batch_id == "air_0_0_0":
            try:
                await trio.sleep_forever()
            finally:
                ended.append(trio.current_time())
        await trio.sleep(0.1)
        return {}

    async with stations_of(handle) as stations:
        stuck, following = opened("A"), opened("A", offset=1, deadline_s=6.0)
        stations.submit(stuck, "A")
        stations.submit(following, "A")
        assert (await closed(stuck))["A"].outcome is Outcome.TIMED_OUT
        assert (await closed(following))["A"].outcome is Outcome.SUCCEEDED
    assert ended == [5.0]
    assert trio.current_time() == pytest.approx(5.1)


@pytest.mark.parametrize("round_number", range(10))
async def test_a_cancel_in_the_tick_of_the_result_does_not_fall_on_the_next_job(
    autojump_clock: MockClock, round_number: int
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.batch_id == "air_0_0_0":
            await trio.sleep_until(station.deadline)
        await trio.lowlevel.checkpoint()
        await trio.sleep(0.1)
        return {}

    async with stations_of(handle) as stations:
        tie, following = opened("A"), opened("A", offset=1, deadline_s=6.0)
        stations.submit(tie, "A")
        stations.submit(following, "A")
        await closed(tie)
        assert (await closed(following))["A"].outcome is Outcome.SUCCEEDED


async def test_a_batch_that_closes_while_the_result_is_on_its_way_does_not_harm_the_next_one() -> (
    None
):
    answer = trio.Event()

    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.batch_id == "air_0_0_0":
            await answer.wait()
        else:
            await trio.lowlevel.checkpoint()
        return {}

    observer = RecordingObserver()
    async with stations_of(handle, observer=observer) as stations:
        first, following = opened("A", observer=observer), opened("A", offset=1)
        stations.submit(first, "A")
        stations.submit(following, "A")
        await wait_all_tasks_blocked()
        answer.set()  # the handler wakes in the next tick, its result is certain
        report = first.close(closed_at=NOON)  # and its cancel comes in the same one
        assert report.results[0].outcome is Outcome.TIMED_OUT
        assert (await closed(following))["A"].outcome is Outcome.SUCCEEDED
    assert len(observer.of(LateResult)) == 1


async def test_a_handler_that_shields_its_clean_up_delays_its_own_station_only(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.batch_id == "air_0_0_0" and station.station_id == "A":
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(2)
        await trio.sleep(0.1)
        return {}

    async with stations_of(handle) as stations:
        first = opened("A", "B")
        late, later = (
            opened("A", "B", offset=1, deadline_s=6.0),
            opened("A", offset=2, deadline_s=9.0),
        )
        for collector in (first, late):
            stations.submit(collector, "A")
            stations.submit(collector, "B")
        stations.submit(later, "A")
        assert (await closed(first))["A"].reason == "no answer when the deadline closed the batch"
        assert trio.current_time() == 5.0
        results = await closed(late)
        assert results["A"].reason == "not started when the deadline closed the batch"
        assert results["B"].outcome is Outcome.SUCCEEDED
        assert trio.current_time() == 6.0
        assert (await closed(later))["A"].outcome is Outcome.SUCCEEDED
        assert trio.current_time() == pytest.approx(7.1)


async def test_errors_of_a_clean_up_are_split_from_the_cancellation(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.batch_id == "air_0_0_0":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                try:
                    await trio.sleep_forever()
                finally:
                    raise ValueError("the connection would not close")
        return {}

    observer = RecordingObserver()
    async with stations_of(handle, observer=observer) as stations:
        results = await run(stations, "A", observer=observer)
        assert results["A"].outcome is Outcome.TIMED_OUT
        assert (await run(stations, "A", offset=1))["A"].outcome is Outcome.SUCCEEDED
        assert len(stations) == 1
    assert [event.batch_id for event in observer.of(LateResult)] == ["air_0_0_0"]


async def test_a_mixed_group_of_a_handler_that_is_not_cancelled_by_its_batch_fails_its_station() -> (
    None
):
    class Mixed(BaseExceptionGroup[Exception]):
        """A group that names itself a base group although it holds errors only."""

    async def handle(station: StationInput) -> None:
        raise Mixed("mixed", [ValueError("x")])

    async with stations_of(handle) as stations:
        assert (await run(stations, "A"))["A"].reason == "ValueError: x"


async def test_no_job_starts_once_its_deadline_has_come(autojump_clock: MockClock) -> None:
    started: list[str] = []

    async def handle(station: StationInput) -> None:
        started.append(station.batch_id)
        if station.batch_id == "air_0_0_0":
            autojump_clock.jump(5)  # the loop is blocked: nobody could close the other batch yet

    async with stations_of(handle) as stations:
        blocking, expired = opened("A", deadline_s=9.0), opened("A", offset=1)
        stations.submit(blocking, "A")
        stations.submit(expired, "A")
        await closed(blocking)
        results = await closed(expired)
    assert started == ["air_0_0_0"]
    assert results["A"].reason == "not started when the deadline closed the batch"


async def test_a_job_of_a_closed_batch_never_starts(autojump_clock: MockClock) -> None:
    started: list[str] = []

    async def handle(station: StationInput) -> None:
        started.append(station.batch_id)
        await trio.sleep(1)

    async with stations_of(handle) as stations:
        working, dropped, last = (opened("A", offset=offset) for offset in range(3))
        for collector in (working, dropped, last):
            stations.submit(collector, "A")
        await wait_all_tasks_blocked()
        dropped.drop()
        await closed(last)
    assert started == ["air_0_0_0", "air_0_2_0"]


# ---------------------------------------------------------------------------------------------- what ends the pipeline


class Sigint(BaseException):
    """As final as KeyboardInterrupt, without pytest taking it for itself."""


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (MemoryError(), MemoryError),
        (ExceptionGroup("", [MemoryError(), ValueError()]), MemoryError),
        (ExceptionGroup("", [ExceptionGroup("", [MemoryError()])]), MemoryError),
        (BaseExceptionGroup("", [MemoryError(), Sigint()]), MemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (Sigint(), Sigint),
        (BaseExceptionGroup("", [Sigint()]), Sigint),
        (BaseExceptionGroup("", [ValueError(), Sigint()]), Sigint),
    ],
)
async def test_lack_of_memory_and_whatever_is_no_exception_ends_everything(
    raised: BaseException, kind: type[BaseException]
) -> None:
    async def handle(station: StationInput) -> None:
        raise raised

    caught: BaseExceptionGroup | None = None
    try:
        async with stations_of(handle) as stations:
            await run(stations, "A")
    except BaseExceptionGroup as group:
        caught = group
    assert caught is not None
    assert caught.subgroup(kind) is not None


async def test_leaving_the_block_cancels_what_runs_and_waits_for_it() -> None:
    ended: list[str] = []

    async def handle(station: StationInput) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(station.station_id)

    async with stations_of(handle) as stations:
        collector = opened("A", "B")
        stations.submit(collector, "A")
        stations.submit(collector, "B")
        await wait_all_tasks_blocked()
    assert sorted(ended) == ["A", "B"]


async def test_an_observer_that_raises_ends_everything_and_fails_no_station() -> None:
    class Broken:
        detailed = True

        def observe(self, event: object, /) -> None:
            raise RuntimeError("the observer is broken")

    async def handle(station: StationInput) -> None:
        pass

    with pytest.RaisesGroup(
        pytest.RaisesExc(RuntimeError, match="the observer is broken"), flatten_subgroups=True
    ):
        async with stations_of(handle) as stations:
            await run(stations, "A", observer=Broken())


async def test_a_batch_that_is_handed_over_while_everything_stops_harms_nobody(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        return {}

    async with stations_of(handle) as stations:
        with trio.CancelScope(shield=True):
            collector = opened("A", "B")
            stations.submit(collector, "A")
            stations._nursery.cancel_scope.cancel()  # the end of the grace, between two slices
            await wait_all_tasks_blocked()
            stations.submit(collector, "A")
            await stations.hand_over(collector)
            assert collector.answered == 1
            collector.drop()


async def test_to_be_cancelled_is_no_crash_of_a_station(autojump_clock: MockClock) -> None:
    crashes: list[bool] = []

    async def handle(station: StationInput) -> None:
        await trio.sleep(100)

    with trio.move_on_after(1):
        async with open_stations(
            handle,
            queue_capacity=1,
            max_live=1,
            idle_s=600.0,
            result_bytes=100,
            on_eased=lambda: None,
            on_crash=lambda: crashes.append(True),
            observer=NullObserver(),
        ) as stations:
            submit(stations, "A")
            await trio.sleep_forever()
    assert trio.current_time() == 1.0
    assert not crashes
