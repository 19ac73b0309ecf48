"""A pipeline whose spans end up in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased

from stationmaster.pipeline import open_pipeline
from stationmaster.service.tracing.spans import BatchSampler, BatchSpans
from stationmaster.service.tracing.wrappers import SpanTracing
from stationmaster.settings import PipelineSettings
from stationmaster.testing import MemorySource, RecordingSink
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from opentelemetry.trace import SpanContext

    from stationmaster.abc import Handler, Outbox, Sink
    from stationmaster.pipeline import Pipeline

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{SPAN}-01"
UNSAMPLED = f"00-{TRACE}-{SPAN}-00"


def traceparent(number: int, *, flags: str = "01") -> str:
    return f"00-{number:032x}-{number:016x}-{flags}"


class Traced:
    """The surroundings of a traced pipeline, kept for looking at them after its end."""

    def __init__(self, *, ratio: float = 1.0, station_spans: int = 100) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(
            sampler=ParentBased(BatchSampler(ratio)), shutdown_on_exit=False
        )
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")
        self.spans = BatchSpans(self.tracer, station_spans=station_spans)
        self.tracing = SpanTracing(self.spans)
        self.source = MemorySource()
        self.sink = RecordingSink()

    def put(
        self, *stations: str, header: str | bytes | None = None, partition: int = 0, **fields: Any
    ) -> None:
        value = header.encode() if isinstance(header, str) else header
        headers = () if header is None else (("other", b"1"), ("traceparent", value))
        self.source.put("air", partition, message_bytes(*stations, **fields), headers=headers)

    def open(
        self,
        handler: Handler,
        *,
        sink: Sink | None = None,
        outbox: Outbox | None = None,
        **settings: Any,
    ) -> AbstractAsyncContextManager[Pipeline]:
        return open_pipeline(
            self.source,
            handler=self.tracing.handler(handler),
            sink=self.tracing.sink(sink or self.sink),
            outbox=outbox,
            settings=PipelineSettings(**settings),
            observer=self.spans,
        )

    async def run(self, handler: Handler, **options: Any) -> None:
        self.source.end()
        async with self.open(handler, **options) as pipeline:
            await pipeline.wait_finished()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


def attributes(span: ReadableSpan) -> dict[str, Any]:
    assert span.attributes is not None
    prefix = "stationmaster."
    return {key.removeprefix(prefix): value for key, value in span.attributes.items()}


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    return (
        span.parent is not None
        and span.parent.span_id == context_of(parent).span_id
        and context_of(span).trace_id == context_of(parent).trace_id
    )


def linked(span: ReadableSpan) -> Sequence[str]:
    """Return the ids of the spans that this one is linked to, as in a traceparent."""
    return [f"{link.context.span_id:016x}" for link in span.links]
