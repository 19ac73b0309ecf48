from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import attrs
import pytest

from stationmaster import events
from stationmaster.batch import OffsetRange
from stationmaster.service.metrics import definitions as d
from stationmaster.service.metrics.instruments import CLASSIC, OPEN_METRICS, wants_open_metrics
from stationmaster.service.metrics.pauses import GcPauses
from stationmaster.service.metrics.uncommitted import Uncommitted
from tests.service.metrics.scrapes import (
    Scraped,
    kafka,
    numbers,
    pipeline,
    sample_key,
    watch_everything,
)

if TYPE_CHECKING:
    from stationmaster.settings import PipelineStatistics

# ------------------------------------------------------------------------------------------------- parts that are asked


def test_each_part_tells_its_numbers_when_it_is_asked() -> None:
    scraped = Scraped()
    watch_everything(scraped.metrics)
    seen = scraped.scrape()
    for sample, value in {
        "in_flight_batches": 3,
        "draining": 1,
        "parked_bytes": 50,
        "outbox_rows": 4,
        "outbox_max_bytes": 1000,
        "outbox_oldest_age_seconds": 60,
        "dead_letters_bytes": 20,
        "kafka_partitions": 2,
        "kafka_lag_records topic=air partition=0": 8,
        "kafka_outstanding_records topic=air partition=1": 6,
        "kafka_commit_errors_total": 4,
        "kafka_broker_silent_seconds": 0.5,
        "kafka_settled": 1,
        "batcher_queue_rows": 5,
        "batcher_rows_total outcome=answered": 100,
        "batcher_rows_total outcome=queue_full": 11,
        "batcher_rows_total outcome=too_large": 0,
        "batcher_rows_total outcome=other": 1,
        "endpoint_state endpoint=http://closed": 0,
        "endpoint_state endpoint=http://half-open": 1,
        "endpoint_state endpoint=http://open": 2,
        "endpoint_failures_total endpoint=http://open": 5,
    }.items():
        assert seen[sample_key(sample)] == value, sample
    assert sample_key("kafka_lag_records topic=air partition=1") not in seen, "it is not known yet"


def test_parts_that_are_not_there_have_no_numbers() -> None:
    names = {name for name, _ in Scraped().scrape()}
    assert "stationmaster_outbox_rows" not in names
    assert "stationmaster_kafka_partitions" not in names


def test_a_broker_that_never_answered_is_not_silent_for_any_time() -> None:
    scraped = Scraped()
    scraped.metrics.moments.kafka = lambda: attrs.evolve(kafka(), broker_silent_s=None)
    names = {name for name, _ in scraped.scrape()}
    assert "stationmaster_kafka_settled" in names
    assert "stationmaster_kafka_broker_silent_seconds" not in names


def test_a_part_that_raises_spoils_only_its_own_numbers_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scraped = Scraped()
    watch_everything(scraped.metrics)

    def fail() -> PipelineStatistics:
        raise ZeroDivisionError

    scraped.metrics.moments.pipeline = fail
    first, second = scraped.scrape(), scraped.scrape()
    assert sample_key("in_flight_batches") not in second
    assert second[sample_key("outbox_rows")] == 4
    assert first[sample_key("scrape_errors_total part=pipeline")] == 1
    assert second[sample_key("scrape_errors_total part=pipeline")] == 2
    assert second[sample_key("scrape_errors_total part=kafka")] == 0
    assert [line.levelname for line in caplog.records] == ["ERROR"], "once"
    scraped.metrics.moments.pipeline = pipeline
    assert scraped["in_flight_batches"] == 3


def test_a_part_that_tells_nonsense_half_way_tells_nothing() -> None:
    scraped = Scraped()
    scraped.metrics.moments.kafka = lambda: None  # type: ignore[assignment]
    seen = scraped.scrape()
    assert sample_key("kafka_partitions") not in seen
    assert seen[sample_key("scrape_errors_total part=kafka")] == 1


