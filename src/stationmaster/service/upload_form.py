"""The upload form, read and checked by the receiver: the referee of what the uploader writes."""

from __future__ import annotations

import zlib
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import attrs
import orjson

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.errors import StationmasterError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Of an upload, as it comes and after decompression."""
_T = TypeVar("_T")


@attrs.frozen(kw_only=True)
class Upload:
    """An upload that keeps the upload form."""

    batch_id: str
    topic: str
    ranges: tuple[tuple[int, int, int], ...]
    """(partition, first offset, last offset)."""
    station_ids: tuple[str, ...]
    """Of `results`, in their order."""
    body: bytes = attrs.field(repr=False)
    """JSON, decompressed."""


class RefusedUploadError(StationmasterError):
    """This upload breaks the upload form; the message says where.

    Attributes:
        status: the HTTP status that says so: 400, 413 (too long) or 415 (an unknown encoding).
    """

    def __init__(self, reason: str, *, status: int = 400) -> None:
        self.status = status
        super().__init__(reason)


def read_upload(raw: bytes, *, encoding: str, key: str) -> Upload:
    """Decompress an upload and check it against the upload form, its sums included.

    Args:
        raw: the request's body.
        encoding: its `Content-Encoding`; empty if it has none.
        key: its `Idempotency-Key`, in which other characters than letters and digits may stand as %XX.

    Raises:
        RefusedUploadError: it breaks the form.
    """
    body = _decompress(raw, encoding)
    try:
        form = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedUploadError(f"the body is not JSON: {error}") from error
    if not isinstance(form, dict):
        raise RefusedUploadError("the body is not a JSON object")
    batch_id = _get(form, "batchId", str)
    if unquote(key) != batch_id:
        raise RefusedUploadError("Idempotency-Key: expected the body's batchId")
    if _get(form, "closedBy", str) not in {rule.value for rule in ClosedBy}:
        raise RefusedUploadError("closedBy: not one of the known rules")
    if not isinstance(form.get("followUp", False), bool):
        raise RefusedUploadError("followUp: expected true or false")
    for name in ("openedAt", "closedAt"):
        _check_time(name, _get(form, name, str))
    duration_s = form.get("durationSeconds")
    if isinstance(duration_s, bool) or not isinstance(duration_s, int | float) or duration_s < 0:
        raise RefusedUploadError("durationSeconds: expected a number from 0 on")
    for path, entry in _entries(form, "badEntries"):
        _count(entry, "index", path)
        _get(entry, "reason", str, path)
    return Upload(
        batch_id=batch_id,
        topic=_get(form, "topic", str),
        ranges=_ranges(form),
        station_ids=_stations(form),
        body=body,
    )


def _decompress(raw: bytes, encoding: str) -> bytes:
    if encoding.strip().lower() in {"", "identity"}:
        return raw
    if encoding.strip().lower() != "gzip":
        raise RefusedUploadError("Content-Encoding: expected gzip or none", status=415)
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        body = stream.decompress(raw, MAX_BODY_BYTES)
    except zlib.error as error:
        raise RefusedUploadError(f"the body is not gzip: {error}") from error
    if stream.unconsumed_tail:
        raise RefusedUploadError(
            f"the body unpacks to more than {MAX_BODY_BYTES} bytes", status=413
        )
    if not stream.eof or stream.unused_data:
        raise RefusedUploadError("the body is not gzip: cut short, or more behind its end")
    return body


def _ranges(form: dict[str, Any]) -> tuple[tuple[int, int, int], ...]:
    ranges = tuple(
        (_count(each, "partition", path), _count(each, "first", path), _count(each, "last", path))
        for path, each in _entries(form, "ranges")
    )
    if not ranges or any(first > last for _, first, last in ranges):
        raise RefusedUploadError("ranges: expected one at least, and no first beyond its last")
    return ranges


def _stations(form: dict[str, Any]) -> tuple[str, ...]:
    """Check results, unsuccessful and counts against each other; return the stations of the results."""
    succeeded = tuple(
        _get(each, "stationId", str, path) for path, each in _entries(form, "results")
    )
    stations, outcomes = list(succeeded), Counter({Outcome.SUCCEEDED.value: len(succeeded)})
    for path, each in _entries(form, "unsuccessful"):
        stations.append(_get(each, "stationId", str, path))
        outcomes[_get(each, "outcome", str, path)] += 1
        _get(each, "reason", str, path)
    if len(set(stations)) < len(stations):
        raise RefusedUploadError("results, unsuccessful: a station stands there twice")
    counts = _get(form, "counts", dict)
    told = {outcome.value: _count(counts, outcome.value, "counts.") for outcome in Outcome}
    if outcomes != Counter(told) or _count(counts, "expected", "counts.") != len(stations):
        raise RefusedUploadError("counts: they differ from what stands in results and unsuccessful")
    return succeeded


def _entries(form: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, each in enumerate(_get(form, key, list)):
        if not isinstance(each, dict):
            raise RefusedUploadError(f"{key}[{index}]: expected an object")
        yield f"{key}[{index}].", each


def _get(holder: dict[str, Any], key: str, kind: type[_T], path: str = "") -> _T:
    value = holder.get(key)
    if not isinstance(value, kind):
        names: dict[object, str] = {str: "a string", list: "an array", dict: "an object"}
        raise RefusedUploadError(f"{path}{key}: expected {names[kind]}")
    return value


def _count(holder: dict[str, Any], key: str, path: str) -> int:
    value = holder.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise RefusedUploadError(f"{path}{key}: expected a whole number from 0 on")
    return value


def _check_time(key: str, text: str) -> None:
    try:
        aware = datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        aware = False
    if not aware:
        raise RefusedUploadError(f"{key}: expected an ISO 8601 time with its zone")
