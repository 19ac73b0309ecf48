"""What is so at this moment, asked when somebody scrapes: nothing here is kept up to date meanwhile.

Each part is asked behind a guard of its own: one that raises leaves its numbers out and is counted, the others stay.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from stationmaster.service.metrics import definitions as d

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from stationmaster.batcher import BatcherStatistics
    from stationmaster.embeddings import EndpointStatistics
    from stationmaster.kafka import KafkaStatistics
    from stationmaster.service.metrics.definitions import Definition
    from stationmaster.settings import PipelineStatistics
    from stationmaster.state import StateStatistics, StoreStatistics

_Numbers: TypeAlias = "Iterator[tuple[Definition, tuple[str, ...], float]]"

_REFUSALS: Final = {
    "QueueFullError": "queue_full",
    "RequestTooLargeError": "too_large",
    "DeadlineUnreachableError": "deadline_unreachable",
    "DeadlineExceededError": "deadline_exceeded",
    "BatcherClosedError": "closed",
}
_STATES: Final = {"closed": 0, "half-open": 1, "open": 2}

_log = logging.getLogger("stationmaster.metrics")


@attrs.define(eq=False, kw_only=True)
class Moments:
    """Whom to ask; None: there is no such part (yet). Each is cheap and must not wait."""

    pipeline: Callable[[], PipelineStatistics] | None = None
    batcher: Callable[[], BatcherStatistics] | None = None
    endpoints: Callable[[], Sequence[EndpointStatistics]] | None = None
    state: Callable[[], StateStatistics] | None = None
    kafka: Callable[[], KafkaStatistics] | None = None


class MomentsCollector:
    """Asks all parts at scrape time."""

    def __init__(self, moments: Moments, uncommitted_s: Callable[[], float]) -> None:
        self._moments = moments
        self._uncommitted_s = uncommitted_s
        self._errors = dict.fromkeys(d.SCRAPE_ERRORS.labels[0].values, 0)

    def collect(self) -> Iterable[Metric]:
        """Yield what the parts tell, then how often one did not."""
        families: dict[Definition, CounterMetricFamily | GaugeMetricFamily] = {}
        moments = self._moments
        self._ask(families, "pipeline", moments.pipeline, _pipeline)
        self._ask(families, "batcher", moments.batcher, _batcher)
        self._ask(families, "endpoints", moments.endpoints, _endpoints)
        self._ask(families, "state", moments.state, _state)
        self._ask(families, "kafka", moments.kafka, _kafka)
        yield from families.values()
        uncommitted = family(d.UNCOMMITTED_AGE)
        uncommitted.add_metric((), self._uncommitted_s())
        yield uncommitted
        errors = family(d.SCRAPE_ERRORS)
        for part, count in self._errors.items():
            errors.add_metric((part,), count)
        yield errors

    def _ask(
        self,
        families: dict[Definition, CounterMetricFamily | GaugeMetricFamily],
        part: str,
        ask: Callable[[], Any] | None,
        numbers_of: Callable[[Any], _Numbers],
    ) -> None:
        if ask is None:
            return
        try:
            numbers = list(numbers_of(ask()))
        except Exception as error:  # noqa: BLE001 - a scrape shows the others all the same
            if not self._errors[part]:  # once: the counter tells the rest
                _log.exception("%s has no numbers for a scrape: %s", part, type(error).__name__)
            self._errors[part] += 1
            return
        for definition, labels, number in numbers:
            if definition not in families:
                families[definition] = family(definition)
            families[definition].add_metric(labels, number)


def family(definition: Definition) -> CounterMetricFamily | GaugeMetricFamily:
    """Return an empty family for a definition."""
    kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    return kind(definition.name, definition.text, labels=definition.label_names)


def histogram_family(
    definition: Definition, counts: Mapping[tuple[str, ...], tuple[Sequence[int], float]]
) -> HistogramMetricFamily:
    """Return a histogram out of counts per bucket (one more than bounds: what lies beyond) and sums, by labels."""
    histogram = HistogramMetricFamily(
        definition.name, definition.text, labels=definition.label_names
    )
    bounds = [*map(float, definition.buckets), float("inf")]
    for labels, (numbers, total) in counts.items():
        reached = 0
        buckets: list[tuple[str, float]] = []
        for bound, number in zip(bounds, numbers, strict=True):
            reached += number
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), reached))
        histogram.add_metric(labels, buckets=buckets, sum_value=total)
    return histogram


def _pipeline(seen: PipelineStatistics) -> _Numbers:
    yield d.IN_FLIGHT_BATCHES, (), seen.in_flight
    yield d.IN_FLIGHT_BYTES, (), seen.in_flight_bytes
    yield d.PARKED_BYTES, (), seen.parked_bytes
    yield d.LIVE_STATIONS, (), seen.live_stations
    yield d.DRAINING, (), seen.draining


def _batcher(seen: BatcherStatistics) -> _Numbers:
    yield d.BATCHER_QUEUE_ROWS, (), seen.queued_rows
    yield d.BATCHER_QUEUE_BYTES, (), seen.queued_bytes
    yield d.BATCHER_QUEUE_OLDEST_AGE, (), seen.oldest_age_s
    yield d.BATCHER_IN_FLIGHT_CALLS, (), seen.calls_in_flight
    yield d.BATCHER_IN_FLIGHT_ROWS, (), seen.rows_in_flight
    yield d.BATCHER_PAUSED, (), seen.paused_s
    yield d.BATCHER_CALL_ESTIMATE, (), seen.call_estimate_s
    yield d.BATCHER_SHARED_ROWS, (), seen.shared_rows
    yield d.BATCHER_SENT_TEXTS, (), seen.sent_texts
    rows = dict.fromkeys(d.BATCHER_ROWS.labels[0].values, 0) | {
        "answered": seen.answered_rows,
        "failed": seen.failed_rows,
        "expired": seen.expired_rows,
        "cancelled": seen.cancelled_rows,
    }
    for error, count in seen.refusals.items():
        rows[_REFUSALS.get(error, d.OTHER)] += count
    for outcome, count in rows.items():
        yield d.BATCHER_ROWS, (outcome,), count


def _endpoints(seen: Sequence[EndpointStatistics]) -> _Numbers:
    for one in seen:
        labels = (d.ENDPOINT_STATE.labels[0].value(one.endpoint),)
        yield d.ENDPOINT_STATE, labels, _STATES[one.state]
        yield d.ENDPOINT_IN_FLIGHT, labels, one.in_flight
        yield d.ENDPOINT_CALLS, labels, one.calls
        yield d.ENDPOINT_FAILURES, labels, one.failures


def _state(seen: StateStatistics) -> _Numbers:
    outbox: StoreStatistics = seen.outbox
    yield d.OUTBOX_ROWS, (), outbox.rows
    yield d.OUTBOX_BYTES, (), outbox.bytes
    yield d.OUTBOX_MAX_BYTES, (), outbox.max_bytes
    yield d.OUTBOX_OLDEST_AGE, (), outbox.oldest_age_s
    yield d.DEAD_LETTERS_ROWS, (), seen.dead_letters.rows
    yield d.DEAD_LETTERS_BYTES, (), seen.dead_letters.bytes
    yield d.DEAD_LETTERS_MAX_BYTES, (), seen.dead_letters.max_bytes


def _kafka(seen: KafkaStatistics) -> _Numbers:
    yield d.KAFKA_PARTITIONS, (), len(seen.partitions)
    yield d.KAFKA_SETTLED, (), seen.is_settled
    yield d.KAFKA_PUMP_IDLE, (), seen.pump_idle_s
    yield d.KAFKA_PUMP_LIMIT, (), seen.pump_limit_s
    if seen.broker_silent_s is not None:
        yield d.KAFKA_BROKER_SILENT, (), seen.broker_silent_s
    yield d.KAFKA_COMMIT_ERRORS, (), seen.commit_errors
    yield d.KAFKA_LOST_PARTITIONS, (), seen.lost_partitions
    yield d.KAFKA_MAX_POLL_EXCEEDED, (), seen.max_poll_exceeded
    yield d.KAFKA_OFFSET_RESETS, (), seen.offset_resets
    yield d.KAFKA_STALLS, (), seen.stalls
    yield d.KAFKA_UNREADABLE_HEADERS, (), seen.unreadable_headers
    for held in seen.partitions:
        labels = d.KAFKA_LAG.labels[0].value(held.topic), str(held.partition)
        yield d.KAFKA_OUTSTANDING, labels, held.outstanding
        if held.lag is not None:
            yield d.KAFKA_LAG, labels, held.lag
