"""The pipeline when it is cancelled from outside, or a part of it breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import Outcome
from stationmaster.batcher import open_batcher
from stationmaster.errors import SourceError, UploadFailedError
from stationmaster.events import BatchClosed, BatchHandlerTrouble, BatchOpened
from stationmaster.pipeline import open_pipeline
from stationmaster.testing import Hang, MemorySource, RecordingSink, ScriptedEmbedder, Slow
from tests.pipelines import Setting, never, one_second
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster.abc import Report
    from stationmaster.batch import Batch, Record, StationInput, StationResult

# -------------------------------------------------------------------------------------------- cancelled from outside


async def test_a_cancelled_pipeline_delivers_what_is_open_with_its_stations_still_at_work(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(3)
    with trio.move_on_after(0.3) as scope:
        await setting.run(one_second)
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(1)
    assert (setting.succeeded(), setting.committed) == (3, 3)


async def test_a_cancelled_pipeline_ends_with_its_grace_at_the_latest(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(2, sink=RecordingSink(otherwise=Hang()))
    with trio.move_on_after(3):
        await setting.run(one_second, grace_s=4)
    assert trio.current_time() == 7
    assert len(setting.dropped()) == 2
    assert setting.committed == 0


async def test_a_pipeline_that_is_cancelled_while_it_drains_keeps_the_earlier_end(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1)
    with trio.move_on_after(1):
        async with setting.open(never) as pipeline:
            await wait_all_tasks_blocked()
            pipeline.drain(grace_s=2)
            await pipeline.wait_finished()
    assert trio.current_time() == 2
    assert setting.dropped() == ["air_0_0_0"]


async def test_an_error_of_the_block_comes_out_as_itself_after_the_open_batches_are_delivered(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(3)
    error = LookupError("the caller's own")

    async def run() -> None:
        async with setting.open(one_second):
            await trio.sleep(0.5)
            raise error

    with pytest.raises(LookupError) as caught:
        await run()
    assert caught.value is error
    assert trio.current_time() == 1
    assert (setting.succeeded(), setting.committed) == (3, 3)


# ------------------------------------------------------------------------------------------------------------- crashes


async def test_when_the_source_crashes_the_open_batches_are_delivered_and_its_error_comes_out(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(3)
    error = OSError("the broker is gone")
    setting.source.fail(error)
    with pytest.raises(OSError, match="the broker is gone") as caught:
        await setting.run(one_second)
    assert caught.value is error
    assert trio.current_time() == 1
    assert (setting.succeeded(), setting.committed) == (3, 3)


async def test_a_drain_after_a_crash_of_the_source_still_has_its_end(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1, sink=RecordingSink([Hang()]))
    setting.source.fail(OSError("the broker is gone"))

    async def run() -> None:
        async with setting.open(one_second) as pipeline:
            await wait_all_tasks_blocked()
            pipeline.drain(grace_s=2)
            await pipeline.wait_finished()

    with pytest.raises(OSError, match="the broker is gone"):
        await run()
    assert trio.current_time() == 2
    assert setting.dropped() == ["air_0_0_0"]


async def test_an_upload_without_a_home_ends_the_pipeline_and_leaves_a_hole_in_the_commits(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(int(station.station_id[1:]) / 10)
        return {}

    setting = Setting(5, sink=RecordingSink([Slow(0), Hang()]))
    with pytest.raises(UploadFailedError) as caught:
        await setting.run(handle, upload_timeout_s=10)
    assert caught.value.batch_id == "air_0_1_0"
    assert trio.current_time() == pytest.approx(10.1)
    assert set(setting.sink.reports) == {f"air_0_{offset}_0" for offset in (0, 2, 3, 4)}
    assert setting.committed == 1
    assert setting.source.commits["air", 0] == [1]


async def test_batches_beside_one_without_a_home_are_still_delivered(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1, sink=RecordingSink([Hang()]))

    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(4 if station.station_id == "late" else 0)
        return {}

    async def put_late() -> None:
        await trio.sleep(9)
        setting.source.put("air", 1, message_bytes("late"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put_late)
        with pytest.raises(UploadFailedError):
            await setting.run(handle, upload_timeout_s=10)
    assert trio.current_time() == pytest.approx(13)
    assert setting.source.committed == {("air", 1): 1}


async def test_batches_beside_one_without_a_home_have_the_grace_and_no_longer(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1, sink=RecordingSink(otherwise=Hang()))

    async def put_late() -> None:
        await trio.sleep(9)
        setting.source.put("air", 1, message_bytes("late"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put_late)
        with pytest.raises(UploadFailedError):
            await setting.run(one_second, upload_timeout_s=10, grace_s=6)
    assert trio.current_time() == pytest.approx(17)  # the first one failed at 11
    assert setting.dropped() == ["air_1_0_0"]
    assert setting.source.committed == {}


async def test_a_source_that_breaks_in_the_tick_of_such_a_failure_does_not_prolong_the_end(
    autojump_clock: MockClock,
) -> None:
    class Breaking(MemorySource):
        polls = 0

        async def poll(self) -> list[Record]:  # type: ignore[explicit-override]
            self.polls += 1
            if self.polls > 1:
                raise SourceError(
                    "gone"
                )  # without a checkpoint: it does not hear that it was cancelled
            return await super().poll()

    setting = Setting(0, sink=RecordingSink(otherwise=Hang()))
    setting.source = Breaking()
    for station_id in ("A", "B"):
        setting.source.put("air", 0, message_bytes(station_id))
    with pytest.RaisesGroup(SourceError, UploadFailedError, flatten_subgroups=True):
        await setting.run(one_second, max_in_flight=1, upload_timeout_s=10, grace_s=6)
    assert trio.current_time() == pytest.approx(17)  # the first one failed at 11
    assert setting.dropped() == ["air_0_1_0"]


async def test_a_bug_of_the_sink_ends_the_pipeline_and_commits_nothing_of_its_batch(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(3, sink=RecordingSink([ZeroDivisionError()]))
    with pytest.raises(ZeroDivisionError):
        await setting.run(one_second)
    assert len(setting.sink.reports) == 2
    assert setting.committed <= 2


@pytest.mark.parametrize("at", [BatchOpened, BatchClosed])
async def test_a_bug_of_the_observer_ends_the_pipeline_and_commits_nothing_of_its_batch(
    autojump_clock: MockClock, at: type
) -> None:
    class Broken:
        detailed = True

        def observe(self, event: Any, /) -> None:
            if isinstance(event, at) and "air_0_1_0" in repr(event):
                raise RuntimeError("the observer is broken")

    setting = Setting(2)
    setting.source.end()
    with pytest.raises(RuntimeError, match="the observer is broken"):
        async with open_pipeline(
            setting.source, handler=one_second, sink=setting.sink, observer=Broken()
        ) as pipeline:
            await pipeline.wait_finished()
    assert set(setting.sink.reports) == {"air_0_0_0"}
    assert setting.committed == 1


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
async def test_lack_of_memory_and_an_interrupt_in_a_handler_end_the_pipeline(
    autojump_clock: MockClock, kind: type[BaseException]
) -> None:
    async def handle(station: StationInput) -> None:
        await trio.sleep(1)
        raise kind

    setting = Setting(1)
    with pytest.raises(kind):
        await setting.run(handle)
    assert trio.current_time() <= 15
    assert setting.sink.reports == {}
    assert setting.committed == 0


async def test_a_crash_of_one_station_uploads_no_batch_half(autojump_clock: MockClock) -> None:
    async def handle(station: StationInput) -> dict[str, int]:
        if station.station_id == "S2":
            raise MemoryError
        await trio.sleep(1)
        return {"x": 1}

    source, sink = MemorySource(), RecordingSink()
    source.put("air", 0, b'{"stationData": [{"stationId": "S1"}, {"stationId": "S2"}]}')
    with pytest.raises(MemoryError):
        async with open_pipeline(source, handler=handle, sink=sink) as pipeline:
            await pipeline.wait_finished()
    assert sink.attempts == []
    assert source.committed == {}
    assert pipeline.dropped == 1


async def test_a_crash_of_the_result_hook_uploads_no_batch_half(autojump_clock: MockClock) -> None:
    async def handle(station: StationInput) -> dict[str, int]:
        if station.station_id == "S2":
            await trio.sleep(1)
        return {"x": 1}

    async def on_result(station: StationInput, result: StationResult) -> None:
        raise MemoryError

    source, sink = MemorySource(), RecordingSink()
    source.put("air", 0, message_bytes("S1", "S2"))
    with pytest.raises(MemoryError):
        async with open_pipeline(
            source, handler=handle, sink=sink, on_result=on_result
        ) as pipeline:
            await pipeline.wait_finished()
    assert sink.attempts == []
    assert source.committed == {}
    assert pipeline.dropped == 1


async def test_a_crash_of_one_batch_call_uploads_no_batch_half(autojump_clock: MockClock) -> None:
    async def handle_batch(batch: Batch, report: Report) -> None:
        report("S1", {"x": 1})
        await trio.sleep(1 if batch.topic == "wind" else 2)
        raise MemoryError

    source, sink = MemorySource(), RecordingSink()
    for topic in ("air", "wind"):
        source.put(topic, 0, message_bytes("S1", "S2"))
    with pytest.raises(MemoryError):
        async with open_pipeline(source, handler=handle_batch, sink=sink) as pipeline:
            await pipeline.wait_finished()
    assert sink.attempts == []
    assert source.committed == {}
    assert pipeline.dropped == 2


async def test_cancelling_everything_around_still_lets_the_batcher_answer_what_is_open(
    autojump_clock: MockClock,
) -> None:
    source, sink = MemorySource(), RecordingSink()
    source.put("air", 0, b'{"stationData": [{"stationId": "S1"}, {"stationId": "S2"}]}')
    with trio.move_on_after(1) as around:
        async with open_batcher(ScriptedEmbedder(seconds_per_call=2)) as batcher:

            async def handle(station: StationInput) -> dict[str, int]:
                return {"dimensions": len(await batcher.embed(station.station_id))}

            async with open_pipeline(source, handler=handle, sink=sink) as pipeline:
                await pipeline.wait_finished()
    assert around.cancelled_caught
    (report,) = sink.reports.values()
    assert [result.outcome for result in report.results] == [Outcome.SUCCEEDED] * 2
    assert source.committed == {("air", 0): 1}


async def test_two_errors_come_out_together(autojump_clock: MockClock) -> None:
    setting = Setting(1)
    setting.source.fail(OSError("the broker is gone"))
    with pytest.RaisesGroup(OSError, ZeroDivisionError, flatten_subgroups=True):
        setting.sink.otherwise = ZeroDivisionError()
        await setting.run(one_second)


async def test_what_a_batch_call_raises_is_told(autojump_clock: MockClock) -> None:
    async def handle_batch(batch: Batch, report: Report) -> None:
        raise ValueError("no model")

    setting = Setting(1)
    setting.source.end()
    async with open_pipeline(
        setting.source, handler=handle_batch, sink=setting.sink, observer=setting.observer
    ) as pipeline:
        await pipeline.wait_finished()
    [trouble] = setting.observer.of(BatchHandlerTrouble)
    assert (trouble.batch_id, str(trouble.error)) == ("air_0_0_0", "no model")
