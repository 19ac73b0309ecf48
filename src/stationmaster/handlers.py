"""The built-in handler `embed`, and what every handler factory is given.

A handler is a coroutine function `async def handle(station) -> mapping or None`. A handler that needs set-up and
tear-down is an async context manager factory instead: called with `Resources`, it gives the handler.
"""

from __future__ import annotations

import string
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import orjson
import trio

from stationmaster.errors import ConfigError, QueueFullError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from stationmaster.abc import StationHandler, Vector
    from stationmaster.batch import StationInput


class TextEmbedder(Protocol):
    """What a handler needs of a request batcher."""

    async def embed(self, text: str, /) -> Vector:
        """Embed one text, sharing a call with whoever asks at the same time; honours the ambient deadline."""
        ...


@attrs.frozen(kw_only=True)
class Resources:
    """What a handler factory is given."""

    embedder: TextEmbedder | None = None
    """The request batcher; None if no `[embeddings]` are configured."""
    model: str = ""
    """The model's name, for results."""
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """`[stations] options`, as they stand in the configuration."""


@attrs.frozen(kw_only=True)
class EmbedOptions:
    """How a station's readings become one text.

    Without a template the text is canonical JSON (sorted keys, no spaces) of the chosen fields: an object for one
    reading, an array of objects for several.
    """

    fields: tuple[str, ...] = ()
    """Fields to keep; empty: all."""
    template: str = ""
    """`str.format` over the last reading's fields and `station_id`, such as `"{site}: {pm25} ug/m3"`."""

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> EmbedOptions:
        """Read `[stations] options` strictly.

        Raises:
            ConfigError: every fault, with its path.
        """
        faults = [
            f"stations.options.{name}: unknown key; expected fields or template"
            for name in options
            if name not in ("fields", "template")
        ]
        fields = options.get("fields", [])
        if not isinstance(fields, list) or not all(type(field) is str for field in fields):
            faults.append("stations.options.fields: expected a list of texts")
        template = options.get("template", "")
        if type(template) is not str:
            faults.append("stations.options.template: expected a text")
        elif fields and template:
            faults.append("stations.options.template: stands beside fields; expected one of them")
        elif fault := _template_fault(template):
            faults.append(f"stations.options.template: {fault}")
        if faults:
            raise ConfigError(faults)
        return cls(fields=tuple(fields), template=template)

    def text(self, station: StationInput) -> str:
        """Make the text.

        Raises:
            LookupError: the template names a field that the reading lacks.
        """
        if self.template:
            try:
                return self.template.format_map(
                    {**station.readings[-1], "station_id": station.station_id}
                )
            except KeyError as error:
                raise LookupError(
                    f"the template names {error}, the reading has no such field"
                ) from None
        readings: Sequence[Mapping[str, Any]] = station.readings
        if self.fields:
            readings = [
                {name: reading[name] for name in self.fields if name in reading}
                for reading in readings
            ]
        document = readings[0] if len(readings) == 1 else list(readings)
        return orjson.dumps(document, option=orjson.OPT_SORT_KEYS).decode()


def _template_fault(template: str) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"{error}; expected a format string"
    if any(not name or name[0].isdigit() for name in names):
        return "has a field without a name; expected names of readings in braces"
    return ""


@asynccontextmanager
async def embed(resources: Resources) -> AsyncIterator[StationHandler]:
    """Give the built-in handler: one text per station, one vector back.

    Its result is `{"embedding": [...], "model": ..., "dimensions": n}`.
    """
    options = EmbedOptions.read(resources.options)
    embedder = resources.embedder
    if embedder is None:
        raise ConfigError(["embeddings: missing; the handler `embed` needs a model server"])
    model = resources.model

    async def handle(station: StationInput) -> Mapping[str, Any]:
        vector = await _embed_when_there_is_room(embedder, options.text(station))
        numbers = vector.tolist() if isinstance(vector, memoryview) else list(vector)
        return {"embedding": numbers, "model": model, "dimensions": len(numbers)}

    yield handle


async def _embed_when_there_is_room(embedder: TextEmbedder, text: str) -> Vector:
    while True:
        try:
            return await embedder.embed(text)
        except QueueFullError as full:
            # More stations than the batcher has rows: wait our turn, the job's own deadline is the bound.
            retry_after_s = full.retry_after_s
        await trio.sleep(max(retry_after_s, 0.001))
