from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stationmaster import events
from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.batch import (
    BadEntry,
    BatchReport,
    ClosedBy,
    DeadLetter,
    OffsetRange,
    Outcome,
    StationResult,
)
from stationmaster.errors import EmbedderBusyError
from stationmaster.pipeline import open_pipeline
from stationmaster.service.metrics import Metrics, open_metrics
from stationmaster.service.metrics.definitions import EVERY
from stationmaster.settings import PipelineSettings
from stationmaster.state import open_outbox
from stationmaster.testing import (
    MemoryDeadLetters,
    MemoryOutboxRows,
    MemorySource,
    RecordingSink,
)
from tests.service.metrics.scrapes import (
    Scraped,
    numbers,
    sample_key,
    watch_everything,
)
from tests.service.test_logs import TOLD
from tests.telemetry import NOON, batch, message_bytes, record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trio.testing import MockClock

    from stationmaster.abc import UploadAnswer
    from stationmaster.batch import Batch, StationInput


def reported(one: Batch, closed_by: ClosedBy = ClosedBy.COMPLETE, **counts: int) -> BatchReport:
    return BatchReport(
        batch=one,
        closed_by=closed_by,
        closed_at=NOON,
        duration_s=0.75,
        results=(),
        counts={outcome: counts.get(outcome.name.lower(), 0) for outcome in Outcome},
    )


# ----------------------------------------------------------------------------------------------------------- a real run


async def handle(station: StationInput) -> Mapping[str, Any] | None:
    if station.station_id == "broken":
        raise ValueError("no")
    if station.station_id == "silent":
        return None
    await trio.sleep(30 if station.station_id == "slow" else 1)
    return {"ok": True}


async def test_a_run_of_the_pipeline_is_counted_to_the_last_station(
    autojump_clock: MockClock,
) -> None:
    source, letters = MemorySource(), MemoryDeadLetters()
    sink = RecordingSink(
        [
            TryAgain(reason="503", status=503),
            TryAgain(reason="reset"),
            Unavailable(reason="401", status=401),
        ]
    )
    metrics = Metrics()
    source.observer = metrics
    source.assign([("air", 0)])
    source.put("air", 0, message_bytes("a", "b", "slow"))
    source.put("air", 0, message_bytes("a", "broken", "silent"))
    source.put("air", 0, b"{")
    source.put("air", 0, message_bytes())
    source.put("air", 0, message_bytes("a", {"stationId": 7}, "a"))
    source.end()
    async with open_pipeline(
        source,
        handler=handle,
        sink=sink,
        dead_letters=letters,
        settings=PipelineSettings(roster=("away",)),
        observer=metrics,
    ) as pipeline:
        metrics.moments.pipeline = pipeline.statistics
        await trio.sleep(0.5)
        in_flight = pipeline.statistics().in_flight
        open_then = numbers(metrics.render()[0])
        await pipeline.wait_finished()
    await trio.sleep(1)
    seen = numbers(metrics.render()[0])

    assert open_then[sample_key("in_flight_batches")] == in_flight > 0
    assert open_then[sample_key("oldest_uncommitted_age_seconds")] == 0.5
    assert seen[sample_key("in_flight_batches")] == 0
    assert open_then[sample_key("live_stations")] > 0
    assert seen[sample_key("oldest_uncommitted_age_seconds")] == 0
    for sample, value in {
        "batches_opened_total topic=air": 3,
        "batches_empty_total topic=air": 1,
        "batches_closed_total topic=air closed_by=complete": 2,
        "batches_closed_total topic=air closed_by=deadline": 1,
        "batches_uploaded_total topic=air": 3,
        "batch_duration_seconds_count topic=air": 3,
        "batch_lateness_seconds_count topic=air": 1,
        "batch_lateness_seconds_sum topic=air": 0,
        "station_outcomes_total topic=air outcome=succeeded": 4,
        "station_outcomes_total topic=air outcome=failed": 1,
        "station_outcomes_total topic=air outcome=no_output": 1,
        "station_outcomes_total topic=air outcome=timed_out": 1,
        "station_outcomes_total topic=air outcome=missing": 3,
        "station_outcomes_total topic=air outcome=rejected": 0,
        "entries_duplicate_total topic=air": 1,
        "entries_bad_total topic=air reason=station-id-not-text": 1,
        "dead_letters_total reason=not-json": 1,
        "dead_letters_total reason=other": 0,
        "dead_letters_kept_total": 1,
        "upload_attempts_total route=direct status=2xx": 3,
        "upload_attempts_total route=direct status=4xx": 1,
        "upload_attempts_total route=direct status=5xx": 1,
        "upload_attempts_total route=direct status=none": 1,
        "upload_attempt_duration_seconds_count route=direct": 6,
        "rebalances_total kind=assigned": 1,
    }.items():
        assert seen[sample_key(sample)] == value, sample
    assert seen[sample_key("commits_total")] >= 1


