"""Partitions that leave while their batches are open: what is given up, what goes on, what is committed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.events import BatchClosed, BatchDropped, BatchOpened, BatchWithdrawn
from stationmaster.testing import Hang, RecordingSink
from tests.pipelines import Setting, never, one_second
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from stationmaster.batch import StationInput


def withdrawn(setting: Setting) -> list[str]:
    return [event.batch.batch_id for event in setting.observer.of(BatchWithdrawn)]


async def test_a_batch_of_a_lost_partition_is_given_up_and_its_slot_is_free_at_once(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1)
    async with setting.open(never, deadline_s=1000, idle_s=2000) as pipeline:
        await wait_all_tasks_blocked()
        setting.source.lose([("air", 0)])
        await wait_all_tasks_blocked()
        assert pipeline.statistics().in_flight == 0
    assert trio.current_time() == 0
    assert withdrawn(setting) == ["air_0_0_0"]
    assert (setting.sink.attempts, setting.committed, pipeline.dropped) == ([], 0, 0)
    assert not setting.observer.of(BatchClosed)
    assert not setting.observer.of(BatchDropped)


async def test_a_partition_that_comes_back_gives_its_records_again_and_each_is_uploaded_once(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(3)
    async with setting.open(one_second) as pipeline:
        await wait_all_tasks_blocked()
        setting.source.lose([("air", 0)])
        setting.source.assign([("air", 0)])
        setting.source.end()
        await pipeline.wait_finished()
    assert trio.current_time() == 1
    assert setting.sink.deliveries == {"air_0_0_0": 1, "air_0_1_0": 1, "air_0_2_0": 1}
    assert setting.committed == 3


async def test_an_upload_under_way_is_given_up_with_its_partition(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1, sink=RecordingSink([Hang()]))
    async with setting.open(one_second):
        await trio.sleep(2)
        assert len(setting.sink.attempts) == 1
        setting.source.lose([("air", 0)])
        await wait_all_tasks_blocked()
        assert withdrawn(setting) == ["air_0_0_0"]
    assert trio.current_time() == 2


async def test_a_batch_that_also_covers_a_partition_that_stays_goes_on_and_commits_that(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1)
    setting.source.put("air", 1, message_bytes("T"))
    async with setting.open(one_second, by="poll"):
        await wait_all_tasks_blocked()
        setting.source.lose([("air", 0)])
        await trio.sleep(2)
    assert len(setting.sink.reports) == 1
    assert setting.source.committed == {("air", 1): 1}
    assert not withdrawn(setting)


async def test_a_batch_is_given_up_when_the_last_of_its_partitions_has_left(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1)
    setting.source.put("air", 1, message_bytes("T"))
    async with setting.open(never, by="poll", deadline_s=1000, idle_s=2000):
        await wait_all_tasks_blocked()
        setting.source.lose([("air", 0)])
        await wait_all_tasks_blocked()
        assert not withdrawn(setting)
        setting.source.lose([("air", 1)])
        await wait_all_tasks_blocked()
        assert len(withdrawn(setting)) == 1
    assert trio.current_time() == 0


async def test_a_revoke_waits_for_its_batches_and_gives_up_what_is_late(
    autojump_clock: MockClock,
) -> None:
    async def slow_b(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(100 if station.station_id == "B" else 1)
        return {}

    setting = Setting(0)
    setting.source.drain_timeout_s = 3
    setting.source.put("air", 0, message_bytes("A"))
    setting.source.put("air", 0, message_bytes("B"))
    async with setting.open(slow_b):
        await wait_all_tasks_blocked()
        assert not await setting.source.revoke([("air", 0)])
        await wait_all_tasks_blocked()
        assert withdrawn(setting) == ["air_0_1_0"]
    assert trio.current_time() == 3
    assert setting.sink.deliveries == {"air_0_0_0": 1}
    assert setting.committed == 1


async def test_what_was_polled_from_a_lost_partition_and_not_opened_is_never_opened(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(5)
    setting.source.put("air", 1, message_bytes("T"))
    async with setting.open(one_second, max_in_flight=2):
        await wait_all_tasks_blocked()
        setting.source.lose([("air", 0)])
        await trio.sleep(5)
    opened = [event.batch.batch_id for event in setting.observer.of(BatchOpened)]
    assert opened == ["air_0_0_0", "air_0_1_0", "air_1_0_0"]
    assert setting.source.committed == {("air", 1): 1}


async def test_a_revoke_does_not_wait_for_what_was_polled_and_not_opened(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(0)
    for _ in range(50):
        setting.source.put("air", 0, message_bytes("A"))  # one station: one after the other
        setting.source.put("air", 1, message_bytes("B"))
    async with setting.open(one_second, deadline_s=3, idle_s=100):
        await trio.sleep(0.5)
        begun = len(setting.observer.of(BatchOpened))
        assert await setting.source.revoke([("air", 0)])
        assert trio.current_time() <= 3.5
        assert not withdrawn(setting)
        uploaded = setting.source.committed["air", 0]
        assert uploaded <= begun + 1
        setting.source.end()
        await trio.sleep(100)
        assert setting.source.committed == {("air", 0): uploaded, ("air", 1): 50}


async def test_what_was_given_back_at_a_revoke_comes_again_and_is_uploaded_once(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(0)
    for _ in range(20):
        setting.source.put("air", 0, message_bytes("A"))
    async with setting.open(one_second, deadline_s=3, idle_s=100) as pipeline:
        await trio.sleep(0.5)
        assert await setting.source.revoke([("air", 0)])
        setting.source.assign([("air", 0)])
        setting.source.end()
        await pipeline.wait_finished()
    assert setting.committed == 20
    assert set(setting.sink.deliveries.values()) == {1}
    assert len(setting.sink.deliveries) == 20
