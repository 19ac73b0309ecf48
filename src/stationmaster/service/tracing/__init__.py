"""Spans for OpenTelemetry, from outside: what is traced does not know of it. Without a `[tracing]` table there is none.

Only `exporting` and what it imports need the extra `otel`.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from stationmaster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from stationmaster.abc import Embedder, Handler, Observer, Sink
    from stationmaster.handlers import TextEmbedder
    from stationmaster.service.config import TracingConfig

__all__ = ["Tracing", "Untraced", "open_tracing"]


class Tracing(Protocol):
    """What the service asks of tracing: an observer, and wrappers around the parts that have spans."""

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Whom to tell what happens; nobody, if nothing is traced."""
        ...

    @property
    def http_headers(self) -> Callable[[], Mapping[str, str]] | None:
        """Gives the headers of an HTTP request that the current task sends."""
        ...

    def handler(self, handler: Handler, /) -> Handler:
        """Return a handler of the same kind, whose calls have spans."""
        ...

    def batcher(self, batcher: TextEmbedder, /) -> TextEmbedder:
        """Return the batcher, remembering which span asks for which text."""
        ...

    def embedder(self, embedder: Embedder, /) -> Embedder:
        """Return the embedder, whose calls have spans with links to those that ask."""
        ...

    def sink(self, sink: Sink, /) -> Sink:
        """Return the sink, whose uploads have spans."""
        ...


@attrs.frozen
class Untraced:
    """Leaves all as it is."""

    observers: tuple[Observer, ...] = attrs.field(default=(), init=False)
    http_headers: None = attrs.field(default=None, init=False)

    def handler(self, handler: Handler, /) -> Handler:
        """Return it."""
        return handler

    def batcher(self, batcher: TextEmbedder, /) -> TextEmbedder:
        """Return it."""
        return batcher

    def embedder(self, embedder: Embedder, /) -> Embedder:
        """Return it."""
        return embedder

    def sink(self, sink: Sink, /) -> Sink:
        """Return it."""
        return sink


@asynccontextmanager
async def open_tracing(config: TracingConfig | None) -> AsyncIterator[Tracing]:
    """Trace while the block runs; then send what there is, for 3 s at most.

    Raises:
        ConfigError: OpenTelemetry is not installed, or refuses its environment variables.
    """
    if config is None:
        await trio.lowlevel.checkpoint()
        yield Untraced()
        return
    try:
        from stationmaster.service.tracing.exporting import open_exporting  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        what = f"{error}; it needs the extra: pip install 'stationmaster[otel]'"
        raise ConfigError([f"tracing: {what}"]) from error
    async with open_exporting(config) as tracing:
        yield tracing