class Target:
    """Answers every upload and every body alike, but for one."""

    def __init__(self, answer: UploadAnswer) -> None:
        self.answer = answer
        self.once: UploadAnswer | None = None

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        await trio.lowlevel.checkpoint()
        answer, self.once = self.once or self.answer, None
        return answer

    async def send(self, batch_id: str, body: bytes, /) -> UploadAnswer:
        await trio.lowlevel.checkpoint()
        answer, self.once = self.once or self.answer, None
        return answer


async def test_what_goes_through_the_outbox_is_counted_on_its_way_in_and_out(
    autojump_clock: MockClock,
) -> None:
    source, letters, metrics = MemorySource(), MemoryDeadLetters(), Metrics()
    target = Target(TryAgain(reason="503", status=503))
    for offset in range(4):
        source.put("air", 0, message_bytes(f"S{offset}"))
    async with open_outbox(
        MemoryOutboxRows(),
        send=target.send,
        dead_letters=letters,
        observer=metrics,
        clock=trio.current_time,
    ) as outbox:
        async with open_pipeline(
            source,
            handler=handle,
            sink=target,
            outbox=outbox,
            dead_letters=letters,
            settings=PipelineSettings(upload_timeout_s=5),
            observer=metrics,
        ):
            await trio.sleep(60)
            down = numbers(metrics.render()[0])
            target.once, target.answer = Rejected(status=422, answer="no"), Accepted()
            await trio.sleep(60)
    up = numbers(metrics.render()[0])
    assert down[sample_key("batches_kept_total")] == 4
    assert down[sample_key("upload_diverting")] == 1
    assert down[sample_key("upload_attempts_total route=outbox status=5xx")] > 1
    assert up[sample_key("upload_diverting")] == 0
    assert up[sample_key("outbox_delivered_total")] == 3
    assert up[sample_key("outbox_wait_seconds_count")] == 3
    assert up[sample_key("batches_rejected_total route=outbox")] == 1
    assert up[sample_key("dead_letters_total reason=rejected-upload")] == 1
    assert up[sample_key("upload_attempts_total route=outbox status=4xx")] == 1


async def test_a_scrape_may_come_at_any_time_of_a_run(autojump_clock: MockClock) -> None:
    source, metrics = MemorySource(), Metrics()
    for offset in range(50):
        source.put("air", offset % 3, message_bytes(f"S{offset % 7}", "slow"))
    source.end()
    opened: list[float] = []

    async def scrape() -> None:
        while True:
            seen = numbers(metrics.render()[0])
            opened.append(seen.get(sample_key("batches_opened_total topic=air"), 0))
            await trio.sleep(0.6)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(scrape)
        async with open_pipeline(
            source, handler=handle, sink=RecordingSink(), observer=metrics
        ) as pipeline:
            metrics.moments.pipeline = pipeline.statistics
            await pipeline.wait_finished()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert opened == sorted(opened)
    assert opened[-1] == 50
    assert len(opened) > 5


