"""Other deadlines, quorums, priorities and rosters while a pipeline runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.errors import ConfigError
from stationmaster.events import BatchClosed, BatchOpened
from stationmaster.settings import PipelineSettings, TopicSettings
from tests.pipelines import Setting, never, one_second
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio.testing import MockClock

    from stationmaster.batch import StationInput

SETTINGS = PipelineSettings(deadline_s=5.0)


async def test_the_next_batch_has_the_new_deadline_and_an_open_one_keeps_its_own(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1)
    async with setting.open(never, deadline_s=5.0) as pipeline:
        began = trio.current_time()
        await trio.sleep(1)
        pipeline.reconfigure(attrs.evolve(SETTINGS, deadline_s=2.0))
        setting.source.put("air", 1, message_bytes("other"))
        setting.source.end()
        await pipeline.wait_finished()
    closed = setting.observer.of(BatchClosed)
    assert [round(each.report.duration_s, 6) for each in closed] == [2.0, 5.0]
    assert trio.current_time() - began == pytest.approx(5.0)


async def test_quorum_roster_and_topics_hold_from_the_next_batch_on(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.station_id == "slow":
            await trio.sleep_forever()
        return await one_second(station)

    setting = Setting(0)
    async with setting.open(handle, deadline_s=5.0) as pipeline:
        setting.source.put("air", 0, message_bytes("quick", "slow"))
        await setting.sink.accepted.wait_value(1)
        topics = {"air": TopicSettings(quorum=0.5, roster=("quick", "absent"))}
        pipeline.reconfigure(attrs.evolve(SETTINGS, topics=topics))
        setting.source.put("air", 0, message_bytes("quick", "slow"))
        await setting.sink.accepted.wait_value(2)
    first, second = setting.sink.reports.values()
    assert (first.closed_by, second.closed_by) == (ClosedBy.DEADLINE, ClosedBy.QUORUM)
    assert (first.counts[Outcome.MISSING], second.counts[Outcome.MISSING]) == (0, 1)


async def test_a_topic_of_new_high_priority_overtakes_what_is_polled_after_that(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(0)
    async with setting.open(one_second, deadline_s=5.0, max_in_flight=1) as pipeline:
        urgent = {"wind": TopicSettings(priority="high")}
        settings = attrs.evolve(SETTINGS, max_in_flight=1, topics=urgent)
        pipeline.reconfigure(settings)
        for number in range(3):
            setting.source.put("air", 0, message_bytes(f"a{number}"))
        setting.source.put("wind", 0, message_bytes("w"))
        setting.source.end()
        await pipeline.wait_finished()
    opened = [event.batch.topic for event in setting.observer.of(BatchOpened)]
    assert opened[0] == "wind" or opened[1] == "wind"
    assert opened.index("wind") < 3


async def test_settings_that_are_new_before_the_first_poll_hold(autojump_clock: MockClock) -> None:
    setting = Setting(1)
    async with setting.open(never, deadline_s=5.0) as pipeline:
        pipeline.reconfigure(attrs.evolve(SETTINGS, deadline_s=1.0))  # nothing runs yet
        setting.source.end()
        await pipeline.wait_finished()
    (closed,) = setting.observer.of(BatchClosed)
    assert closed.report.duration_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"max_in_flight": 8}, "max_in_flight"),
        ({"by": "poll"}, "by"),
        ({"topics": {"air": TopicSettings(by="poll")}}, "topics['air'].by"),
        ({"grace_s": 1.0, "deadline_s": 1.0}, "grace_s"),
    ],
)
async def test_what_cannot_change_is_refused_by_name_and_nothing_has_changed(
    autojump_clock: MockClock, changed: dict[str, Any], named: str
) -> None:
    setting = Setting(1)
    async with setting.open(never, deadline_s=5.0) as pipeline:
        with pytest.raises(ConfigError) as caught:
            pipeline.reconfigure(attrs.evolve(SETTINGS, **changed))
        setting.source.end()
        await pipeline.wait_finished()
    assert caught.value.faults == (f"{named}: cannot change while the pipeline runs",)
    (closed,) = setting.observer.of(BatchClosed)
    assert closed.report.duration_s == pytest.approx(5.0)
