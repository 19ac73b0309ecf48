"""A look at the open batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from stationmaster.testing import Hang, RecordingSink
from tests.pipelines import Setting, never, one_second

if TYPE_CHECKING:
    from trio.testing import MockClock


async def test_the_nearest_deadlines_come_first_and_no_more_than_asked_for(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(5)
    async with setting.open(never, deadline_s=4.0) as pipeline:
        await trio.sleep(1)
        assert pipeline.open_batches(limit=0) == ()
        batches = pipeline.open_batches(limit=3)
        assert [batch.batch_id for batch in batches] == ["air_0_0_0", "air_0_1_0", "air_0_2_0"]
        assert {(batch.topic, batch.deadline - batch.opened) for batch in batches} == {("air", 4.0)}
        assert {(batch.answered, batch.expected) for batch in batches} == {(0, 1)}
        assert not any(batch.delivering for batch in batches)
        assert len(pipeline.open_batches(limit=100)) == 5


async def test_a_decided_batch_is_shown_as_delivering(autojump_clock: MockClock) -> None:
    setting = Setting(1, sink=RecordingSink([Hang()]))
    async with setting.open(one_second, deadline_s=4.0, grace_s=0.1) as pipeline:
        await trio.sleep(0.5)
        [batch] = pipeline.open_batches(limit=9)
        assert not batch.delivering
        await trio.sleep(1)
        [batch] = pipeline.open_batches(limit=9)
        assert batch.delivering
        pipeline.drain(grace_s=0)
