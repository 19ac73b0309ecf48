"""Reading what was scraped, and parts that tell numbers of their own choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from stationmaster.batcher import BatcherStatistics
from stationmaster.embeddings import EndpointStatistics
from stationmaster.service.metrics import Metrics
from stationmaster.settings import PipelineStatistics
from stationmaster.state import StateStatistics, StoreStatistics
from tests.service import standing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster.events import Event
    from stationmaster.kafka import KafkaStatistics


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scraped:
    """A metrics object and its latest scrape."""

    def __init__(self, *topics: str) -> None:
        self.clock = Clock()
        self.metrics = Metrics(topics=topics, clock=self.clock)

    def tell(self, *events: Event) -> None:
        for event in events:
            self.metrics.observe(event)

    def scrape(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        self.clock.now += 1.0  # what was rendered before is not good any more
        return numbers(self.metrics.render()[0])

    def __getitem__(self, sample: str) -> float:
        return self.scrape()[sample_key(sample)]


def numbers(body: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return each sample of a classic text: name and labels -> value."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def sample_key(sample: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """Read `outbox_rows`, or `batches_closed_total topic=air closed_by=quorum`."""
    name, *labels = sample.split()
    pairs = (label.partition("=") for label in labels)
    return f"stationmaster_{name}", frozenset((key, value) for key, _, value in pairs)


def pipeline(**changes: int) -> PipelineStatistics:
    told: Mapping[str, int] = {"in_flight": 3, "in_flight_bytes": 300, "live_stations": 7} | changes
    return PipelineStatistics(
        **told,  # type: ignore[arg-type]
        draining=True,
        parked_bytes=50,
    )


def batcher() -> BatcherStatistics:
    return BatcherStatistics(
        queued_rows=5,
        queued_bytes=500,
        queued_tokens=0,
        oldest_age_s=0.25,
        calls_in_flight=2,
        rows_in_flight=64,
        busy_senders=2,
        paused_s=1.5,
        answered_rows=100,
        failed_rows=4,
        expired_rows=3,
        cancelled_rows=2,
        refused_rows=18,
        refusals={"QueueFullError": 11, "BatcherClosedError": 6, "SomethingNewError": 1},
        sent_texts=90,
        shared_rows=10,
        calls={"full": 3},
        abandoned_calls=1,
        call_estimate_s=0.125,
    )


def endpoints() -> tuple[EndpointStatistics, ...]:
    return tuple(
        EndpointStatistics(
            endpoint=f"http://{state}",
            state=state,
            open_s=0.0,
            paused_s=0.0,
            in_flight=1,
            abandoned=0,
            calls=20,
            failures=5,
            failures_in_a_row=0,
            seconds=None,
            last_trouble="",
        )
        for state in ("closed", "half-open", "open")
    )


def state() -> StateStatistics:
    return StateStatistics(
        outbox=StoreStatistics(rows=4, bytes=400, max_bytes=1000, oldest_age_s=60.0),
        dead_letters=StoreStatistics(rows=2, bytes=20, max_bytes=500, oldest_age_s=9.0),
    )


def kafka(topic: str = "air") -> KafkaStatistics:
    read: dict[str, Any] = {"topic": topic, "committed": 1, "high_watermark": 9, "outstanding": 6}
    return standing.kafka(
        standing.partition(0, 8, **read),
        standing.partition(1, None, **read),
        max_poll_exceeded=1,
        rebalances=2,
        lost_partitions=3,
        commit_errors=4,
        offset_resets=5,
        stalls=6,
        unreadable_headers=7,
        dropped_polls=8,
        pump_idle_s=0.05,
        pump_limit_s=15.0,
    )


def watch_everything(metrics: Metrics) -> None:
    moments = metrics.moments
    moments.pipeline, moments.batcher, moments.endpoints = pipeline, batcher, endpoints
    moments.state, moments.kafka = state, kafka
