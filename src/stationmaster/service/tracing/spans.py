"""The spans of batches: made from events, and looked up by whatever has a span inside one.

    batch             from opening to delivery; its parent is the `traceparent` of its message
      station         one call of the handler, see `wrappers`
      embed           one call of the batcher to the model server
      upload          one request to the target

Rules:
1. One traceparent among a batch's messages is the parent; several are links, since a span has one parent only.
2. Whether a batch is traced is decided at its opening, for all that is in it: by the parent's flag; with several, if
   one of them is sampled; without any, by the ratio.
3. What is not traced costs a look into a table per station, and carries the trace's id on to the target, so that this
   does not trace it either.
4. Ids are attributes, never names: a name stands for many spans.
5. A batch may change its id when messages join it (`by = "timestamp"`): while it is open it is known by its first one,
   then by that of its report.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from typing_extensions import override  # the SDK needs it too

from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    BatchOpened,
    BatchWithdrawn,
    UploadDone,
    UploadFailed,
    UploadKept,
    UploadRejected,
)
from stationmaster.outcomes import failure_of, is_cancellation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, TraceState
    from opentelemetry.util.types import Attributes, AttributeValue

    from stationmaster.batch import Batch, BatchReport
    from stationmaster.events import Event

BATCH_ID: Final = "stationmaster.batch.id"
STATION_ID: Final = "stationmaster.station.id"
_OUTCOME: Final = "stationmaster.outcome"
_MOST_CHARS: Final = 200
_W3C: Final = TraceContextTextMapPropagator()
_IN_BATCH: Final = contexts.create_key("stationmaster-batch")


def http_headers() -> Mapping[str, str]:
    """Return `traceparent` of the current span; nothing if there is none."""
    headers: dict[str, str] = {}
    _W3C.inject(headers)
    return headers


def batch_context(context: Context) -> Context:
    """Return the context of the batch that this one is within, else itself."""
    found = contexts.get_value(_IN_BATCH, context)
    return found if isinstance(found, contexts.Context) else context


@contextmanager
def current_span(
    tracer: trace.Tracer,
    name: str,
    parent: Context,
    *,
    kind: SpanKind = trace.SpanKind.INTERNAL,
    attributes: Attributes = None,
    links: Sequence[Link] = (),
) -> Iterator[Span]:
    """Have a span that is the current one inside the block; an error that leaves the block is its status."""
    span = tracer.start_span(name, parent, kind, attributes, links)
    token = contexts.attach(trace.set_span_in_context(span, parent))
    try:
        yield span
    except BaseException as error:
        _tell_error(span, error)
        raise
    finally:
        contexts.detach(token)
        span.end()


def fail(span: Span, reason: str) -> None:
    """Let a span's status be an error."""
    span.set_status(trace.Status(trace.StatusCode.ERROR, reason[:_MOST_CHARS]))


def _tell_error(span: Span, error: BaseException) -> None:
    if is_cancellation(error):  # a batch that closes cancels whoever still works: that is no error
        span.set_attribute(_OUTCOME, "cancelled")
        return
    span.set_attribute(_OUTCOME, "failed")
    span.set_attribute("error.type", type(error).__name__)
    fail(span, failure_of("", error).reason if isinstance(error, Exception) else repr(error))


@attrs.define(eq=False)
class TracedBatch:
    """A batch whose span is open."""

    batch: Batch
    span: Span
    context: Context
    """Parent of whatever happens for it."""
    spans_left: int
    """Station spans that it may still have; 0 from the start if it is not traced."""