# --------------------------------------------------------------------------------------------------- events and samples


def test_no_event_harms_a_scrape() -> None:
    scraped = Scraped("t")
    watch_everything(scraped.metrics)
    for event, _ in TOLD:
        scraped.tell(event)
        assert scraped.scrape()


def test_every_definition_has_samples_once_everything_has_happened() -> None:
    scraped = Scraped("t")
    watch_everything(scraped.metrics)
    scraped.tell(*(event for event, _ in TOLD))
    found = {name for name, _ in scraped.scrape()}
    assert {name for one in EVERY for name in one.sample_names} <= found
    assert not any(name.endswith("_created") for name in found)
    assert {"process_cpu_seconds_total", "python_gc_collections_total"} <= found


def test_details_are_not_asked_for() -> None:
    assert not Metrics(clock=float).detailed


def some_batch(**changes: Any) -> Batch:
    return attrs.evolve(batch("A"), **changes)


def test_a_batch_is_counted_by_topic_and_by_what_closed_it() -> None:
    scraped = Scraped()
    one = some_batch(
        mislabelled=2,
        follow_up=True,
        bad_entries=(BadEntry(index=0, reason="station-id-blank"), BadEntry(index=2, reason="?")),
    )
    scraped.tell(
        events.BatchOpened(batch=one, in_flight=1),
        events.BatchClosed(
            report=reported(one, ClosedBy.DEADLINE, succeeded=3, timed_out=2), lateness_s=0.004
        ),
        events.UploadDone(report=reported(one), attempts=1, seconds=0.5, sent_bytes=100),
        events.BatchDropped(batch=one),
        events.BatchWithdrawn(batch=one),
    )
    topic = f"topic={one.topic}"
    assert scraped[f"batches_closed_total {topic} closed_by=deadline"] == 1
    assert scraped[f"batches_closed_total {topic} closed_by=quorum"] == 0
    assert scraped[f"station_outcomes_total {topic} outcome=timed_out"] == 2
    assert scraped[f"batch_lateness_seconds_bucket {topic} le=0.005"] == 1
    assert scraped[f"batch_lateness_seconds_bucket {topic} le=0.0025"] == 0
    assert scraped[f"batch_duration_seconds_sum {topic}"] == 1.25
    assert scraped[f"upload_duration_seconds_sum {topic}"] == 0.5
    assert scraped["upload_sent_bytes_total route=direct"] == 100
    assert scraped[f"messages_mislabelled_total {topic}"] == 2
    assert scraped[f"batch_follow_ups_total {topic}"] == 1
    assert scraped[f"entries_bad_total {topic} reason=station-id-blank"] == 1
    assert scraped[f"entries_bad_total {topic} reason=other"] == 1
    assert scraped[f"batches_dropped_total {topic}"] == 1
    assert scraped[f"batches_withdrawn_total {topic}"] == 1


def test_only_the_deadline_s_own_batches_tell_how_late_they_were() -> None:
    scraped = Scraped()
    one = some_batch()
    scraped.tell(events.BatchClosed(report=reported(one, ClosedBy.QUORUM), lateness_s=0.0))
    assert sample_key(f"batch_lateness_seconds_count topic={one.topic}") not in scraped.scrape()


def test_a_known_topic_begins_at_zero_with_all_that_is_counted_by_topic() -> None:
    seen = Scraped("air", "water").scrape()
    for topic in ("air", "water"):
        assert seen[sample_key(f"batches_uploaded_total topic={topic}")] == 0
        assert seen[sample_key(f"station_outcomes_total topic={topic} outcome=rejected")] == 0
        assert seen[sample_key(f"batch_duration_seconds_count topic={topic}")] == 0


