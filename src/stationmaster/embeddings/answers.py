"""What model servers answer, read without trust: one vector per text, one dimension, finite numbers. Pure."""

from __future__ import annotations

import binascii
import reprlib
import sys
from array import array
from math import isfinite
from typing import TYPE_CHECKING, Any

import orjson

from stationmaster.errors import ProtocolError
from stationmaster.http_words import error_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stationmaster.abc import Vector


def read_openai_answer(
    body: bytes, *, count: int, dimensions: int | None, secret: str | None = None
) -> list[Vector]:
    """Return the vectors of an answer, in the order of the texts.

    Args:
        body: `{"data": [{"index", "embedding"}, ...], "model"}`, each embedding a list of numbers or a base64 text
            of float32, little-endian.
        count: how many texts were asked about.
        dimensions: what each vector must have; None: all the same, at least 1.
        secret: what no message may show, not even in part.

    Raises:
        ProtocolError: anything else.
    """
    answer = _json(body, secret)
    rows = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ProtocolError(
            f"the answer has no list of objects as data: {error_text(body, secret=secret)}"
        )
    if len(rows) != count:
        raise ProtocolError(f"{len(rows)} vectors for {count} texts")
    if not isinstance(answer.get("model", ""), str):
        raise ProtocolError("model is not a text")
    embeddings = (row.get("embedding") for row in rows)
    return _vectors(zip(_order(rows), embeddings, strict=True), count, dimensions)


def read_tei_answer(
    body: bytes, *, count: int, dimensions: int | None, secret: str | None = None
) -> list[Vector]:
    """Return the vectors of an answer, in the order of the texts.

    Args:
        body: `[[number, ...], ...]`.
        count: how many texts were asked about.
        dimensions: what each vector must have; None: all the same, at least 1.
        secret: what no message may show, not even in part.

    Raises:
        ProtocolError: anything else.
    """
    rows = _json(body, secret)
    if not isinstance(rows, list):
        raise ProtocolError(
            f"the answer is not a list of vectors: {error_text(body, secret=secret)}"
        )
    if len(rows) != count:
        raise ProtocolError(f"{len(rows)} vectors for {count} texts")
    return _vectors(enumerate(rows), count, dimensions)


def _json(body: bytes, secret: str | None) -> Any:  # noqa: ANN401 - whatever it is
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        told = error_text(body, secret=secret)
        raise ProtocolError(f"the answer is not JSON ({error}): {told}") from None


def _vectors(
    rows: Iterable[tuple[int, object]], count: int, dimensions: int | None
) -> list[Vector]:
    """Return what belongs to each text; `rows` hold every index once."""
    vectors: list[Vector] = [()] * count
    for index, embedding in rows:
        vector = _vector(embedding, index)
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
