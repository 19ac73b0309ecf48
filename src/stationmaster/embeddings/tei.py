"""The client of a Text Embeddings Inference server: `POST /embed`, and its limits from `GET /info`."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import attrs
import orjson
import trio

from stationmaster.embeddings.answers import read_tei_answer
from stationmaster.embeddings.server import open_model_server
from stationmaster.errors import EmbedderRefusedError, ProtocolError, RowRejectedError
from stationmaster.http_words import error_text

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Sequence

    from stationmaster.abc import Vector
    from stationmaster.embeddings.server import ModelServer

LEARN_S: Final = 2.0
"""So long may a server take to tell its limits; then it is asked for vectors without knowing them."""


@attrs.frozen(kw_only=True)
class TeiBudget:
    """What the server says it takes; None where it does not say."""

    max_rows: int | None = None
    """Texts of one call (`max_client_batch_size`); more are refused."""
    max_tokens: int | None = None
    """Tokens that it computes together (`max_batch_tokens`); more take turns."""
    max_row_tokens: int | None = None
    """Tokens of one text (`max_input_length`); more are refused, or cut off, as the server is set."""


@attrs.define(eq=False)
class TeiEmbedder:
    """Asks one server; made by `open_tei_embedder`. Each call under way has its own connection."""

    server: ModelServer
    """Whom it asks."""
    budget: TeiBudget | None = attrs.field(default=None, init=False)
    """None before `learn`, or the first call, could ask for it."""

    @property
    def dimensions(self) -> int | None:
        """Numbers in every vector: as configured, else as in the first good answer; None before that."""
        return self.server.dimensions

    async def learn(self) -> TeiBudget:
        """Ask the server for its limits.

        Raises:
            EmbedderError: it did not tell; ProtocolError also if it has no such page.
        """
        try:
            body = await self.server.get("/info")
        except (EmbedderRefusedError, RowRejectedError) as error:
            raise ProtocolError(f"no limits to be had: {error}") from error
        try:
            self.budget = _read_budget(body, self.server.key)
        except ProtocolError as error:
            raise self.server.broken(error) from None
        return self.budget

    async def embed(self, texts: Sequence[str], /) -> list[Vector]:
        """Embed the texts (see `stationmaster.abc.Embedder`); split if the server takes no more in one."""
        if self.budget is None:
            with trio.move_on_after(LEARN_S), suppress(ProtocolError):
                await self.learn()
        most = (self.budget and self.budget.max_rows) or len(texts)
        vectors: list[Vector] = []
        for start in range(0, len(texts), most):
            rows = texts[start : start + most]
            vectors += await self.server.embed(
                "/embed", {"inputs": list(rows)}, texts=rows, read=read_tei_answer
            )
        # It may be something else than TEI, without limits to tell: if it answers it is not asked for them again.
        self.budget = self.budget or TeiBudget()
        return vectors  # noqa: ASYNC910 - there is at least one text


@asynccontextmanager
async def open_tei_embedder(
    url: str,
    *,
    key: str | None = None,
    dimensions: int | None = None,
    connections: int = 4,
    timeout_s: float = 30.0,
    max_answer_bytes: int = 64 * 1024 * 1024,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[TeiEmbedder]:
    """Open a client of `POST {url}/embed`. Nothing is asked yet.

    Args:
        url: http or https, ending before `/embed`, without a query.
        key: sent as `Authorization: Bearer`; never shown.
        dimensions: what every vector must have; if None, the first answer fixes it. It is not sent.
        connections: how many calls may be under way at once.
        timeout_s: for one call, from having a connection to the end of the answer.
        max_answer_bytes: the longest answer taken.
        ssl_context: whom to trust; the system's certificate authorities if None.

    Raises:
        ValueError: an argument is wrong.
    """
    async with open_model_server(
        url,
        key=key,
        dimensions=dimensions,
        connections=connections,
        timeout_s=timeout_s,
        max_answer_bytes=max_answer_bytes,
        ssl_context=ssl_context,
        to_check="the URL and the key",
    ) as server:
        yield TeiEmbedder(server)


def _read_budget(body: bytes, secret: str | None) -> TeiBudget:
    try:
        info = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        told = error_text(body, secret=secret)
        raise ProtocolError(f"/info is not JSON ({error}): {told}") from None
    if not isinstance(info, dict):
        raise ProtocolError(f"/info is not an object: {error_text(body, secret=secret)}")
    return TeiBudget(
        max_rows=_limit(info, "max_client_batch_size"),
        max_tokens=_limit(info, "max_batch_tokens"),
        max_row_tokens=_limit(info, "max_input_length"),
    )


def _limit(info: dict[str, object], name: str) -> int | None:
    value = info.get(name)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise ProtocolError(f"/info: {name} is not a number of at least 1: {value!r:.60}")
    return value
