"""What has a span inside a batch's: calls of the handler, calls to the model server, uploads.

The batcher mixes texts of many stations and batches in one call, and its calls are made by tasks of its own. So a text
is remembered with the span that asks for it while it waits; a call finds its askers by its texts. Two who wait for
equal texts are both taken for askers of the first call that holds it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import attrs
from opentelemetry import context as contexts
from opentelemetry import trace

from stationmaster.abc import Accepted
from stationmaster.service.tracing.spans import (
    BATCH_ID,
    STATION_ID,
    BatchSpans,
    batch_context,
    current_span,
    fail,
    http_headers,
)
from stationmaster.workers import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.util.types import Attributes

    from stationmaster.abc import (
        BatchHandler,
        BlockingHandler,
        Embedder,
        Handler,
        Observer,
        Report,
        Sink,
        StationHandler,
        UploadAnswer,
        Vector,
    )
    from stationmaster.batch import Batch, BatchReport, StationInput
    from stationmaster.handlers import TextEmbedder


@attrs.define(eq=False)
class SpanTracing:
    """Makes all spans of the service, see `stationmaster.service.tracing.Tracing`."""

    spans: BatchSpans
    _askers: dict[str, list[Context]] = attrs.field(factory=dict, init=False)
    """Text -> the contexts that wait for its vector."""

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Who makes the batches' spans."""
        return (self.spans,)

    @property
    def http_headers(self) -> Callable[[], Mapping[str, str]]:
        """Gives `traceparent` of the current span."""
        return http_headers

    def handler(self, handler: Handler, /) -> Handler:
        """Give each call a span, current inside of it; one call of a batch handler has one."""
        kind = kind_of(handler)
        if kind == "station":
            return _traced_station(cast("StationHandler", handler), self.spans)
        if kind == "blocking":
            return _traced_blocking(cast("BlockingHandler", handler), self.spans)
        return _traced_batch(cast("BatchHandler", handler), self.spans)

    def batcher(self, batcher: TextEmbedder, /) -> TextEmbedder:
        """Remember who asks."""
        return AskedBatcher(batcher, self._askers)

    def embedder(self, embedder: Embedder, /) -> Embedder:
        """Give each call that a traced span waits for a span with links to those who ask."""
        return TracedEmbedder(embedder, self.spans.tracer, self._askers)

    def sink(self, sink: Sink, /) -> Sink:
        """Give each upload a span, current inside of it."""
        return TracedSink(sink, self.spans)


def _station_attributes(station: StationInput) -> dict[str, str]:
    return {BATCH_ID: station.batch_id, STATION_ID: station.station_id}


def _traced_station(handle: StationHandler, spans: BatchSpans) -> StationHandler:
    async def handle_traced(station: StationInput) -> Mapping[str, Any] | None:
        batch = spans.take_station(station.batch_id)
        if batch is None:
            return await handle(station)
        attributes = _station_attributes(station)
        with current_span(spans.tracer, "station", batch.context, attributes=attributes):
            return await handle(station)

    return handle_traced


def _traced_blocking(handle: BlockingHandler, spans: BatchSpans) -> BlockingHandler:
    def handle_traced(station: StationInput) -> Mapping[str, Any] | None:
        batch = spans.take_station(station.batch_id)
        if batch is None:
            return handle(station)
        attributes = _station_attributes(station)
        with current_span(spans.tracer, "station", batch.context, attributes=attributes):
            return handle(station)

    return handle_traced


def _traced_batch(handle: BatchHandler, spans: BatchSpans) -> BatchHandler:
    async def handle_traced(batch: Batch, report: Report) -> None:
        traced = spans.take_station(batch.batch_id)
        if traced is None:
            return await handle(batch, report)
        attributes: Attributes = {
            BATCH_ID: batch.batch_id,
            "stationmaster.stations": len(batch.entries),
        }
        with current_span(spans.tracer, "stations", traced.context, attributes=attributes):
            return await handle(batch, report)

    return handle_traced


@attrs.define(eq=False)
class AskedBatcher:
    """A batcher whose traced callers are known while they wait."""

    _batcher: TextEmbedder
    _askers: dict[str, list[Context]]

    async def embed(self, text: str, /, **options: Any) -> Vector:  # noqa: ANN401 - the batcher's
        """Ask for one text."""
        if not trace.get_current_span().is_recording():
            return await self._batcher.embed(text, **options)
        with self._asking((text,)):
            return await self._batcher.embed(text, **options)

    async def embed_many(
        self,
        texts: Sequence[str],
        /,
        **options: Any,  # noqa: ANN401 - the batcher's
    ) -> Sequence[Vector | Exception]:
        """Ask for several texts."""
        if not trace.get_current_span().is_recording():
            return await self._batcher.embed_many(texts, **options)
        with self._asking(tuple(texts)):
            return await self._batcher.embed_many(texts, **options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Pass on the rest: a handler may know that this is a batcher."""
        return getattr(self._batcher, name)

    def expect(self, rows: int, /) -> None:
        """Announce rows."""
        self._batcher.expect(rows)

    @contextmanager
    def _asking(self, texts: Iterable[str]) -> Iterator[None]:
        asker = contexts.get_current()
        for text in texts:
            self._askers.setdefault(text, []).append(asker)
        try:
            yield
        finally:
            for text in texts:
                left = self._askers[text]
                left.remove(asker)
                if not left:
                    del self._askers[text]


@attrs.define(eq=False)
class TracedEmbedder:
    """An embedder whose calls have spans, if somebody who is traced asks."""

    _embedder: Embedder
    _tracer: trace.Tracer
    _askers: dict[str, list[Context]]

    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        """Make one call, within the batch of its first asker: a span has one parent, and links to the others."""
        askers = self._who_asks(texts) if self._askers else []
        if not askers:
            return await self._embedder.embed(texts)
        links = {
            context.span_id: trace.Link(context)
            for context in (trace.get_current_span(asker).get_span_context() for asker in askers)
        }
        with current_span(
            self._tracer,
            "embed",
            batch_context(askers[0]),
            kind=trace.SpanKind.CLIENT,
            attributes={"stationmaster.rows": len(texts)},
            links=list(links.values()),
        ):
            return await self._embedder.embed(texts)

    def _who_asks(self, texts: Iterable[str]) -> list[Context]:
        return [asker for text in texts for asker in self._askers.get(text, ())]


@attrs.define(eq=False)
class TracedSink:
    """A sink whose uploads have spans."""

    _sink: Sink
    _spans: BatchSpans

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        """Upload; inside, the span is the current one: also of a batch that is not traced, so that its target knows."""
        batch_id = report.batch.batch_id
        batch = self._spans.find(batch_id)
        if batch is None:
            return await self._sink.upload(report)
        with current_span(
            self._spans.tracer,
            "upload",
            batch.context,
            kind=trace.SpanKind.CLIENT,
            attributes={BATCH_ID: batch_id},
        ) as span:
            answer = await self._sink.upload(report)
            if answer.status is not None:
                span.set_attribute("http.response.status_code", answer.status)
            if not isinstance(answer, Accepted):
                fail(span, getattr(answer, "reason", f"rejected: {answer.status}"))
            return answer
