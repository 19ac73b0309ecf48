"""The pipeline when it is drained: what is delivered, what is dropped, what is committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import ClosedBy
from stationmaster.events import BatchClosed
from stationmaster.testing import Hang, RecordingSink
from tests.pipelines import Setting, never, one_second
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster.batch import StationInput

# ------------------------------------------------------------------------------------------------------------ deadline


@pytest.mark.parametrize(
    ("job_timeout_s", "grace_s", "told"),
    [
        (None, None, 5.0),
        (9.0, None, 5.0),
        (2.0, None, 2.0),
        (None, 3.0, 3.0),
        (2.0, 3.0, 2.0),
        (4.0, 3.0, 3.0),
    ],
)
async def test_a_handler_sees_its_batchs_deadline_and_trio_tells_when_it_has_to_end_itself(
    job_timeout_s: float | None, grace_s: float | None, told: float, autojump_clock: MockClock
) -> None:
    seen: list[tuple[float, float]] = []
    ended: list[float] = []

    ending = trio.Event()

    async def handle(station: StationInput) -> None:
        await ending.wait()
        seen.append((station.deadline, trio.current_effective_deadline()))
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time())

    setting = Setting(1)
    async with setting.open(handle, job_timeout_s=job_timeout_s) as pipeline:
        await wait_all_tasks_blocked()
        if grace_s is not None:
            pipeline.drain(grace_s=grace_s)
        else:
            setting.source.end()
        ending.set()
        await pipeline.wait_finished()
    assert seen == [(5.0, told)]
    assert ended == [told]


# --------------------------------------------------------------------------------------------------------------- drain


async def test_a_drain_stops_polling_and_delivers_what_is_open(autojump_clock: MockClock) -> None:
    setting = Setting(3)
    async with setting.open(one_second) as pipeline:
        await wait_all_tasks_blocked()
        pipeline.drain(grace_s=15)
        assert pipeline.statistics().draining
        setting.source.put("air", 0, message_bytes("too late"))
        await pipeline.wait_finished()
        assert trio.current_time() == 1
        assert pipeline.dropped == 0
    assert (setting.succeeded(), setting.committed) == (3, 3)


async def test_leaving_the_block_drains(autojump_clock: MockClock) -> None:
    setting = Setting(3)
    async with setting.open(one_second):
        await wait_all_tasks_blocked()
    assert trio.current_time() == 1
    assert (setting.succeeded(), setting.committed) == (3, 3)


async def test_what_is_open_when_the_grace_ends_is_dropped_uncommitted(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(3 if station.station_id == "S1" else 1)
        return {}

    setting = Setting(3)
    async with setting.open(handle) as pipeline:
        await wait_all_tasks_blocked()
        pipeline.drain(grace_s=2)
        await pipeline.wait_finished()
        assert trio.current_time() == 2
        assert pipeline.dropped == 1
    assert setting.dropped() == ["air_0_1_0"]
    assert set(setting.sink.reports) == {"air_0_0_0", "air_0_2_0"}
    assert setting.committed == 1  # offset 2 is uploaded, but 1 is not: it comes again


async def test_an_upload_under_way_when_the_grace_ends_is_dropped_uncommitted(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(2, sink=RecordingSink([Hang()]))
    async with setting.open(one_second) as pipeline:
        await wait_all_tasks_blocked()
        pipeline.drain(grace_s=4)
        await pipeline.wait_finished()
        assert trio.current_time() == 4
        assert pipeline.dropped == 1
    assert len(setting.dropped()) == len(setting.sink.reports) == 1
    assert setting.committed == (1 if setting.dropped() == ["air_0_1_0"] else 0)


async def test_a_drain_without_grace_stops_now(autojump_clock: MockClock) -> None:
    ended: list[str] = []

    async def handle(station: StationInput) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(station.station_id)

    setting = Setting(3)
    async with setting.open(handle) as pipeline:
        await wait_all_tasks_blocked()
        pipeline.drain(grace_s=0)
        await pipeline.wait_finished()
        assert sorted(ended) == ["S0", "S1", "S2"]
    assert trio.current_time() == 0
    assert sorted(setting.dropped()) == ["air_0_0_0", "air_0_1_0", "air_0_2_0"]
    assert (setting.sink.attempts, setting.committed) == ([], 0)


@pytest.mark.parametrize(("first", "second", "end"), [(4, 1, 2), (2, 9, 2)])
async def test_of_two_drains_the_earlier_end_counts(
    autojump_clock: MockClock, first: float, second: float, end: float
) -> None:
    setting = Setting(1)
    async with setting.open(never) as pipeline:
        await wait_all_tasks_blocked()
        pipeline.drain(grace_s=first)
        await trio.sleep(1)
        pipeline.drain(grace_s=second)
        await pipeline.wait_finished()
        assert trio.current_time() == end
    assert setting.dropped() == ["air_0_0_0"]


async def test_a_batch_whose_deadline_comes_within_the_grace_leaves_at_its_deadline(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1)
    async with setting.open(never) as pipeline:
        await trio.sleep(3)
        pipeline.drain(grace_s=15)
        await pipeline.wait_finished()
        assert trio.current_time() == 5
    assert setting.sink.reports["air_0_0_0"].closed_by is ClosedBy.DEADLINE
    assert setting.committed == 1


@pytest.mark.parametrize("grace_s", [15.0, 0.0])
async def test_a_drain_in_the_middle_of_a_fan_out_leaves_a_whole_batch_or_none(
    autojump_clock: MockClock, grace_s: float
) -> None:
    setting = Setting(0)
    setting.source.put("air", 0, message_bytes(*(f"S{number}" for number in range(1_000))))
    async with setting.open(one_second) as pipeline:
        while not pipeline.statistics().live_stations > 0:
            await trio.lowlevel.checkpoint()
        assert pipeline.statistics().live_stations < 1_000
        pipeline.drain(grace_s=grace_s)
        await pipeline.wait_finished()
    if grace_s:
        assert (setting.succeeded(), setting.committed, setting.dropped()) == (1_000, 1, [])
    else:
        assert (setting.sink.attempts, setting.committed) == ([], 0)
        assert setting.dropped() == ["air_0_0_0"]


@pytest.mark.parametrize("_round", range(10))
async def test_errors_of_handlers_that_the_end_of_the_grace_cancels_are_no_answers(
    autojump_clock: MockClock, _round: int
) -> None:
    async def handle(station: StationInput) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise ValueError("interrupted") from None

    class Eager(RecordingSink):
        """A sink that takes a report before its first checkpoint."""

        async def upload(self, report: Any, /) -> Any:  # type: ignore[explicit-override]
            self._keep(report)
            return await RecordingSink.upload(self, report)

    setting = Setting(2, sink=Eager())
    async with setting.open(handle) as pipeline:
        await wait_all_tasks_blocked()
        pipeline.drain(grace_s=1)
        await pipeline.wait_finished()
    assert not setting.sink.reports
    assert not setting.observer.of(BatchClosed)
    assert setting.committed == 0


async def test_what_was_polled_and_not_opened_comes_again(autojump_clock: MockClock) -> None:
    setting = Setting(10)
    async with setting.open(one_second, max_in_flight=4) as pipeline:
        await wait_all_tasks_blocked()
        pipeline.drain(grace_s=15)
        await pipeline.wait_finished()
    assert (setting.committed, len(setting.sink.reports)) == (4, 4)
