"""The client of a model server with an OpenAI-like `POST /embeddings`; trusts nothing in its answers.

An answer is good if it has one vector per text, of one dimension, of finite numbers, and either no `index` at all or
each index once. `model` in it need not be the one asked for: servers have aliases, and answer with the real name.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from stationmaster.embeddings.answers import read_openai_answer
from stationmaster.embeddings.server import open_model_server

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Sequence

    from stationmaster.abc import Vector
    from stationmaster.embeddings.server import ModelServer

Encoding: TypeAlias = Literal["base64", "float"]


@attrs.define(eq=False)
class OpenAIEmbedder:
    """Asks one model of one server; made by `open_openai_embedder`. Each call under way has its own connection."""

    model: str
    server: ModelServer
    """Whom it asks."""
    _encoding: Encoding

    @property
    def dimensions(self) -> int | None:
        """Numbers in every vector: as configured, else as in the first good answer; None before that."""
        return self.server.dimensions

    async def embed(self, texts: Sequence[str], /) -> list[Vector]:
        """Embed the texts in one call (see `stationmaster.abc.Embedder`)."""
        form = {"model": self.model, "input": list(texts), "encoding_format": self._encoding}
        return await self.server.embed("/embeddings", form, texts=texts, read=read_openai_answer)


@asynccontextmanager
async def open_openai_embedder(
    url: str,
    *,
    model: str,
    key: str | None = None,
    dimensions: int | None = None,
    encoding: Encoding = "base64",
    connections: int = 4,
    timeout_s: float = 30.0,
    max_answer_bytes: int = 64 * 1024 * 1024,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[OpenAIEmbedder]:
    """Open a client of `POST {url}/embeddings`.

    Args:
        url: http or https, ending before `/embeddings`, without a query.
        model: the name of the model.
        key: sent as `Authorization: Bearer`; never shown.
        dimensions: what every vector must have; if None, the first answer fixes it. It is not sent.
        encoding: what to ask for: base64 is a quarter of the size. Both are understood, whatever was asked.
        connections: how many calls may be under way at once.
        timeout_s: for one call, from having a connection to the end of the answer.
        max_answer_bytes: the longest answer taken.
        ssl_context: whom to trust; the system's certificate authorities if None.

    Raises:
        ValueError: an argument is wrong.
    """
    if encoding not in {"base64", "float"}:
        raise ValueError(f"encoding must be base64 or float, not {encoding!r}")
    async with open_model_server(
        url,
        key=key,
        dimensions=dimensions,
        connections=connections,
        timeout_s=timeout_s,
        max_answer_bytes=max_answer_bytes,
        ssl_context=ssl_context,
        to_check=f"the URL, the key and the model {model!r}",
    ) as server:
        yield OpenAIEmbedder(model, server, encoding)