def test_a_part_may_count_and_collect_garbage_while_it_is_asked() -> None:
    scraped = Scraped()

    def busy() -> PipelineStatistics:
        scraped.tell(
            events.LateResult(batch_id="b", station_id="S"),
            events.StoreBlocked(store="outbox", kind="full", detail=""),
        )
        gc.collect()
        return pipeline()

    scraped.metrics.moments.pipeline = busy
    with scraped.metrics.gc_pauses.watched():
        assert scraped["in_flight_batches"] == 3
        assert scraped["gc_pause_seconds_count generation=2"] >= 1


# -------------------------------------------------------------------------------------------------------- hostile texts

HOSTILE = (
    'quote"d',
    "new\nline",
    "back\\slash",
    'end\\"} 1\nstationmaster_forged 1\n#',
    "\x1b[31mred\x00\r\t",
    "<script>alert(1)</script>",
    "half \udc80 a pair",
    "мост 🚉",
    '{le="+Inf"}',
    "",
)


@pytest.mark.parametrize("topic", HOSTILE)
@pytest.mark.parametrize("accept", [None, "application/openmetrics-text"])
def test_a_hostile_topic_stays_one_label(topic: str, accept: str | None) -> None:
    scraped = Scraped(topic)
    scraped.metrics.moments.kafka = lambda: kafka(topic)
    body = scraped.metrics.render(accept)[0].decode()
    plain = Scraped("air")
    plain.metrics.moments.kafka = lambda: kafka("air")
    expected = plain.metrics.render(accept)[0].decode()
    assert len(body.split("\n")) == len(expected.split("\n"))
    assert not any(line.startswith("stationmaster_forged") for line in body.split("\n"))
    if accept is None and "\r" not in topic:
        legal = topic.encode("utf-8", "backslashreplace").decode()
        key = "stationmaster_batches_opened_total", frozenset({("topic", legal)})
        assert numbers(body.encode())[key] == 0


def test_words_that_are_in_no_closed_list_are_other_and_leave_nothing_behind() -> None:
    scraped = Scraped()
    before = len(scraped.scrape())
    for number in range(1000):
        scraped.tell(
            events.ResultHookTrouble(batch_id="b", station_id="S", reason=f"reason {number}"),
            events.SourceTrouble(kind=f"kind {number}", detail=""),
        )
    assert scraped["result_hook_troubles_total reason=other"] == 1000
    assert scraped["source_troubles_total kind=other"] == 1000
    assert len(scraped.scrape()) == before
    assert len(scraped.metrics._instruments._known) < before


def test_no_id_becomes_a_label() -> None:
    names = {label.name for one in d.EVERY for label in one.labels}
    assert names == {
        "topic",
        "partition",
        "endpoint",
        "closed_by",
        "outcome",
        "reason",
        "route",
        "status",
        "store",
        "kind",
        "result",
        "generation",
        "part",
        "version",
    }


# ------------------------------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize(
    ("accept", "open_metrics"),
    [
        (None, False),
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("text/html, Application/OpenMetrics-Text ; version=1.0.0;q=0.5, */*;q=0.1", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text; q=0.000, text/plain", False),
        ("application/openmetrics-text;q=0.001", True),
        ('application/openmetrics-text;version="\r\nSet-Cookie: a', True),
        ("application/openmetrics-textual", False),
        (",;=,;q=", False),
        ("a," * 10_000, False),
    ],
)
def test_the_accept_header_decides_between_the_two_texts(
    accept: str | None, open_metrics: bool
) -> None:
    assert wants_open_metrics(accept) is open_metrics
    body, kind = Scraped().metrics.render(accept)
    assert kind == (OPEN_METRICS if open_metrics else CLASSIC)
    assert body.endswith(b"# EOF\n") is open_metrics


def test_a_text_of_the_last_half_second_is_good_enough() -> None:
    scraped = Scraped()
    asked = 0

    def count() -> PipelineStatistics:
        nonlocal asked
        asked += 1
        return pipeline(in_flight=asked)

    scraped.metrics.moments.pipeline = count
    bodies = {scraped.metrics.render()[0] for _ in range(50)}
    assert (len(bodies), asked) == (1, 1)
    scraped.clock.now += 0.5
    assert numbers(scraped.metrics.render()[0])[sample_key("in_flight_batches")] == 2
    scraped.metrics.render("application/openmetrics-text")
    assert asked == 3, "each form has its own"


