"""From spans to a collector: OpenTelemetry's SDK, and its exporter for OTLP over HTTP in a thread of its own."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import structlog
import trio
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased

from stationmaster import __version__
from stationmaster.errors import ConfigError
from stationmaster.service.tracing.spans import BatchSampler, BatchSpans
from stationmaster.service.tracing.wrappers import SpanTracing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.service.config import TracingConfig

_LAST_SPANS_S: Final = 3.0


@asynccontextmanager
async def open_exporting(config: TracingConfig) -> AsyncIterator[SpanTracing]:
    """Export spans while the block runs, then what is left for 3 s at most; spans beyond that are lost.

    If nobody has set a global tracer provider, this is the one: so a handler's own spans go the same way.

    Raises:
        ConfigError: OpenTelemetry refuses its environment variables.
    """
    try:
        # Its own hook for the interpreter's end would wait for a collector that hangs.
        provider = TracerProvider(
            sampler=ParentBased(BatchSampler(config.ratio)),
            resource=_resource(),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(config.endpoint)))
    except ValueError as error:
        raise ConfigError([f"tracing: OpenTelemetry's settings (OTEL_...): {error}"]) from error
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(provider)
    spans = BatchSpans(
        provider.get_tracer("stationmaster", __version__), station_spans=config.station_spans
    )
    await trio.lowlevel.checkpoint()
    try:
        yield SpanTracing(spans)
    finally:
        spans.close()
        with trio.move_on_after(_LAST_SPANS_S, shield=True) as limit:
            # Not among the threads of others, which may all hang.
            await trio.to_thread.run_sync(
                provider.shutdown,
                thread_name="last spans",
                abandon_on_cancel=True,
                limiter=trio.CapacityLimiter(1),
            )
        if limit.cancelled_caught:
            log = structlog.stdlib.get_logger("stationmaster")
            log.warning("last spans given up", after_s=_LAST_SPANS_S)


def _resource() -> Resource:
    """Name the service, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES do."""
    told = OTELResourceDetector().detect().attributes
    return Resource.create({} if SERVICE_NAME in told else {SERVICE_NAME: "stationmaster"})
