"""All kinds of handlers through a whole pipeline: how they are told apart, and what each may count on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import Outcome
from stationmaster.errors import ConfigError
from stationmaster.pipeline import open_pipeline
from stationmaster.settings import PipelineSettings
from stationmaster.testing import MemorySource, RecordingObserver, RecordingSink
from stationmaster.workers import Kind, check_hook, kind_of, open_workers
from tests.pipelines import Setting
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from stationmaster.abc import Handler, Report, ResultHook
    from stationmaster.batch import Batch, StationInput, StationResult


async def station_kind(station: StationInput) -> Mapping[str, Any]:
    await trio.lowlevel.checkpoint()
    return {"readings": len(station.readings)}


def blocking_kind(station: StationInput) -> Mapping[str, Any]:
    return {"readings": len(station.readings)}


async def batch_kind(batch: Batch, report: Report) -> None:
    await trio.lowlevel.checkpoint()
    for station_id, readings in batch.entries.items():
        report(station_id, {"readings": len(readings)})


class Keeper:
    """Handlers as methods, and as an object that is called."""

    async def __call__(self, station: StationInput) -> None: ...

    async def handle(self, station: StationInput) -> None: ...

    def block(self, station: StationInput) -> None: ...

    async def handle_batch(self, batch: Batch, report: Report) -> None: ...


class Blocker:
    """A plain object that is called."""

    def __call__(self, station: StationInput) -> None: ...


class BatchKeeper:
    """An object that is called for a batch."""

    async def __call__(self, batch: Batch, report: Report) -> None: ...


async def with_options(station: StationInput, limit: int = 3, *, unit: str = "") -> None: ...


def all_optional(station: StationInput | None = None) -> None: ...


async def batch_with_options(batch: Batch, report: Report, limit: int = 3) -> None: ...


async def one_too_many(limit: int, station: StationInput) -> None: ...


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (station_kind, "station"),
        (blocking_kind, "blocking"),
        (batch_kind, "batch"),
        (Keeper(), "station"),
        (Keeper().handle, "station"),
        (Keeper().block, "blocking"),
        (Keeper().handle_batch, "batch"),
        (Blocker(), "blocking"),
        (BatchKeeper(), "batch"),
        (with_options, "station"),
        (all_optional, "blocking"),
        (batch_with_options, "batch"),
        (functools.partial(one_too_many, 3), "station"),
        (functools.partial(batch_with_options, limit=4), "batch"),
        pytest.param(decorated(station_kind), "station", id="decorated-station"),
        pytest.param(decorated(batch_kind), "batch", id="decorated-batch"),
        (lambda station: None, "blocking"),
        (print, None),
        (len, "blocking"),
    ],
)
def test_a_kind_shows_in_the_signature(handler: Any, kind: Kind | None) -> None:
    if kind is None:
        with pytest.raises(TypeError, match="any number of parameters"):
            kind_of(handler)
    else:
        assert kind_of(handler) == kind


def not_async_for_a_batch(batch: Batch, report: Report) -> None: ...


async def of_three(batch: Batch, report: Report, more: int) -> None: ...


async def of_none() -> None: ...


async def demanding(station: StationInput, *, unit: str) -> None: ...


async def anything(*stations: StationInput) -> None: ...


def generator(station: StationInput) -> Iterator[int]:
    yield 1


async def async_generator(station: StationInput) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (7, "int is no function"),
        (Keeper, "Keeper is no function"),
        (not_async_for_a_batch, "not_async_for_a_batch is a plain function"),
        (of_three, "of_three is a function of 3 parameters"),
        (of_none, "of_none is a function of 0 parameters"),
        (demanding, "demanding demands the keyword unit"),
        (anything, "anything takes any number of parameters"),
        (generator, "generator is a generator"),
        (async_generator, "async_generator is a generator"),
        (min, "min has no signature"),
    ],
)
def test_what_is_no_handler_is_refused_with_the_forms_there_are(wrong: Any, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        kind_of(wrong)
    assert str(caught.value).startswith(words)
    assert "expected `async def handle(station)`, `def handle(station)`" in str(caught.value)


async def of_a_number(station: StationInput) -> int:
    return 7


def test_the_type_checker_knows_the_kinds_too() -> None:
    # `mypy --strict` complains of an ignore that it does not need: these lines are its test.
    right: list[Handler] = [station_kind, blocking_kind, batch_kind, with_options]
    wrong: list[Handler] = [
        not_async_for_a_batch,  # type: ignore[list-item]
        of_three,  # type: ignore[list-item]
        of_none,  # type: ignore[list-item]
        of_a_number,  # type: ignore[list-item]
        generator,  # type: ignore[list-item]
        7,  # type: ignore[list-item]
    ]
    assert (len(right), len(wrong)) == (4, 6)


@pytest.mark.parametrize("wrong", [7, station_kind, blocking_kind, not_async_for_a_batch])
def test_a_hook_is_an_async_function_of_two(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"is no hook; expected `async def on_result"):
        check_hook(wrong)
    check_hook(cast("ResultHook", batch_kind))


@pytest.mark.parametrize("handler", [station_kind, blocking_kind, batch_kind])
@pytest.mark.parametrize("ordered", [True, False])
async def test_every_kind_gives_the_same_uploads(handler: Handler, ordered: bool) -> None:
    source, sink = MemorySource(), RecordingSink()
    for _ in range(3):
        source.put("air", 0, message_bytes("S1", "S2", "S1"))
    source.end()
    settings = PipelineSettings(ordered=ordered, threads=2)
    async with open_pipeline(source, handler=handler, sink=sink, settings=settings) as pipeline:
        await pipeline.wait_finished()
    assert source.committed == {("air", 0): 3}
    assert len(sink.reports) == 3
    for report in sink.reports.values():
        assert [result.value for result in report.results] == [{"readings": 2}, {"readings": 1}]


async def test_a_wrong_handler_or_hook_is_refused_before_anything_runs() -> None:
    source, sink = MemorySource(), RecordingSink()
    with pytest.raises(TypeError, match="is no function"):
        async with open_pipeline(source, handler=cast("Any", 7), sink=sink):
            pass
    with pytest.raises(TypeError, match="is no hook"):
        async with open_pipeline(
            source, handler=station_kind, sink=sink, on_result=cast("Any", station_kind)
        ) as pipeline:
            await pipeline.wait_finished()


async def slow_batch(batch: Batch, report: Report) -> None:
    for number, station_id in enumerate(batch.entries):
        await trio.sleep(number)
        report(station_id, {})


async def slow_station(station: StationInput) -> None:
    if station.station_id == "S3":
        await trio.sleep_forever()


@pytest.mark.parametrize("handler", [slow_batch, slow_station])
async def test_a_quorum_closes_a_batch_of_any_kind(
    handler: Handler, autojump_clock: MockClock
) -> None:
    setting = Setting(0)
    setting.source.put("air", 0, message_bytes("S1", "S2", "S3"))
    setting.source.end()
    async with open_pipeline(
        setting.source, handler=handler, sink=setting.sink, settings=PipelineSettings(quorum=0.6)
    ) as pipeline:
        await pipeline.wait_finished()
    (report,) = setting.sink.reports.values()
    assert report.closed_by.value == "quorum"
    assert [result.outcome for result in report.results][2] is Outcome.TIMED_OUT


# ------------------------------------------------------------------------------------------------------- result hooks


class Output:
    """A hook that keeps what it hears, after an optional wait."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self.heard: list[tuple[str, str, str, float]] = []
        self.wait_s = wait_s

    async def on_result(self, station: StationInput, result: StationResult) -> None:
        now = trio.current_time()
        if self.wait_s:
            await trio.sleep(self.wait_s)
        self.heard.append((station.batch_id, station.station_id, result.outcome.value, now))


