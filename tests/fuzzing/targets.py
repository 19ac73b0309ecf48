"""The targets: each takes any bytes and raises only if there is a bug. What it returns is a verdict, to be counted.

More than "it does not crash": each states what must hold of whatever comes out (bounds, known reasons, round trips).
"""

from __future__ import annotations

import math
import os
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import orjson

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.batch import Message, Record, Refusal
from stationmaster.embeddings.answers import read_openai_answer, read_tei_answer
from stationmaster.embeddings.server import ModelServer
from stationmaster.embeddings.tei import _read_budget
from stationmaster.errors import ConfigError, EmbedderBusyError, ProtocolError
from stationmaster.files import _own_timestamp_ms
from stationmaster.http import HttpAnswer, HttpClient
from stationmaster.http_words import (
    ERROR_TEXT_CHARS,
    MAX_RETRY_AFTER_S,
    error_text,
    parse_retry_after,
)
from stationmaster.messages import Limits, parse_in_steps, parse_message, parse_timestamp
from stationmaster.service.config_reading import load_config
from stationmaster.service.config_rendering import render
from stationmaster.service.tracing.spans import _contexts_of
from stationmaster.service.upload_form import RefusedUploadError, read_upload
from stationmaster.sinks import HttpSink
from tests.hostile.corpus import ENTRY_REASONS, REASONS, RECORD_MS
from tests.hostile.standard_library import another_library, essence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stationmaster.abc import Vector
    from stationmaster.service.config import Config

DEFAULTS: Final = Limits()
TIGHT: Final = Limits(
    message_bytes=2_000, json_depth=5, stations_per_message=3, station_id_chars=4, readings_bytes=40
)
SECRET: Final = "sk-0123456789abcdef"
"""A key that a server quotes; it must not be shown."""
_NOW: Final = 1_700_000_000.0
_MOST_STEPS: Final = 2
_ENTRIES_A_STEP: Final = 512
_MOST_WORDS: Final = 1_000
"""Characters of an error: a few sentences and the server's `ERROR_TEXT_CHARS`."""


# ------------------------------------------------------------------------------------------------------------ messages


def messages(data: bytes) -> str:
    """Read a record's value as the poller does, under usual and under tight limits."""
    _check_message(data, TIGHT)
    return _check_message(data, DEFAULTS)


def _check_message(data: bytes, limits: Limits) -> str:
    record = Record(topic="air", partition=0, offset=0, timestamp_ms=RECORD_MS, value=data)
    steps, parsed = 0, None
    parsing = parse_in_steps(record, limits, follows=7)
    while True:
        try:
            next(parsing)
            steps += 1
        except StopIteration as end:
            parsed = end.value
            break
    if isinstance(parsed, Refusal):
        assert parsed.reason in REASONS, parsed
        assert 0 < len(parsed.detail) <= 300, parsed
        parsed.detail.encode()
        assert parse_message(record, limits) == parsed
        return parsed.reason
    assert isinstance(parsed, Message)
    assert parse_message(record, limits).follows is None  # type: ignore[union-attr]
    _check_bounds(parsed, data, limits)
    entries = len(parsed.station_ids) + len(parsed.bad_entries)
    assert steps <= _MOST_STEPS + entries / _ENTRIES_A_STEP + 1
    assert not steps or len(data) > 65_536
    _check_round_trip(parsed, limits)
    return "accepted"


def _check_bounds(parsed: Message, data: bytes, limits: Limits) -> None:
    assert len(data) == parsed.size_bytes <= limits.message_bytes
    assert parsed.timestamp.tzinfo is not None
    assert parsed.follows == 7
    assert len(parsed.station_ids) == len(parsed.readings)
    entries = len(parsed.station_ids) + len(parsed.bad_entries)
    assert entries <= limits.stations_per_message
    assert parsed.station_ids or not parsed.bad_entries
    places = [bad.index for bad in parsed.bad_entries]
    assert places == sorted(set(places))
    assert not places or places[-1] < entries
    assert {bad.reason for bad in parsed.bad_entries} <= ENTRY_REASONS
    for station_id in parsed.station_ids:
        assert 0 < len(station_id) <= limits.station_id_chars
        assert station_id.isprintable()
        assert station_id.strip()
    for reading in parsed.readings:
        assert "stationId" not in reading
    assert parsed.fields.keys().isdisjoint({"stationData", "timestamp", "topic"})