class BatchSpans:
    """Makes the spans of batches; an observer."""

    detailed: bool = False

    def __init__(self, tracer: trace.Tracer, *, station_spans: int) -> None:
        """Use this tracer, and let a batch have so many station spans."""
        self.tracer = tracer
        self._station_spans = station_spans
        self._open: dict[str, TracedBatch] = {}

    def find(self, batch_id: str) -> TracedBatch | None:
        """Return the batch of this id, traced or not, if it is neither delivered nor given up."""
        return self._open.get(batch_id)

    def take_station(self, batch_id: str) -> TracedBatch | None:
        """Return the batch of this id if it may have one more station span. In any thread."""
        batch = self._open.get(batch_id)
        if batch is None or batch.spans_left <= 0:
            return None
        batch.spans_left -= 1  # threads may let one too many through: no harm
        return batch

    def observe(self, event: Event, /) -> None:
        """Begin a span, or end one."""
        match event:
            case BatchOpened():
                self._begin(event.batch)
            case BatchClosed():
                self._decide(event.report, lateness_s=event.lateness_s)
            case UploadDone():
                self._end(event.report.batch.batch_id, "uploaded")
            case UploadKept():
                self._end(event.batch_id, "kept", reason=event.reason)
            case UploadRejected():
                self._end(
                    event.report.batch.batch_id, "rejected", f"the target answered {event.status}"
                )
            case UploadFailed():
                self._end(event.batch_id, "failed", event.reason)
            case BatchDropped():
                self._give_up(event.batch, "dropped")
            case BatchWithdrawn():
                self._give_up(event.batch, "withdrawn")
            case _:
                pass

    def close(self) -> None:
        """End the spans of batches of which nothing more will be heard."""
        for batch_id in list(self._open):
            self._end(batch_id, "cut", "the service ended")

    def _begin(self, batch: Batch) -> None:
        earlier = self._open.get(batch.batch_id)
        if earlier is not None:  # it was withdrawn and came back before its end was told
            self._end(batch.batch_id, "withdrawn")
        parents = _contexts_of(batch.traceparents)
        within = contexts.Context()
        if len(parents) == 1:
            within = trace.set_span_in_context(trace.NonRecordingSpan(parents[0]), within)
        span = self.tracer.start_span(
            "batch",
            within,
            trace.SpanKind.CONSUMER,
            {
                BATCH_ID: batch.batch_id,
                "messaging.destination.name": batch.topic,
                "stationmaster.stations": len(batch.entries),
            },
            [trace.Link(parent) for parent in parents] if len(parents) > 1 else (),
        )
        context = trace.set_span_in_context(span, contexts.Context())
        self._open[batch.batch_id] = TracedBatch(
            batch,
            span,
            contexts.set_value(_IN_BATCH, context, context),
            self._station_spans if span.is_recording() else 0,
        )

    def _decide(self, report: BatchReport, *, lateness_s: float) -> None:
        opened = self._remove(report.batch)
        if opened is None:
            return
        self._open[report.batch.batch_id] = opened
        span = opened.span
        if not span.is_recording():
            return
        known = set(opened.batch.traceparents)
        for parent in _contexts_of(one for one in report.batch.traceparents if one not in known):
            span.add_link(parent)
        decided: dict[str, AttributeValue] = {
            BATCH_ID: report.batch.batch_id,
            "stationmaster.stations": len(report.results),
            "stationmaster.closed_by": report.closed_by.value,
            "stationmaster.lateness_s": lateness_s,
        }
        for outcome, count in report.counts.items():
            if count:
                decided[f"stationmaster.stations.{outcome.value}"] = count
        span.set_attributes(decided)
        span.add_event("closed")

    def _give_up(self, batch: Batch, delivery: str) -> None:
        opened = self._remove(batch)
        if opened is not None:
            self._open[batch.batch_id] = opened
            self._end(batch.batch_id, delivery, f"{delivery}: it comes again")

    def _remove(self, batch: Batch) -> TracedBatch | None:
        """Take out the entry of this very batch, whichever id it had when it was opened."""
        for batch_id, opened in self._open.items():
            if opened.batch.entries is batch.entries:
                return self._open.pop(batch_id)
        return None

    def _end(self, batch_id: str, delivery: str, fault: str = "", *, reason: str = "") -> None:
        opened = self._open.pop(batch_id, None)
        if opened is None:
            return
        span = opened.span
        span.set_attribute("stationmaster.delivery", delivery)
        if reason:
            span.set_attribute("stationmaster.reason", reason[:_MOST_CHARS])
        if fault:
            fail(span, fault)
        span.end()


def _contexts_of(traceparents: Iterable[str]) -> list[SpanContext]:
    """Read what is well-formed; anybody who can write to a topic can write these."""
    found: list[SpanContext] = []
    for traceparent in traceparents:
        read = _W3C.extract({"traceparent": traceparent}, contexts.Context())
        parent = trace.get_current_span(read).get_span_context()
        if parent.is_valid:
            found.append(parent)
    return found


class BatchSampler(Sampler):
    """Decides for batches without one parent: by their links if they have any, else by a ratio."""

    def __init__(self, ratio: float) -> None:
        """Sample this share of the batches that have no links."""
        self._by_ratio = TraceIdRatioBased(ratio)

    @override
    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide."""
        by: Sampler = self._by_ratio
        if links:
            by = (
                ALWAYS_ON if any(link.context.trace_flags.sampled for link in links) else ALWAYS_OFF
            )
        arguments: tuple[Any, ...] = (kind, attributes, links, trace_state)
        return by.should_sample(parent_context, trace_id, name, *arguments)

    @override
    def get_description(self) -> str:
        """Say what it does, for traces."""
        return f"BatchSampler{{{self._by_ratio.rate}}}"