async def by_name(station: StationInput) -> Mapping[str, Any] | None:
    match station.station_id:
        case "none":
            return None
        case "fails":
            raise ValueError
        case "late":
            with trio.CancelScope(shield=True):
                await trio.sleep(6)
        case "slow":
            await trio.sleep(1)
    return {"x": 1}


async def test_the_hook_hears_each_outcome_once_when_it_counts_and_nothing_late(
    autojump_clock: MockClock,
) -> None:
    output = Output()
    setting = Setting(0)
    setting.source.put("air", 0, message_bytes("quick", "none", "fails", "slow", "late"))
    setting.source.end()
    async with open_pipeline(
        setting.source,
        handler=by_name,
        sink=setting.sink,
        observer=setting.observer,
        on_result=output.on_result,
    ) as pipeline:
        await pipeline.wait_finished()
    assert sorted(output.heard) == [
        ("air_0_0_0", "fails", "failed", 0.0),
        ("air_0_0_0", "none", "noOutput", 0.0),
        ("air_0_0_0", "quick", "succeeded", 0.0),
        ("air_0_0_0", "slow", "succeeded", 1.0),  # not when the batch was closed
    ]
    (report,) = setting.sink.reports.values()
    assert report.counts[Outcome.TIMED_OUT] == 1


async def test_a_hook_that_hangs_delays_no_batch_and_loses_what_it_has_no_time_for(
    autojump_clock: MockClock,
) -> None:
    async def hang(station: StationInput, result: StationResult) -> None:
        await trio.sleep_forever()

    setting = Setting(3)
    setting.source.end()
    async with open_pipeline(
        setting.source,
        handler=station_kind,
        sink=setting.sink,
        observer=setting.observer,
        settings=PipelineSettings(deadline_s=5),
        on_result=hang,
    ) as pipeline:
        await wait_all_tasks_blocked()
        assert trio.current_time() == 0.0
        assert setting.succeeded() == 3
        await pipeline.wait_finished()
    assert trio.current_time() == 5.0  # one call's time, for all together
    assert setting.committed == 3
    assert setting.succeeded() == 3