def _check_round_trip(parsed: Message, limits: Limits) -> None:
    """What was read can be written, and is read again as the same."""
    entries = [{**reading, "stationId": station_id} for station_id, reading in parsed.entries]
    value = orjson.dumps({**parsed._fields, "stationData": entries})
    again = parse_message(
        Record(topic="air", partition=0, offset=0, timestamp_ms=RECORD_MS, value=value),
        # What is written may be longer than what was read: 1e9 becomes 1000000000.0.
        Limits(
            message_bytes=100 * limits.message_bytes,
            json_depth=limits.json_depth,
            readings_bytes=10**9,
        ),
    )
    assert isinstance(again, Message), again
    assert again.entries == parsed.entries
    assert again.fields == parsed.fields


def library(data: bytes) -> str:
    """Read a value with orjson and with the standard library: the outcome is the same."""
    record = Record(topic="air", partition=0, offset=0, timestamp_ms=RECORD_MS, value=data)
    limits = Limits(station_id_chars=8, stations_per_message=5, json_depth=8, readings_bytes=10**9)
    ours = essence(parse_message(record, limits))
    with another_library():
        theirs = essence(parse_message(record, limits))
    assert ours == theirs
    return str(ours[1]) if ours[0] == "refused" else "accepted"


def timestamps(data: bytes) -> str:
    """Read a time of a message, as text and as a number."""
    found = parse_timestamp(data.decode(errors="replace"))
    assert found is None or found.tzinfo is not None
    try:
        number = orjson.loads(data)
    except orjson.JSONDecodeError:
        number = None
    also = parse_timestamp(number)
    assert also is None or also.utcoffset() is not None
    line = b'{"timestamp":%b}' % data
    assert isinstance(_own_timestamp_ms(line), int)  # of a line in a file: it has no record's time
    for one in (found, also):
        if one is not None:  # a batch's time is compared, hashed and written
            assert hash(one) == hash(one + (one - one))
            assert (one < parse_timestamp(0)) in {True, False}  # type: ignore[operator]
            assert len(one.isoformat()) < 60
    return "none" if found is None and also is None else "a time"


def traceparent(data: bytes) -> str:
    """Read a record's header, and what the tracing makes of it."""
    record = Record(
        topic="air",
        partition=0,
        offset=0,
        timestamp_ms=0,
        value=b'{"stationData":[]}',
        headers=(("other", None), ("traceparent", data)),
    )
    parsed = parse_message(record, DEFAULTS)
    assert isinstance(parsed, Message)
    if parsed.traceparent is None:
        assert len(data) > 256 or not data.isascii()
        return "refused"
    assert parsed.traceparent.encode() == data
    contexts = _contexts_of([parsed.traceparent])
    assert len(contexts) <= 1
    return "a trace" if contexts else "no trace"


# ------------------------------------------------------------------------------------------------------- configuration


def config(data: bytes) -> str:
    """Read a configuration: a file; behind zero bytes overrides, of command line and environment in turn."""
    file, *rest = data.split(b"\0")
    texts = [each.decode("utf-8", "surrogateescape") for each in rest]
    environ: dict[str, str] = {}
    for text in texts[1::2]:
        dotted, _, value = text.partition("=")
        environ["STATIONMASTER_" + dotted.upper().replace(".", "__", 1)] = value
    try:
        loaded = _load(file, *texts[::2], **environ)
    except ConfigError as error:
        _check_faults(error.faults)
        return "refused"
    text = render(loaded)
    assert _told(render(_load(text.encode()))) == _told(text)
    return "a configuration"


def _check_faults(faults: Sequence[str]) -> None:
    assert 0 < len(faults) < 2_000
    for fault in faults:
        assert fault.isprintable(), fault
        assert "; expected " in fault, fault


def _told(text: str) -> list[str]:
    """Return the lines of a rendered configuration without the remarks on what is hidden."""
    return [line for line in text.splitlines() if not line.startswith("#")]


@cache
def _memory_file() -> int:
    return os.memfd_create("stationmaster.toml")


def _load(raw: bytes, *overrides: str, **environ: str) -> Config:
    file = _memory_file()
    os.ftruncate(file, 0)
    os.pwrite(file, raw, 0)
    # Files of secrets are not read: a fuzzed name may be any file of this machine.
    return load_config(
        f"/proc/self/fd/{file}", overrides=overrides, environ=environ, read_secrets=False
    )


# ------------------------------------------------------------------------------------------------------------- answers


def _http(data: bytes) -> HttpAnswer:
    """Read bytes as an answer: a line with the status, a line with `Retry-After`, the body."""
    status, _, rest = data.partition(b"\n")
    wait, _, body = rest.partition(b"\n")
    code = int(status) if status.isdigit() and len(status) == 3 else 100 + len(status) % 500
    headers = {"retry-after": wait.decode("latin-1")} if wait else {}
    return HttpAnswer(status=code, headers=headers, body=body)


