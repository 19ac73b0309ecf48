"""One model server over HTTP: a question, and what its answer means.

2xx                  the body, for whoever knows its form; ProtocolError if it is too long or compressed
400, 413, 422        RowRejectedError: one of the texts is refused; the server does not say which in a way to trust
429, 503             EmbedderBusyError, with `Retry-After` if it is given
408, 409, 424, 425, other 5xx, no answer     EmbedderUnavailableError
3xx, 401, 403, 404, any other 4xx            EmbedderRefusedError: URL, key or model name are wrong
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import orjson

from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.http import HttpError, open_http_client
from stationmaster.http_words import bearer, error_text, hide, parse_retry_after

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping, Sequence

    from stationmaster.abc import Vector
    from stationmaster.errors import EmbedderError
    from stationmaster.http import HttpAnswer, HttpClient


class ReadAnswer(Protocol):
    """One of the readers of `answers`."""

    def __call__(
        self, body: bytes, *, count: int, dimensions: int | None, secret: str | None
    ) -> list[Vector]:
        """Return one vector per text; ProtocolError if there are none in it."""
        ...


@attrs.define(eq=False)
class ModelServer:
    """Asks one server; made by `open_model_server`. Each call under way has its own connection."""

    where: str
    """Its URL, for messages."""
    _client: HttpClient
    key: str | None = attrs.field(repr=False)
    dimensions: int | None
    """Numbers in every vector: as configured, else as in the first good answer; None before that."""
    _max_answer_bytes: int
    _to_check: str
    """What is wrong if it refuses us."""
    keeps_dimensions: bool = attrs.field(default=True, init=False)
    """The first good answer fixes `dimensions`. Not so for one of several servers: what is good is not its to say."""

    async def embed(
        self, path: str, form: Mapping[str, Any], *, texts: Sequence[str], read: ReadAnswer
    ) -> list[Vector]:
        """Send a form that holds these texts, and return the vectors of the answer, in their order.

        Raises:
            EmbedderError: see the top of this file; RowRejectedError also for a text that no JSON can hold, unsent.
        """
        content = _encode(form, texts)
        body = await self._request("POST", path, content, {"Content-Type": "application/json"})
        try:
            vectors = read(body, count=len(texts), dimensions=self.dimensions, secret=self.key)
        except ProtocolError as error:
            raise self.broken(error) from None
        if self.dimensions is None and self.keeps_dimensions:
            self.dimensions = len(vectors[0])
        return vectors

    async def get(self, path: str) -> bytes:
        """Return the body of a success.

        Raises:
            EmbedderError: see the top of this file.
        """
        return await self._request("GET", path, b"", {})

    def broken(self, error: ProtocolError) -> ProtocolError:
        """Return the error with the server's name in it, and without the key, which servers quote."""
        return ProtocolError(hide(f"{self.where}: {error}", self.key))

    async def _request(
        self, method: str, path: str, content: bytes, headers: Mapping[str, str]
    ) -> bytes:
        try:
            answer = await self._client.request(
                method,
                path,
                content=content,
                headers=headers,
                max_answer_bytes=self._max_answer_bytes,
            )
        except HttpError as error:
            if error.kind in {"too-long", "encoding"}:
                raise ProtocolError(str(error)) from error
            raise EmbedderUnavailableError(str(error)) from error
        if not 200 <= answer.status < 300:
            raise self._error(answer)
        return answer.body

    def _error(self, answer: HttpAnswer) -> EmbedderError:
        status = answer.status
        words = error_text(answer.body, secret=self.key) or "no words"
        told = f"{self.where} answered {status}: {words}"
        if status in {400, 413, 422}:
            return RowRejectedError(told)
        if status in {429, 503}:
            wait_s = parse_retry_after(answer.headers.get("retry-after"), now=time.time())
            return EmbedderBusyError(told, retry_after_s=wait_s)
        if status in {408, 409, 424, 425} or status >= 500:
            return EmbedderUnavailableError(told)
        return EmbedderRefusedError(f"{told}. Check {self._to_check}")


@asynccontextmanager
async def open_model_server(
    url: str,
    *,
    key: str | None,
    dimensions: int | None,
    connections: int,
    timeout_s: float,
    max_answer_bytes: int,
    ssl_context: ssl.SSLContext | None,
    to_check: str,
) -> AsyncIterator[ModelServer]:
    """Open a client; its arguments are those of `open_openai_embedder`.

    Raises:
        ValueError: an argument is wrong.
    """
    if "?" in url:
        raise ValueError("the URL of a model server ends before the path of its calls: no query")
    if dimensions is not None and dimensions < 1:
        raise ValueError(f"dimensions must be at least 1, not {dimensions}")
    if not timeout_s > 0:  # so that NaN is caught too
        raise ValueError(f"timeout_s must be a positive number of seconds, not {timeout_s}")
    async with open_http_client(
        url.rstrip("/"),
        connections=connections,
        headers=None if key is None else bearer(key),
        timeout_s=timeout_s,
        ssl_context=ssl_context,
    ) as client:
        yield ModelServer(client.where, client, key, dimensions, max_answer_bytes, to_check)


def _encode(form: Mapping[str, Any], texts: Sequence[str]) -> bytes:
    try:
        return orjson.dumps(form)
    except orjson.JSONEncodeError:
        for row, text in enumerate(texts):
            if isinstance(text, str) and any("\ud800" <= char <= "\udfff" for char in text):
                raise RowRejectedError(
                    f"text {row} of {len(texts)} has a lone surrogate, which no JSON can hold; it was not sent"
                ) from None
        raise
