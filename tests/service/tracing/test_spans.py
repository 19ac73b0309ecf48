"""Spans of a pipeline: whose child a batch is, what is within it, and what an untraced one costs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain
from stationmaster.batcher import open_batcher
from stationmaster.batcher.policy import BatchPolicy
from stationmaster.errors import EmbedderRefusedError, UploadFailedError
from stationmaster.events import BatchOpened
from stationmaster.pipeline import open_pipeline
from stationmaster.sinks import open_http_sink
from stationmaster.state import open_outbox
from stationmaster.testing import (
    Hang,
    MemoryDeadLetters,
    MemoryOutboxRows,
    RecordingObserver,
    RecordingSink,
    ScriptedEmbedder,
)
from stationmaster.testing.server import Reply, open_server

from .traced import (
    SAMPLED,
    SPAN,
    TRACE,
    UNSAMPLED,
    Traced,
    attributes,
    context_of,
    is_child,
    linked,
    traceparent,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster.abc import Report
    from stationmaster.batch import Batch, StationInput


async def at_once(station: StationInput) -> Mapping[str, Any]:
    await trio.lowlevel.checkpoint()
    return {}


async def never(station: StationInput) -> None:
    await trio.sleep_forever()


# ----------------------------------------------------------------------------------------------------------- parents


async def test_a_batch_is_a_child_of_the_span_that_its_message_names(
    autojump_clock: MockClock,
) -> None:
    traced = Traced(ratio=0)
    traced.put("S1", "S2", header=SAMPLED)
    await traced.run(at_once)

    batch = traced.one("batch")
    assert batch.parent is not None
    assert f"{batch.parent.trace_id:032x}" == TRACE
    assert f"{batch.parent.span_id:016x}" == SPAN
    assert batch.parent.is_remote
    assert not batch.links
    assert batch.kind is trace.SpanKind.CONSUMER
    assert batch.status.status_code is StatusCode.UNSET
    assert attributes(batch) == {
        "batch.id": "air_0_0_0",
        "messaging.destination.name": "air",
        "stations": 2,
        "stations.succeeded": 2,
        "closed_by": "complete",
        "lateness_s": 0.0,
        "delivery": "uploaded",
    }
    assert [event.name for event in batch.events] == ["closed"]
    for station in traced.named("station"):
        assert is_child(station, batch)
    ids = [attributes(station)["station.id"] for station in traced.named("station")]
    assert sorted(ids) == ["S1", "S2"]
    assert is_child(traced.one("upload"), batch)


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"00",
        b"-" * 255,
        b"0" * 100_000,
        b"\xff\xfe" * 20,
        b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01",
        b"00-4bf92f3577b34da6a3ce929d0e0e4736-" + b"0" * 16 + b"-01",
        b"ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        b"00-4BF92F3577B34DA6A3CE929D0E0E473Z-00f067aa0ba902b7-01",
        b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nX-Evil: 1",
    ],
)
async def test_a_header_that_is_no_traceparent_does_no_harm(
    autojump_clock: MockClock, header: bytes | None
) -> None:
    traced = Traced()
    traced.put("S1", header=header)
    await traced.run(at_once)

    batch = traced.one("batch")
    assert batch.parent is None
    assert not batch.links
    assert attributes(batch)["delivery"] == "uploaded"


async def test_several_messages_are_links_and_equal_ones_a_parent(
    autojump_clock: MockClock,
) -> None:
    traced = Traced(ratio=0)
    traced.put("S1", header=traceparent(1, flags="00"))
    traced.put("S2", header="nonsense")
    traced.put("S3", header=traceparent(2))
    traced.put("S4")
    traced.put("S5", header=traceparent(2))
    await traced.run(at_once, by="poll")
    batch = traced.one("batch")
    assert batch.parent is None
    assert linked(batch) == [f"{1:016x}", f"{2:016x}"]
    assert len(traced.named("station")) == 5

    alike = Traced(ratio=0)
    alike.put("S1", header=traceparent(3))
    alike.put("S2", header=traceparent(3))
    await alike.run(at_once, by="poll")
    parent = alike.one("batch").parent
    assert parent is not None
    assert parent.span_id == 3
    assert not alike.one("batch").links


async def test_a_batch_that_others_join_has_links_to_them_and_its_last_id(
    autojump_clock: MockClock,
) -> None:
    eight = "2024-01-01T08:00:00Z"
    traced = Traced(ratio=0)
    traced.put("A", header=traceparent(1), timestamp=eight)
    async with traced.open(at_once, by="timestamp", roster=["A", "B"]) as pipeline:
        await wait_all_tasks_blocked()
        traced.put("B", header=traceparent(2), partition=1, timestamp=eight)
        traced.source.end()
        await pipeline.wait_finished()

    (report,) = traced.sink.reports.values()
    batch = traced.one("batch")
    assert batch.parent is not None
    assert batch.parent.span_id == 1
    assert linked(batch) == [f"{2:016x}"]
    assert attributes(batch)["batch.id"] == report.batch.batch_id
    assert attributes(batch)["stations"] == 2
    assert len(traced.named("station")) == 2
    first, second = traced.named("station")
    assert is_child(first, batch)
    assert is_child(second, batch)
    assert attributes(first)["batch.id"] != report.batch.batch_id
    assert is_child(traced.one("upload"), batch)


# ---------------------------------------------------------------------------------------------------------- handlers


async def test_spans_of_a_handler_and_of_its_tasks_nest_in_its_stations(
    autojump_clock: MockClock,
) -> None:
    traced = Traced()

    async def helper(name: str) -> None:
        with traced.tracer.start_as_current_span("child task", attributes={"name": name}):
            await trio.sleep(1)

    async def handle(station: StationInput) -> Mapping[str, Any]:
        with traced.tracer.start_as_current_span("own", attributes={"name": station.station_id}):
            await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(helper, station.station_id)
        return {}

    traced.put("S1", "S2", "S3")
    await traced.run(handle)

    stations = {attributes(span)["station.id"]: span for span in traced.named("station")}
    assert len(stations) == 3
    for name in ("own", "child task"):
        nested = traced.named(name)
        assert len(nested) == 3
        for span in nested:
            assert is_child(span, stations[attributes(span)["name"]])
    assert not trace.get_current_span().get_span_context().is_valid


async def test_a_plain_function_has_its_span_in_its_thread() -> None:
    traced = Traced()
    threads: list[int] = []

    def handle(station: StationInput) -> Mapping[str, Any]:
        threads.append(threading.get_ident())
        with traced.tracer.start_as_current_span("own", attributes={"name": station.station_id}):
            return {}

    traced.put("S1", "S2", header=SAMPLED)
    await traced.run(handle)

    assert threading.get_ident() not in threads
    stations = {attributes(span)["station.id"]: span for span in traced.named("station")}
    assert set(stations) == {"S1", "S2"}
    for span in traced.named("own"):
        assert is_child(span, stations[attributes(span)["name"]])
    for span in stations.values():
        assert is_child(span, traced.one("batch"))


async def test_one_call_of_a_batch_handler_has_one_span(autojump_clock: MockClock) -> None:
    traced = Traced()

    async def handle_batch(batch: Batch, report: Report) -> None:
        with traced.tracer.start_as_current_span("own"):
            await trio.sleep(1)
        for station_id in batch.entries:
            report(station_id, {})

    traced.put("S1", "S2")
    await traced.run(handle_batch)

    call = traced.one("stations")
    assert attributes(call) == {"batch.id": "air_0_0_0", "stations": 2}
    assert is_child(call, traced.one("batch"))
    assert is_child(traced.one("own"), call)
    assert not traced.named("station")


async def test_errors_are_the_status_of_a_span_and_a_cancellation_is_none(
    autojump_clock: MockClock,
) -> None:
    traced = Traced()

    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.station_id == "bad":
            raise ValueError("x" * 10_000)
        await trio.sleep_forever()
        raise AssertionError

    traced.put("bad", "late")
    await traced.run(handle)

    spans = {attributes(span)["station.id"]: span for span in traced.named("station")}
    bad, late = spans["bad"], spans["late"]
    assert bad.status.status_code is StatusCode.ERROR
    assert bad.status.description is not None
    assert bad.status.description.startswith("ValueError: xxx")
    assert len(bad.status.description) == 200
    assert attributes(bad)["outcome"] == "failed"
    assert attributes(bad)["error.type"] == "ValueError"
    assert late.status.status_code is StatusCode.UNSET
    assert attributes(late)["outcome"] == "cancelled"
    batch = attributes(traced.one("batch"))
    assert (batch["stations.failed"], batch["stations.timedOut"]) == (1, 1)
    assert batch["closed_by"] == "deadline"


async def test_an_error_that_ends_the_pipeline_passes_through(autojump_clock: MockClock) -> None:
    traced = Traced()

    class Fatal(BaseException):
        pass

    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.lowlevel.checkpoint()
        raise Fatal("gone")

    traced.put("S1")
    with pytest.raises(Fatal, match="gone"):
        await traced.run(handle)
    assert traced.one("station").status.description == "Fatal('gone')"


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", ["station", "blocking", "batch"])
@pytest.mark.parametrize(("header", "ratio"), [(UNSAMPLED, 1.0), (None, 0.0)])
async def test_a_batch_that_is_not_sampled_has_no_spans_at_all(
    kind: str, header: str | None, ratio: float
) -> None:
    inside: list[bool] = []

    def look() -> None:
        inside.append(trace.get_current_span().get_span_context().is_valid)

    async def station_handler(station: StationInput) -> Mapping[str, Any]:
        look()
        await trio.lowlevel.checkpoint()
        return {}

    def blocking_handler(station: StationInput) -> Mapping[str, Any]:
        look()
        return {}

    async def batch_handler(batch: Batch, report: Report) -> None:
        look()
        await trio.lowlevel.checkpoint()
        for station_id in batch.entries:
            report(station_id, {})

    handlers: Any = {
        "station": station_handler,
        "blocking": blocking_handler,
        "batch": batch_handler,
    }
    traced = Traced(ratio=ratio)
    traced.put("S1", header=header)
    await traced.run(handlers[kind])

    assert not traced.exporter.get_finished_spans()
    assert inside == [False]
    assert len(traced.sink.reports) == 1


async def test_links_decide_before_the_ratio(autojump_clock: MockClock) -> None:
    traced = Traced(ratio=1)
    traced.put("S1", header=traceparent(1, flags="00"))
    traced.put("S2", header=traceparent(2, flags="00"))
    await traced.run(at_once, by="poll")
    assert not traced.exporter.get_finished_spans()


def test_a_sampler_says_what_it_does() -> None:
    assert "BatchSampler{0.25}" in Traced(ratio=0.25).provider.sampler.get_description()


async def test_a_batch_has_no_more_station_spans_than_it_may(autojump_clock: MockClock) -> None:
    traced = Traced(station_spans=3)
    traced.put(*(f"S{number}" for number in range(50)))
    traced.put("S1")
    await traced.run(at_once)
    by_batch = [attributes(span)["batch.id"] for span in traced.named("station")]
    assert sorted(by_batch) == ["air_0_0_0"] * 3 + ["air_0_1_0"]
    counts = {
        attributes(span)["batch.id"]: attributes(span)["stations.succeeded"]
        for span in traced.named("batch")
    }
    assert counts == {"air_0_0_0": 50, "air_0_1_0": 1}


# --------------------------------------------------------------------------------------------------- what becomes of it


async def test_an_upload_carries_the_trace_to_the_target() -> None:
    traced = Traced(ratio=0)
    traced.put("S1", header=SAMPLED)
    traced.put("S1", header=UNSAMPLED)
    with trio.fail_after(10):
        async with (
            open_server(lambda _: Reply(status=201)) as server,
            open_http_sink(
                f"{server.url}/batches", more_headers=traced.tracing.http_headers
            ) as sink,
        ):
            await traced.run(at_once, sink=sink)
            await sink.send("later", b"{}")

    seen = {one.headers["idempotency-key"]: one.headers.get("traceparent") for one in server.seen}
    upload = context_of(traced.one("upload"))
    assert seen["air_0_0_0"] == f"00-{TRACE}-{upload.span_id:016x}-01"
    assert seen["air_0_1_0"] is not None
    assert seen["air_0_1_0"].startswith(f"00-{TRACE}-")
    assert seen["air_0_1_0"].endswith("-00")
    assert seen["later"] is None
    assert traced.one("upload").attributes == {
        "stationmaster.batch.id": "air_0_0_0",
        "http.response.status_code": 201,
    }


async def test_each_attempt_has_a_span_and_a_refused_batch_is_an_error(
    autojump_clock: MockClock,
) -> None:
    traced = Traced()
    traced.sink = RecordingSink([TryAgain(reason="busy"), Rejected(status=422, answer="no")])
    traced.put("S1")
    await traced.run(at_once)

    first, second = traced.named("upload")
    assert first.status.description == "busy"
    assert second.status.description == "rejected: 422"
    batch = traced.one("batch")
    assert batch.status.description == "the target answered 422"
    assert attributes(batch)["delivery"] == "rejected"


async def test_a_batch_without_a_home_is_an_error(autojump_clock: MockClock) -> None:
    traced = Traced()
    traced.sink = RecordingSink(otherwise=Hang())
    traced.put("S1")
    with pytest.raises(UploadFailedError):
        await traced.run(at_once)
    assert attributes(traced.one("upload"))["outcome"] == "cancelled"
    assert attributes(traced.one("batch"))["delivery"] == "failed"
    assert traced.one("batch").status.status_code is StatusCode.ERROR


async def test_a_batch_in_the_outbox_is_kept_and_its_later_delivery_has_no_span(
    autojump_clock: MockClock,
) -> None:
    traced = Traced()
    sink = RecordingSink(otherwise=TryAgain(reason="down"))
    traced.put("S1")

    async def send(batch_id: str, body: bytes) -> TryAgain:
        await trio.lowlevel.checkpoint()
        return TryAgain(reason="down")

    async with open_outbox(
        MemoryOutboxRows(), send=send, dead_letters=MemoryDeadLetters()
    ) as outbox:
        await traced.run(at_once, sink=sink, outbox=outbox)
    batch = traced.one("batch")
    assert attributes(batch)["delivery"] == "kept"
    assert attributes(batch)["reason"] == "down"
    assert batch.status.status_code is StatusCode.UNSET


async def test_what_was_never_seen_to_open_has_no_span(autojump_clock: MockClock) -> None:
    untraced = Traced()
    untraced.put("S1")
    heard = RecordingObserver()
    async with open_pipeline(
        untraced.source, handler=at_once, sink=untraced.sink, observer=heard
    ) as pipeline:
        untraced.source.end()
        await pipeline.wait_finished()

    traced = Traced()
    for event in heard.events:
        if not isinstance(event, BatchOpened):
            traced.spans.observe(event)
    (report,) = untraced.sink.reports.values()
    assert isinstance(await traced.tracing.sink(traced.sink).upload(report), Accepted)
    assert not traced.exporter.get_finished_spans()


async def test_what_the_end_of_the_grace_drops_is_an_error(autojump_clock: MockClock) -> None:
    traced = Traced()
    traced.put("S1")
    async with traced.open(never, grace_s=0):
        await wait_all_tasks_blocked()
    assert attributes(traced.one("batch"))["delivery"] == "dropped"
    assert traced.one("batch").status.status_code is StatusCode.ERROR
    assert traced.spans.find("air_0_0_0") is None


async def test_a_batch_that_is_withdrawn_and_comes_back_has_a_span_each_time(
    autojump_clock: MockClock,
) -> None:
    traced = Traced()
    traced.put("S1")

    async def one_second(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(1)
        return {}

    async with traced.open(one_second) as pipeline:
        await wait_all_tasks_blocked()
        traced.source.lose([("air", 0)])
        traced.source.assign([("air", 0)])
        traced.source.end()
        await pipeline.wait_finished()
    deliveries = [attributes(span)["delivery"] for span in traced.named("batch")]
    assert deliveries == ["withdrawn", "uploaded"]


async def test_a_batch_that_opens_again_before_its_end_is_told_ends_first(
    autojump_clock: MockClock,
) -> None:
    traced = Traced()
    traced.put("S1")
    async with traced.open(never, grace_s=0):
        await wait_all_tasks_blocked()
        earlier = traced.spans.find("air_0_0_0")
        assert earlier is not None
        again = attrs.evolve(earlier.batch, entries=dict(earlier.batch.entries))
        traced.spans.observe(BatchOpened(batch=again, in_flight=2))
        assert attributes(traced.one("batch"))["delivery"] == "withdrawn"
    # The end of the earlier one is none of the later one's business.
    assert len(traced.named("batch")) == 1
    traced.spans.close()
    later = traced.named("batch")[1]
    assert attributes(later)["delivery"] == "cut"
    assert later.status.description == "the service ended"


# ------------------------------------------------------------------------------------------------ calls to the model


async def test_a_call_to_the_model_is_within_its_batch_and_linked_to_the_stations_that_ask(
    autojump_clock: MockClock,
) -> None:
    traced = Traced(ratio=0)
    embedder = ScriptedEmbedder(seconds_per_call=1)
    traced.put("S1", "S2", header=traceparent(1))
    traced.put("S3", header=traceparent(2))
    traced.put("S4", header=traceparent(3, flags="00"))

    async with open_batcher(traced.tracing.embedder(embedder), policy=BatchPolicy()) as batcher:
        asked: Any = traced.tracing.batcher(batcher)

        async def handle(station: StationInput) -> Mapping[str, Any]:
            await trio.sleep(0.1)
            vector = await asked.embed(station.station_id, deadline=trio.current_time() + 4)
            return {"vector": vector}

        await traced.run(handle)
        assert asked.statistics().queued_rows == 0
    assert sorted(text for call in embedder.calls for text in call) == ["S1", "S2", "S3", "S4"]

    stations = {attributes(span)["station.id"]: span for span in traced.named("station")}
    calls = traced.named("embed")
    links = [link for call in calls for link in linked(call)]
    assert sorted(links) == sorted(f"{context_of(span).span_id:016x}" for span in stations.values())
    batches = [context_of(span).span_id for span in traced.named("batch")]
    for call in calls:
        assert call.parent is not None
        assert call.parent.span_id in batches
        assert call.kind is trace.SpanKind.CLIENT
    assert sum(attributes(call)["rows"] for call in calls) >= 3
    assert not traced.tracing._askers


async def test_many_rows_of_one_asker_are_one_link(autojump_clock: MockClock) -> None:
    traced = Traced()
    traced.put("S1")
    traced.put("S2", header=UNSAMPLED)
    embedder = ScriptedEmbedder()
    async with open_batcher(traced.tracing.embedder(embedder), policy=BatchPolicy()) as batcher:
        asked = traced.tracing.batcher(batcher)

        async def handle(station: StationInput) -> Mapping[str, Any]:
            asked.expect(3)
            texts = [f"{station.station_id} {text}" for text in "abc"]
            return {"vectors": await asked.embed_many(texts, return_errors=True)}

        await traced.run(handle)
    station = f"{context_of(traced.one('station')).span_id:016x}"
    assert traced.named("embed")
    for call in traced.named("embed"):
        assert linked(call) == [station]


async def test_a_text_that_two_stations_wait_for_is_linked_to_both(
    autojump_clock: MockClock,
) -> None:
    traced = Traced()
    traced.put("S1", "S2")
    embedder = ScriptedEmbedder(seconds_per_call=1)
    policy = BatchPolicy(max_batch_rows=1, max_in_flight=1)
    async with open_batcher(traced.tracing.embedder(embedder), policy=policy) as batcher:
        asked = traced.tracing.batcher(batcher)

        async def handle(station: StationInput) -> Mapping[str, Any]:
            return {"vector": await asked.embed("the same")}

        await traced.run(handle)
    stations = {f"{context_of(span).span_id:016x}" for span in traced.named("station")}
    first, second = traced.named("embed")
    assert set(linked(first)) == stations
    assert set(linked(second)) <= stations


async def test_a_call_that_fails_is_an_error_and_a_task_of_its_own_asks_within_its_own_trace(
    autojump_clock: MockClock,
) -> None:
    traced = Traced()
    embedder = ScriptedEmbedder(script=[EmbedderRefusedError("wrong key")])
    async with open_batcher(traced.tracing.embedder(embedder), policy=BatchPolicy()) as batcher:
        asked = traced.tracing.batcher(batcher)
        with traced.tracer.start_as_current_span("own"), pytest.raises(EmbedderRefusedError):
            await asked.embed("text")
        await asked.embed("text")  # nobody who is traced
    call = traced.one("embed")
    assert is_child(call, traced.one("own"))
    assert call.status.description == "EmbedderRefusedError: wrong key"