@pytest.mark.parametrize(
    ("begin", "end", "sample"),
    [
        (
            events.StoreBlocked(store="outbox", kind="full", detail=""),
            events.StoreUnblocked(store="outbox", blocked_s=1.0),
            "store_blocked store=outbox",
        ),
        (
            events.SourceTrouble(kind="no-broker", detail=""),
            events.SourceRecovered(),
            "source_in_trouble",
        ),
        (
            events.SourcePaused(paused=True),
            events.SourcePaused(paused=False),
            "source_paused",
        ),
        (
            events.UploadsDiverted(reason=""),
            events.UploadsResumed(diverted_s=1.0),
            "upload_diverting",
        ),
        (
            events.StationBreakerOpened(station_id="S", failures=3),
            events.StationBreakerClosed(station_id="S", open_s=1.0),
            "station_breakers_open",
        ),
        (
            events.ThreadAbandoned(batch_id="b", station_id="S", abandoned=1, threads=4),
            events.ThreadReturned(
                batch_id="b", station_id="S", abandoned=0, seconds=1.0, error=None
            ),
            "abandoned_threads",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_begins_and_ends_is_one_meanwhile(
    begin: events.Event, end: events.Event, sample: str
) -> None:
    scraped = Scraped()
    before = scraped[sample]
    scraped.tell(begin)
    meanwhile = scraped[sample]
    scraped.tell(end)
    assert (before, meanwhile, scraped[sample]) == (0, 1, 0)


def test_the_batcher_s_calls_are_counted_by_reason_and_result() -> None:
    scraped = Scraped()
    scraped.tell(
        events.CallStarted(rows=32, reason="full", oldest_age_s=0.02, queue_rows=0),
        events.CallStarted(rows=3, reason="new rule", oldest_age_s=0.2, queue_rows=0),
        events.CallDone(rows=32, seconds=0.25),
        events.CallFailed(rows=3, seconds=0.5, error=EmbedderBusyError("busy")),
        events.CallAbandoned(rows=3, seconds=1.5),
        events.CallRerouted(rows=3, endpoint="http://a", to="http://b", error=ValueError()),
        events.EndpointPaused(endpoint="http://a", pause_s=3.0, reason="429"),
    )
    assert scraped["batcher_calls_total reason=full"] == 1
    assert scraped["batcher_calls_total reason=other"] == 1
    assert scraped["batcher_call_rows_bucket le=32.0"] == 2
    assert scraped["batcher_call_rows_sum"] == 35
    assert scraped["batcher_queue_wait_seconds_count"] == 2
    for result, seconds in (("answered", 0.25), ("failed", 0.5), ("abandoned", 1.5)):
        assert scraped[f"batcher_call_duration_seconds_sum result={result}"] == seconds
    assert scraped["calls_rerouted_total endpoint=http://a"] == 1
    assert scraped["endpoint_pauses_total endpoint=http://a"] == 1


def test_revokes_tell_their_drain_and_whether_it_was_in_time() -> None:
    scraped = Scraped()
    scraped.tell(
        events.PartitionsRevoked(partitions=(("air", 0),), drain_s=0.5, drained=True),
        events.PartitionsRevoked(partitions=(("air", 1),), drain_s=20.0, drained=False),
        events.PartitionsLost(partitions=(("air", 2),)),
    )
    assert scraped["rebalances_total kind=revoked"] == 2
    assert scraped["rebalances_total kind=lost"] == 1
    assert scraped["drain_duration_seconds_sum"] == 20.5
    assert scraped["undrained_revokes_total"] == 1


def test_a_batch_without_a_home_and_one_refused_are_counted() -> None:
    scraped = Scraped()
    one = some_batch()
    scraped.tell(
        events.UploadFailed(batch_id="b", attempts=3, reason="503"),
        events.UploadRejected(report=reported(one), status=422, answer=""),
        events.DeadLettersKept(
            letters=(
                DeadLetter(reason="x", detail="", topic="t", partition=0, offset=1, value=b""),
            )
            * 3
        ),
        events.StateMovedAside(path="a", moved_to="b", reason="c"),
        events.LateResult(batch_id="b", station_id="S"),
        events.MessageRefused(record=record(b""), reason="a reason of tomorrow", detail=""),
    )
    assert scraped["batches_homeless_total"] == 1
    assert scraped["batches_rejected_total route=direct"] == 1
    assert scraped["dead_letters_total reason=rejected-upload"] == 1
    assert scraped["dead_letters_total reason=other"] == 1
    assert scraped["dead_letters_kept_total"] == 3
    assert scraped["state_moved_aside_total"] == 1
    assert scraped["late_results_total"] == 1


def test_the_oldest_uncommitted_offset_is_told_until_its_commit() -> None:
    scraped = Scraped()
    scraped.tell(events.PartitionsAssigned(partitions=(("air", 0),)))
    scraped.tell(
        events.BatchJoined(
            batch_id="b",
            ranges=(OffsetRange(topic="air", partition=0, first=1, last=5),),
            stations=1,
        )
    )
    scraped.clock.now += 9
    assert scraped["oldest_uncommitted_age_seconds"] == 10
    scraped.tell(
        events.OffsetsCommitted(offsets=(OffsetRange(topic="air", partition=0, first=1, last=5),))
    )
    assert scraped["oldest_uncommitted_age_seconds"] == 0


def joined(offset: int, generation: int) -> events.BatchJoined:
    one = OffsetRange(topic="air", partition=0, first=offset, last=offset, generation=generation)
    return events.BatchJoined(batch_id="b", ranges=(one,), stations=1)


def refused(offset: int, generation: int) -> events.MessageRefused:
    one = record(b"", offset=offset, generation=generation)
    return events.MessageRefused(record=one, reason="not-json", detail="")


@pytest.mark.parametrize("came", [joined, refused])
def test_what_a_log_held_before_it_was_made_anew_does_not_wait_for_a_commit(
    came: Callable[[int, int], events.Event],
) -> None:
    scraped = Scraped()
    scraped.tell(events.PartitionsAssigned(partitions=(("air", 0),)))
    for offset, generation in ((1_000_000, 1), (0, 2), (1_000_001, 1)):
        scraped.clock.now += 1
        scraped.tell(came(offset, generation))
    scraped.tell(events.OffsetsCommitted(offsets=joined(0, 2).ranges))
    assert scraped["oldest_uncommitted_age_seconds"] == 0

    scraped.tell(came(1, 2))
    scraped.tell(events.OffsetsCommitted(offsets=joined(1_000_000, 1).ranges))
    assert scraped["oldest_uncommitted_age_seconds"] == 1, "an old commit is none of the new log"


# ------------------------------------------------------------------------------------------------------------- openings


async def test_the_loop_s_lag_is_measured_until_the_metrics_are_left(
    autojump_clock: MockClock,
) -> None:
    async with open_metrics(topics=["air"]) as metrics:
        await trio.sleep(10.1)
        seen = numbers(metrics.render()[0])
    await trio.sleep(10)
    after = numbers(metrics.render()[0])
    assert seen[sample_key("event_loop_lag_seconds_count")] == 40
    assert seen[sample_key("event_loop_lag_seconds_sum")] == 0
    assert after[sample_key("event_loop_lag_seconds_count")] == 40
    assert seen[sample_key("batches_opened_total topic=air")] == 0


def test_a_station_s_result_is_nothing_to_count_by_itself() -> None:
    scraped = Scraped()
    before = scraped.scrape()
    scraped.tell(
        events.StationAnswered(
            batch_id="b", station_id="S", outcome=Outcome.FAILED, answered=1, expected=2
        ),
        events.RequestSubmitted(rows=1, queue_rows=1),
    )
    after = scraped.scrape()
    assert {key: after[key] for key in before if key[0].startswith("stationmaster_")} == {
        key: value for key, value in before.items() if key[0].startswith("stationmaster_")
    }
    assert (
        StationResult("S", Outcome.FAILED).station_id
        not in scraped.metrics.render()[0].decode().split()
    )
