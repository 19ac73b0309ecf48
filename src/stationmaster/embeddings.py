"""The client of a model server with an OpenAI-like `POST /embeddings`; trusts nothing in its answers.

What an answer means:

    2xx                  vectors, if it keeps the contract: one per text, one dimension, finite numbers, and either no
                         `index` at all or each index once; else ProtocolError, as if it is not JSON or too long
    400, 413, 422        RowRejectedError: one of the texts is refused; the server does not say which in a way to trust
    429, 503             EmbedderBusyError, with `Retry-After` if it is given
    408, 409, 424, 425, other 5xx, no answer     EmbedderUnavailableError
    3xx, 401, 403, 404, any other 4xx            EmbedderRefusedError: URL, key or model name are wrong

`model` in an answer need not be the one asked for (servers have aliases, and answer with the real name).
"""

from __future__ import annotations

import binascii
import reprlib
import sys
import time
from array import array
from contextlib import asynccontextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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
    from collections.abc import AsyncIterator, Sequence

    from stationmaster.abc import Vector
    from stationmaster.errors import EmbedderError
    from stationmaster.http import HttpAnswer, HttpClient

Encoding: TypeAlias = Literal["base64", "float"]


@attrs.define(eq=False)
class OpenAIEmbedder:
    """Asks one model of one server; made by `open_openai_embedder`. Each call under way has its own connection."""

    model: str
    dimensions: int | None
    """Numbers in every vector: as configured, else as in the first good answer; None before that."""
    _client: HttpClient
    _key: str | None = attrs.field(repr=False)
    _encoding: Encoding
    _max_answer_bytes: int

    async def embed(self, texts: Sequence[str], /) -> list[Vector]:
        """Embed the texts in one call (see `stationmaster.abc.Embedder`)."""
        content = self._encode(texts)
        try:
            answer = await self._client.request(
                "POST",
                "/embeddings",
                content=content,
                headers={"Content-Type": "application/json"},
                max_answer_bytes=self._max_answer_bytes,
            )
        except HttpError as error:
            if error.kind in {"too-long", "encoding"}:
                raise ProtocolError(str(error)) from error
            raise EmbedderUnavailableError(str(error)) from error
        if not 200 <= answer.status < 300:
            raise self._error(answer)
        try:
            vectors = read_vectors(answer.body, count=len(texts), dimensions=self.dimensions)
        except ProtocolError as error:
            raise ProtocolError(hide(f"{self._client.where}: {error}", self._key)) from None
        if vectors and self.dimensions is None:
            self.dimensions = len(vectors[0])
        return vectors

    def _encode(self, texts: Sequence[str]) -> bytes:
        form = {"model": self.model, "input": list(texts), "encoding_format": self._encoding}
        try:
            return orjson.dumps(form)
        except orjson.JSONEncodeError:
            for row, text in enumerate(texts):
                if isinstance(text, str) and any("\ud800" <= char <= "\udfff" for char in text):
                    raise RowRejectedError(
                        f"text {row} of {len(texts)} has a lone surrogate, which no JSON can hold; it was not sent"
                    ) from None
            raise

    def _error(self, answer: HttpAnswer) -> EmbedderError:
        status = answer.status
        words = error_text(answer.body, secret=self._key) or "no words"
        told = f"{self._client.where} answered {status}: {words}"
        if status in {400, 413, 422}:
            return RowRejectedError(told)
        if status in {429, 503}:
            wait_s = parse_retry_after(answer.headers.get("retry-after"), now=time.time())
            return EmbedderBusyError(told, retry_after_s=wait_s)
        if status in {408, 409, 424, 425} or status >= 500:
            return EmbedderUnavailableError(told)
        return EmbedderRefusedError(f"{told}. Check the URL, the key and the model {self.model!r}")


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
    if "?" in url:
        raise ValueError("the URL of a model server ends before /embeddings and has no query")
    if dimensions is not None and dimensions < 1:
        raise ValueError(f"dimensions must be at least 1, not {dimensions}")
    if encoding not in {"base64", "float"}:
        raise ValueError(f"encoding must be base64 or float, not {encoding!r}")
    async with open_http_client(
        url.rstrip("/"),
        connections=connections,
        headers=None if key is None else bearer(key),
        timeout_s=timeout_s,
        ssl_context=ssl_context,
    ) as client:
        yield OpenAIEmbedder(model, dimensions, client, key, encoding, max_answer_bytes)


def read_vectors(body: bytes, *, count: int, dimensions: int | None) -> list[Vector]:
    """Return the vectors of an answer, in the order of the texts.

    Args:
        body: `{"data": [{"index", "embedding"}, ...], "model"}`, each embedding a list of numbers or a base64 text
            of float32, little-endian.
        count: how many texts were asked about.
        dimensions: what each vector must have; None: all the same, at least 1.

    Raises:
        ProtocolError: anything else.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"the answer is not JSON ({error}): {error_text(body)}") from None
    rows = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ProtocolError(f"the answer has no list of objects as data: {error_text(body)}")
    if len(rows) != count:
        raise ProtocolError(f"{len(rows)} vectors for {count} texts")
    if not isinstance(answer.get("model", ""), str):
        raise ProtocolError("model is not a text")
    vectors: list[Vector] = [()] * count
    for row, index in zip(rows, _order(rows), strict=True):
        vector = _vector(row.get("embedding"), index)
        if dimensions is None:
            dimensions = len(vector)
        if not vector:
            raise ProtocolError(f"vector {index} is empty")
        if len(vector) != dimensions:
            raise ProtocolError(f"vector {index} has {len(vector)} numbers instead of {dimensions}")
        vectors[index] = vector
    return vectors


def _order(rows: list[dict[str, Any]]) -> Sequence[int]:
    """Return to which text each row belongs."""
    indexes: list[Any] = [row.get("index") for row in rows]
    places = range(len(rows))
    if indexes.count(None) == len(rows):
        return places
    if any(type(index) is not int for index in indexes) or sorted(indexes) != list(places):
        raise ProtocolError(
            f"the indexes are not 0 to {len(rows) - 1}, each once: {reprlib.repr(indexes)}"
        )
    return indexes


def _vector(embedding: object, index: int) -> Vector:
    if isinstance(embedding, str):
        return _decoded(embedding, index)
    if not isinstance(embedding, list):
        raise ProtocolError(
            f"vector {index} is neither a list nor a text: {reprlib.repr(embedding)}"
        )
    # They are finite: JSON has no NaN, and orjson refuses a number that is too big for a float. One pass in C:
    if not set(map(type, embedding)) <= {float, int}:
        raise ProtocolError(
            f"vector {index} holds something that is no number: {reprlib.repr(embedding)}"
        )
    return embedding


def _decoded(text: str, index: int, *, swap: bool = sys.byteorder == "big") -> Vector:
    try:
        raw = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:  # binascii.Error is one; so is text that is not ASCII
        raise ProtocolError(f"vector {index} is not base64: {error}") from None
    if len(raw) % 4:
        raise ProtocolError(
            f"vector {index} has {len(raw)} bytes, which is no whole number of float32"
        )
    numbers = memoryview(raw).cast("f")
    if swap:
        swapped = array("f", raw)
        swapped.byteswap()
        numbers = memoryview(swapped)
    # Infinity and NaN have all exponent bits set, hence 7f or ff in the highest byte; so have numbers above 1.7e38.
    # Looking for these bytes costs a tenth of looking at every number.
    highest = raw[3::4]
    if (b"\x7f" in highest or b"\xff" in highest) and not all(map(isfinite, numbers)):
        raise ProtocolError(f"vector {index} holds a number that is not finite")
    return numbers