def answers(data: bytes) -> str:
    """Read what a model server answers: vectors, limits, errors."""
    answer = _http(data)
    body = answer.body
    client = cast("HttpClient", SimpleNamespace(where="https://models/v1"))
    server = ModelServer(client.where, client, SECRET, None, 10**6, "the URL")
    if not 200 <= answer.status < 300:
        error = server._error(answer)
        _check_words(str(error))
        if isinstance(error, EmbedderBusyError):
            _check_pause(error.retry_after_s)
        return type(error).__name__
    verdict = "refused"
    likely = max(1, body.count(b'"embedding"'), body.count(b"[") - 1)
    for read, count in (
        (read_openai_answer, min(likely, 50)),
        (read_openai_answer, 1),
        (read_tei_answer, min(likely, 50)),
        (read_tei_answer, 2),
    ):
        try:
            vectors = read(body, count=count, dimensions=None, secret=SECRET)
        except ProtocolError as error:
            _check_words(str(server.broken(error)))
        else:
            _check_vectors(vectors, count)
            verdict = "vectors"
    try:
        budget = _read_budget(body, SECRET)
    except ProtocolError as error:
        _check_words(str(server.broken(error)))
    else:
        for limit in (budget.max_rows, budget.max_tokens, budget.max_row_tokens):
            assert limit is None or (type(limit) is int and limit >= 1)
        verdict = "limits" if verdict == "refused" else verdict
    return verdict


def _check_vectors(vectors: list[Vector], count: int) -> None:
    assert len(vectors) == count
    assert len({len(vector) for vector in vectors}) == 1
    assert len(vectors[0]) >= 1
    for vector in vectors:
        assert all(type(number) in {int, float} and math.isfinite(number) for number in vector)


def _check_words(text: str) -> None:
    assert SECRET not in text, text
    assert len(text) <= _MOST_WORDS, text
    assert text.isprintable(), text


def _check_pause(seconds: float | None) -> None:
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_S, seconds


def sinks(data: bytes) -> str:
    """Read what a target answers to an upload."""
    answer = _http(data)
    client = cast("HttpClient", SimpleNamespace(where="https://target/batches"))
    sink = HttpSink(client, SECRET, "none", frozenset({409}), cast("Any", None), None)
    meaning = sink._meaning(answer, sent_bytes=1)
    match meaning:
        case Accepted():
            assert 200 <= answer.status < 300 or answer.status == 409
        case Rejected(answer=said):
            assert answer.status in {400, 413, 422}
            assert SECRET not in said
            assert len(said) <= 2048
        case TryAgain(reason=reason, retry_after_s=pause):
            _check_words(reason)
            _check_pause(pause)
        case Unavailable(reason=reason):
            _check_words(reason)
    words = error_text(answer.body, secret=SECRET)
    assert len(words) <= ERROR_TEXT_CHARS
    assert not words or words.isprintable()
    assert SECRET not in words
    return type(meaning).__name__


def retry_after(data: bytes) -> str:
    """Read a `Retry-After` header."""
    seconds = parse_retry_after(data.decode("latin-1"), now=_NOW)
    _check_pause(seconds)
    return "none" if seconds is None else "seconds"


def uploads(data: bytes) -> str:
    """Read an upload as the receiver does: a line with the encoding, a line with the key, the body."""
    encoding, _, rest = data.partition(b"\n")
    key, _, raw = rest.partition(b"\n")
    try:
        upload = read_upload(raw, encoding=encoding.decode("latin-1"), key=key.decode("latin-1"))
    except RefusedUploadError as error:
        return _checked_status(error)
    assert orjson.loads(upload.body)["batchId"] == upload.batch_id
    for partition, first, last in upload.ranges:
        assert partition >= 0
        assert 0 <= first <= last
    assert all(type(station_id) is str for station_id in upload.station_ids)
    return "an upload"


def _checked_status(error: RefusedUploadError) -> str:
    assert error.status in {400, 413, 415}
    assert 0 < len(str(error)) < _MOST_WORDS, error
    return str(error.status)


TARGETS: Final[dict[str, Callable[[bytes], str]]] = {
    target.__name__.replace("_", "-"): target
    for target in (
        messages,
        library,
        timestamps,
        traceparent,
        config,
        answers,
        sinks,
        retry_after,
        uploads,
    )
}