def test_two_metrics_have_nothing_in_common() -> None:
    one, other = Scraped(), Scraped()
    one.tell(events.LateResult(batch_id="b", station_id="S"))
    assert (one["late_results_total"], other["late_results_total"]) == (1, 0)


# ------------------------------------------------------------------------------------------------- pauses, commits' age


def test_pauses_of_the_collector_are_measured_while_it_is_watched() -> None:
    instants = iter((0.0, 0.002, 10.0, 10.5, 20.0, 22.0))
    pauses = GcPauses(clock=lambda: next(instants))
    before = len(gc.callbacks)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with pauses.watched():
            for generation in (0, 0, 2):
                gc.collect(generation)
    finally:
        if was_enabled:
            gc.enable()
    assert len(gc.callbacks) == before
    (family,) = pauses.collect()
    seen = {
        (sample.name.removeprefix("stationmaster_gc_pause_seconds_"), *sample.labels.values()): (
            sample.value
        )
        for sample in family.samples
    }
    assert seen["count", "0"] == 2
    assert seen["sum", "0"] == pytest.approx(0.502)
    assert seen["bucket", "0", "0.001"] == 0
    assert seen["bucket", "0", "0.0025"] == 1
    assert seen["bucket", "0", "+Inf"] == 2
    assert seen["count", "1"] == 0
    assert seen["bucket", "2", "1.0"] == 0
    assert seen["bucket", "2", "+Inf"] == 1


def test_a_collection_that_began_unwatched_is_not_counted() -> None:
    pauses = GcPauses(clock=lambda: 1.0)
    pauses._on_phase("stop", {"generation": 0})
    (family,) = pauses.collect()
    assert all(sample.value == 0 for sample in family.samples)


def offsets(first: int, last: int, partition: int = 0) -> tuple[OffsetRange, ...]:
    return (OffsetRange(topic="air", partition=partition, first=first, last=last),)


def test_the_oldest_waits_until_all_of_it_is_committed() -> None:
    waiting = Uncommitted()
    waiting.assign([("air", 0), ("air", 1)])
    waiting.came("air", 0, 9, now=100.0)
    waiting.came("air", 1, 3, now=104.0)
    waiting.came("air", 0, 19, now=108.0)
    assert waiting.oldest_age_s(110.0) == 10
    waiting.committed(offsets(0, 8))
    assert waiting.oldest_age_s(110.0) == 10
    waiting.committed(offsets(9, 12))
    assert waiting.oldest_age_s(110.0) == 6
    waiting.committed(offsets(0, 3, partition=1))
    assert waiting.oldest_age_s(110.0) == 2
    waiting.committed(offsets(0, 3, partition=7))
    waiting.leave([("air", 0), ("air", 5)])
    assert waiting.oldest_age_s(110.0) == 0


def test_a_source_without_commits_has_nothing_uncommitted() -> None:
    waiting = Uncommitted()
    waiting.came("file", 0, 9, now=100.0)
    assert waiting.oldest_age_s(200.0) == 0


def test_what_comes_close_together_counts_as_one_and_the_number_of_those_is_bounded() -> None:
    waiting = Uncommitted()
    waiting.assign([("air", 0)])
    waiting.came("air", 0, 1, now=100.0)
    waiting.came("air", 0, 2, now=100.2)
    waiting.committed(offsets(1, 1))
    assert waiting.oldest_age_s(101.0) == 1, "told too high rather than too low"
    waiting.committed(offsets(2, 2))
    assert waiting.oldest_age_s(101.0) == 0
    for number in range(5000):
        waiting.came("air", 0, number, now=200.0 + number)
    assert len(waiting._held["air", 0]) == 1024
    waiting.committed(offsets(0, 4998))
    assert waiting.oldest_age_s(6000.0) == 6000 - (200 + 1023)
    waiting.committed(offsets(0, 4999))
    assert waiting.oldest_age_s(6000.0) == 0
