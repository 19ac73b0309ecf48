"""Every task has a name: what `trio`'s tools and a crash report show of a pipeline says who is who."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.pipeline import open_pipeline
from stationmaster.settings import PipelineSettings
from stationmaster.testing import MemorySource, RecordingSink
from tests.pipelines import never
from tests.state.settings import Setting
from tests.telemetry import live_tasks, message_bytes

if TYPE_CHECKING:
    from trio.testing import MockClock

    from stationmaster.abc import Handler, Report
    from stationmaster.batch import Batch, StationInput, StationResult


async def never_for_all(batch: Batch, report: Report) -> None:
    await trio.sleep_forever()


async def on_result(station: StationInput, result: StationResult) -> None:
    await trio.lowlevel.checkpoint()


async def names_of(handler: Handler, *, ordered: bool = True) -> set[str]:
    """Return the names of the tasks that a pipeline with one open batch has."""
    before = set(live_tasks())
    source = MemorySource()
    source.put("air", 0, message_bytes("S1"))
    async with open_pipeline(
        source,
        handler=handler,
        sink=RecordingSink(),
        settings=PipelineSettings(grace_s=0.0, ordered=ordered),
        on_result=on_result,
    ):
        await wait_all_tasks_blocked()
        return set(live_tasks()) - before


COMMON = {"pipeline", "cancellation watch", "dead letters", "result hook", "batch air_0_0_0"}


async def test_the_tasks_of_a_pipeline_are_named() -> None:
    assert await names_of(never) == COMMON | {"station reaper", "station S1"}
    assert await names_of(never_for_all) == COMMON | {"lane air"}
    assert await names_of(never_for_all, ordered=False) == COMMON | {"batch handler air_0_0_0"}


async def test_the_tasks_of_an_outbox_are_named(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.seconds = 10.0
    before = set(live_tasks())
    async with setting.open():
        await trio.sleep(1)
        assert set(live_tasks()) - before == {"outbox replay", "outbox b1"}
