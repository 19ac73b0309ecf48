"""The referee of the upload form: what our own encoder writes passes, every deviation is named."""

from __future__ import annotations

import functools
import gzip
import operator
from typing import Any

import orjson
import pytest

from stationmaster.errors import StationmasterError
from stationmaster.reports import encode_report
from stationmaster.service.upload_form import MAX_BODY_BYTES, RefusedUploadError, read_upload
from tests.uploads import form, report

KEY = form()["batchId"]


def refusal(raw: bytes, *, encoding: str = "", key: str = KEY) -> RefusedUploadError:
    with pytest.raises(RefusedUploadError) as caught:
        read_upload(raw, encoding=encoding, key=key)
    assert isinstance(caught.value, StationmasterError)
    return caught.value


@pytest.mark.parametrize("encoding", ["", "identity", "gzip", " GZIP "])
def test_what_our_encoder_writes_is_read(encoding: str) -> None:
    body = encode_report(report(ranges=((0, 10, 12), (3, 7, 7))))
    raw = gzip.compress(body) if "gzip" in encoding.lower() else body
    upload = read_upload(raw, encoding=encoding, key=KEY)
    assert upload.batch_id == KEY
    assert upload.topic == "air"
    assert upload.ranges == ((0, 10, 12), (3, 7, 7))
    assert upload.station_ids == ("S001", "S003")
    assert upload.body == body


def test_a_key_may_be_escaped() -> None:
    read_upload(orjson.dumps(form("100% \N{SNOWMAN}")), encoding="", key="100%25%20%E2%98%83")


def test_the_form_may_grow() -> None:
    read_upload(orjson.dumps(form(followUp=True)), encoding="", key=KEY)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("batchId", ..., "batchId: expected a string"),
        ("topic", 7, "topic: expected a string"),
        ("closedBy", "whim", "closedBy: not one of"),
        ("openedAt", "yesterday", "openedAt: expected an ISO 8601 time with its zone"),
        ("closedAt", "2013-03-01T00:00:00", "closedAt: expected an ISO 8601 time with its zone"),
        ("durationSeconds", -1, "durationSeconds: expected a number"),
        ("durationSeconds", "5", "durationSeconds: expected a number"),
        ("durationSeconds", True, "durationSeconds: expected a number"),
        ("ranges", [], "ranges: expected one at least"),
        ("ranges.0", [0, 1, 2], "ranges[0]: expected an object"),
        ("ranges.0.first", 12346, "ranges: expected one at least, and no first beyond its last"),
        ("ranges.0.first", -1, "ranges[0].first: expected a whole number"),
        ("ranges.0.last", 2**63, "ranges[0].last: expected a whole number"),
        ("ranges.0.partition", True, "ranges[0].partition: expected a whole number"),
        ("results", {}, "results: expected an array"),
        ("results.1", ..., "counts: they differ"),
        ("results.1.stationId", ..., "results[1].stationId: expected a string"),
        ("results.1.stationId", "S001", "a station stands there twice"),
        ("unsuccessful.0.stationId", "S001", "a station stands there twice"),
        ("unsuccessful.0.outcome", "lost", "counts: they differ"),
        ("unsuccessful.0.outcome", "succeeded", "counts: they differ"),
        ("unsuccessful.0.reason", ..., "unsuccessful[0].reason: expected a string"),
        ("counts", [], "counts: expected an object"),
        ("counts.noOutput", ..., "counts.noOutput: expected a whole number"),
        ("counts.expected", 5, "counts: they differ"),
        ("counts.succeeded", 1, "counts: they differ"),
        ("badEntries", ..., "badEntries: expected an array"),
        ("badEntries.0.index", "4", "badEntries[0].index: expected a whole number"),
        ("badEntries.0.reason", ..., "badEntries[0].reason: expected a string"),
    ],
)
def test_every_deviation_is_refused_with_its_place(path: str, value: object, reason: str) -> None:
    upload: Any = form()
    *holders, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    holder = functools.reduce(operator.getitem, holders, upload)
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    error = refusal(orjson.dumps(upload))
    assert reason in str(error)
    assert error.status == 400


@pytest.mark.parametrize("key", ["", "air_0_2_1700000000"])
def test_the_key_must_be_the_batch_id(key: str) -> None:
    error = refusal(orjson.dumps(form()), key=key)
    assert str(error) == "Idempotency-Key: expected the body's batchId"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_body_that_is_no_json_object_is_refused(raw: bytes) -> None:
    assert "the body is not" in str(refusal(raw))


@pytest.mark.parametrize(
    ("raw", "status", "reason"),
    [
        (b"no gzip", 400, "not gzip"),
        (gzip.compress(orjson.dumps(form()))[:-1], 400, "cut short"),
        (gzip.compress(orjson.dumps(form())) + b"x", 400, "more behind its end"),
        (gzip.compress(bytes(MAX_BODY_BYTES + 1), 1), 413, "unpacks to more than"),
    ],
    ids=["damaged", "cut", "trailing", "bomb"],
)
def test_bad_compression_is_refused(raw: bytes, status: int, reason: str) -> None:
    error = refusal(raw, encoding="gzip")
    assert reason in str(error)
    assert error.status == status


def test_as_much_as_is_allowed_may_be_unpacked() -> None:
    body = orjson.dumps(form()).ljust(MAX_BODY_BYTES)
    assert len(read_upload(gzip.compress(body, 1), encoding="gzip", key=KEY).body) == MAX_BODY_BYTES


def test_an_encoding_that_is_not_known_is_refused() -> None:
    assert refusal(orjson.dumps(form()), encoding="br").status == 415
