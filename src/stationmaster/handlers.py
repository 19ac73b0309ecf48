"""The built-in handler, as both kinds (`embed`, `embed_batch`), and what every handler factory is given.

A handler is a function: `async def handle(station)`, `def handle(station)` or `async def handle_batch(batch, report)`.
One that needs set-up and tear-down is an async context manager factory instead: called with `Resources`, it gives the
handler, of any kind.
"""

from __future__ import annotations

import string
from contextlib import asynccontextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import attrs
import orjson
import trio

from stationmaster.batch import StationInput
from stationmaster.errors import (
    BatcherError,
    ConfigError,
    EmbedderError,
    QueueFullError,
    RequestTooLargeError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from stationmaster.abc import BatchHandler, Report, StationHandler, Vector
    from stationmaster.batch import Batch

_SLICE: Final = 32  # rows that are asked for, and reported, together
_ASKING: Final = 16  # slices of one batch under way: half of the batcher's queue by default


class TextEmbedder(Protocol):
    """What a handler needs of a request batcher."""

    async def embed(self, text: str, /) -> Vector:
        """Embed one text, sharing a call with whoever asks at the same time; honours the ambient deadline."""
        ...

    async def embed_many(
        self, texts: Sequence[str], /, *, return_errors: Literal[True]
    ) -> Sequence[Vector | Exception]:
        """Embed several texts, each row with a vector or an error of its own."""
        ...

    def expect(self, rows: int, /) -> None:
        """Announce rows that come at once: they need not wait for others."""
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

    It does not announce its rows to the batcher: whether all stations of a batch ask at once hangs on what each of them
    has to do, and an announcement that does not come true holds the others back.
    """
    options = EmbedOptions.read(resources.options)
    embedder = _embedder_of(resources)

    async def handle(station: StationInput) -> Mapping[str, Any]:
        text = options.text(station)
        while True:
            try:
                return _result(await embedder.embed(text), resources.model)
            except QueueFullError as full:
                # More stations than the batcher has rows: wait our turn, the job's own deadline is the bound.
                retry_after_s = full.retry_after_s
            await trio.sleep(max(retry_after_s, 0.001))

    yield handle


@asynccontextmanager
async def embed_batch(resources: Resources) -> AsyncIterator[BatchHandler]:
    """Give the built-in handler as a batch handler: the same texts and results, asked for many at a time.

    A station whose text cannot be made, or that the model server refuses, fails alone. The rows are announced to the
    batcher, so that a batch makes as few calls as it can.
    """
    options = EmbedOptions.read(resources.options)
    embedder = _embedder_of(resources)

    async def handle_batch(batch: Batch, report: Report) -> None:
        rows = _texts(batch, options, report)
        # No more than come in this very step; the later ones follow when calls end.
        embedder.expect(min(len(batch.entries), _ASKING * _SLICE))
        async with trio.open_nursery() as nursery:
            for _ in range(min(_ASKING, -(-len(batch.entries) // _SLICE))):
                nursery.start_soon(_ask, embedder, rows, report, resources.model)

    yield handle_batch


_Row: TypeAlias = tuple[str, str]  # station id, text


def _texts(batch: Batch, options: EmbedOptions, report: Report) -> Iterator[_Row]:
    """Yield the stations and their texts; report those that have none."""
    for station_id, readings in batch.entries.items():
        station = StationInput(station_id, readings, batch, batch.last_message[station_id])
        try:
            text = options.text(station)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            report(station_id, error)
        else:
            yield station_id, text


async def _ask(embedder: TextEmbedder, rows: Iterator[_Row], report: Report, model: str) -> None:
    """Work off slice after slice; several of these share `rows`."""
    while some := list(islice(rows, _SLICE)):
        await _embed_rows(embedder, some, report, model)
    await trio.lowlevel.checkpoint()


async def _embed_rows(  # noqa: ASYNC910 - it asks first
    embedder: TextEmbedder, rows: Sequence[_Row], report: Report, model: str
) -> None:
    answers: Sequence[Vector | Exception] | None = None
    while answers is None:
        try:
            answers = await embedder.embed_many([text for _, text in rows], return_errors=True)
        except QueueFullError as full:
            await trio.sleep(max(full.retry_after_s, 0.001))
        except (RequestTooLargeError, ValueError) as error:
            # One of them is too long, or empty: it must not harm the others.
            if len(rows) > 1:
                for row in rows:
                    await _embed_rows(embedder, [row], report, model)
                return  # noqa: ASYNC910
            answers = [error]
        except (BatcherError, EmbedderError) as error:
            answers = [error] * len(rows)
    for (station_id, _), answer in zip(rows, answers, strict=True):
        report(station_id, answer if isinstance(answer, Exception) else _result(answer, model))


def _embedder_of(resources: Resources) -> TextEmbedder:
    if resources.embedder is None:
        raise ConfigError(["embeddings: missing; the handler `embed` needs a model server"])
    return resources.embedder


def _result(vector: Vector, model: str) -> Mapping[str, Any]:
    numbers = vector.tolist() if isinstance(vector, memoryview) else list(vector)
    return {"embedding": numbers, "model": model, "dimensions": len(numbers)}