async def test_with_a_hook_those_that_join_an_open_batch_are_handed_over_alone(
    autojump_clock: MockClock,
) -> None:
    calls: list[list[str]] = []

    async def handle_batch(batch: Batch, report: Report) -> None:
        calls.append(sorted(batch.entries))
        for station_id in batch.entries:
            report(station_id, {})

    output, setting = Output(), Setting(0)
    async with open_pipeline(
        setting.source,
        handler=handle_batch,
        sink=setting.sink,
        settings=PipelineSettings(by="timestamp", roster=("A", "B", "C")),
        on_result=output.on_result,
    ):
        setting.source.put("air", 0, message_bytes("A", timestamp="2024-01-01T08:00:00Z"))
        await trio.sleep(1)
        setting.source.put("air", 0, message_bytes("B", "C", timestamp="2024-01-01T08:00:00Z"))
        await trio.sleep(1)
    assert calls == [["A"], ["B", "C"]]
    assert [station_id for _, station_id, _, _ in output.heard] == ["A", "B", "C"]


async def test_open_workers_tells_how_many_are_live_and_how_long_a_job_waits(
    autojump_clock: MockClock,
) -> None:
    output = Output()
    for hook in (None, output.on_result):
        async with open_workers(
            station_kind,
            settings=PipelineSettings(),
            on_result=hook,
            on_eased=lambda: None,
            on_crash=lambda: None,
            observer=RecordingObserver(),
        ) as workers:
            assert len(workers) == 0
            assert workers.expected_wait_s(["S1"], topic="air") == 0.0


@pytest.mark.parametrize("name", ["threads"])
def test_settings_of_handlers_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: 0 is not above 0"):
        PipelineSettings(**cast("Any", {name: 0}))
