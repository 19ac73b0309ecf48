"""What each target's inputs are made from."""

from __future__ import annotations

import base64
import gzip
import struct
from functools import cache
from typing import TYPE_CHECKING, Final

from stationmaster.reports import encode_report
from stationmaster.service.config_schema import TABLES
from tests.fuzzing.making import JSON_WORDS, Maker, json_spans, line_spans, word_spans
from tests.fuzzing.targets import SECRET
from tests.hostile.corpus import CORPUS, MEBIBYTE, TRACE
from tests.uploads import report

if TYPE_CHECKING:
    from collections.abc import Callable

_TELEMETRY: Final = (
    b'{"stationData":[{"stationId":"S1","pm25":12.5,"no2":null},{"stationId":"S2","pm25":7}],"timestamp":1700000000000}',
    b'{"timestamp":"2024-01-01T00:00:00Z","topic":"air","unit":"ug/m3","stationData":[{"stationId":"S1","x":[1,2]}]}',
    b'{"stationData":[{"stationId":"S3","x":{"a":{"b":"\xc3\xa9"}}},{"stationId":"S3","ok":true}],"timestamp":null}',
    b'{"stationData":[{"stationId":"S4","name":"B\\u00e4ren","at":"2024-01-01"}],"meta":{"source":{"id":7}}}',
)
_NUMBERS: Final = base64.b64encode(struct.pack("<4f", 1.0, -2.5, 0.0, 3e38))
_BODIES: Final = (
    b'{"data":[{"index":1,"embedding":[0.1,-2,3e2]},{"index":0,"embedding":[1,2,3]}],"model":"m"}',
    b'{"data":[{"embedding":"%b"},{"embedding":"%b"}],"model":"m"}' % (_NUMBERS, _NUMBERS),
    b"[[0.1,0.2],[1,-2]]",
    b"[[1e308,5e-324]]",
    b'{"max_client_batch_size":32,"max_batch_tokens":16384,"max_input_length":512}',
    b'{"error":{"message":"bad key %b","type":"auth"}}' % SECRET.encode(),
    b'{"detail":[{"loc":["body"],"msg":"%b"}]}' % SECRET.encode(),
    b'"%b"' % SECRET.encode(),
    b"<html><body>502 Bad Gateway %b</body></html>" % SECRET.encode(),
    b"",
    b"x" * 280 + SECRET.encode(),
    b"x" * 16_380 + SECRET.encode(),
)
_DATES: Final = (
    b"120",
    b"0.5",
    b"-1",
    b"1" * 400,
    b"Wed, 15 Nov 2023 00:00:00 GMT",
    b"Wednesday, 15-Nov-23 00:00:00 GMT",
    b"Wed Nov 15 00:00:00 2023",
    b"Wed, 15 Nov 2023 00:00:00 +2359",
    b"Fri, 31 Dec 9999 23:59:59 -2359",
    b"Mon, 01 Jan 0001 00:00:00 GMT",
    b"Sat, 31 Dec 2016 23:59:60 GMT",
    b"15 Nov 2023 00:00:00",
)
_STATUSES: Final = tuple(
    str(code).encode()
    for code in (
        200,
        200,
        200,
        201,
        204,
        301,
        400,
        401,
        404,
        408,
        409,
        413,
        422,
        429,
        500,
        503,
        599,
    )
)
_TIMES: Final = (
    b"2024-01-01T00:00:00Z",
    b"2024-02-29T23:59:59.999999+05:30",
    b"20240101T000000",
    b"2024-W01-1",
    b"0001-01-01T00:00:00+23:59",
    b"9999-12-31T23:59:59-23:59",
    b"1700000000000",
    b"-62135596800000.5",
    b"253402300799999",
    b"1e308",
)
_TRACES: Final = (
    TRACE.encode(),
    b"ff-" + TRACE[3:].encode(),
    TRACE.encode() + b"-more",
    b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-00",
    b"0" * 256,
)
_ROWS: Final = (
    b'[{"partition":0,"first":7,"last":9}]\0air_0_7_1700000000\0air\0500: down',
    b'[{"partition":3,"first":0,"last":0},{"partition":1,"first":5,"last":5}]\0air_2f\0air\0',
    b'{"batchId":"b","ranges":[{"partition":0,"first":7,"last":9}],"results":[]}\0b\0air',
    b"[]\0b",
    b"\0\0\0",
    b'{"ranges":7}',
    b'[{"partition":null,"first":"7"}]\0b',
    b"[[0,7,9]]\0b",
)
_CONFIG: Final = b"""[source]
kind = "file"
[file]
path = "readings.jsonl"
[stations]
handler = "tests.service.handlers:brief"
[upload]
url = "http://127.0.0.1:1/batches"
"""
_KAFKA: Final = b"""[kafka]
bootstrap_servers = "a:1,b:2"
group_id = "g"
topics = ["air", "water"]
options = { "client.id" = "x", "socket.keepalive.enable" = true }
[embeddings]
urls = ["http://127.0.0.1:2/v1"]
model = "readings-128"
[[topic]]
name = "air"
deadline_s = 2.0
priority = "high"
[[topic]]
name = "water"
quorum = 0.5
[batch]
by = "poll"
deadline_s = 5.0
[limits]
json_depth = 16
[outbox]
path = "state.db"
[upload]
url = "https://target/batches?key=x"
\0batch.deadline_s=1e400\0stations.options={a=[1,{b=2}]}"""
_TOML_WORDS: Final = (
    *(
        b"0 -1 1e400 nan inf -inf 9223372036854775808 true false \"\" '' [] {} 1979-05-27 07:32:00 1979-05-27T07:32:00Z"
        b' "\\u0000" "\\ud800" \xff [[topic]] [batch] [""] a.b.c=1 = \\ """ # \r http://[::1 0x1F 1_000 "a:99999"'
        b" ${x} password secret sasl.password 5.0 0.5 1 100000"
    ).split(b" "),
    b"9" * 5_000,
    b"\n",
    b"\0",
    b"[" * 500,
    b"{a=" * 300,
    b"\0batch.quorum=",
)


def _http_seeds() -> list[bytes]:
    return [
        b"%b\n%b\n%b" % (status, date, body)
        for at, body in enumerate(_BODIES)
        for status, date in (
            (b"200", b""),
            (_STATUSES[at % len(_STATUSES)], _DATES[at % len(_DATES)]),
        )
    ] + [b"%b\n%b\n{}" % (status, _DATES[at % len(_DATES)]) for at, status in enumerate(_STATUSES)]


def _config_seeds() -> list[bytes]:
    """Return whole files, and one with every key that there is."""
    every = b"\n".join(
        b"%b\n%b"
        % (
            (b"[[%b]]" if table.is_repeated else b"[%b]") % name.encode(),
            b"\n".join(b"%b = 1" % key.encode() for key in table.keys),
        )
        for name, table in TABLES.items()
    )
    return [
        _CONFIG,
        _CONFIG,
        _CONFIG + b"[batch]\nquorum = 0.5\n",
        _CONFIG + b"\0batch.by=poll",
        _KAFKA,
        every,
    ]


def _uploads() -> list[bytes]:
    body = encode_report(report("b"))
    return [
        b"\nb\n" + body,
        b"identity\n%62\n" + body,
        b"gzip\nb\n" + gzip.compress(body, mtime=0),
        b"gzip\nb\n" + gzip.compress(b" " * 100_000, mtime=0),
        b"br\nb\n",
    ]


def _messages() -> Maker:
    seeds = [case.value for case in CORPUS if case.value and len(case.value) <= 2 * MEBIBYTE]
    # Most of the corpus is refused at the first look: what is sound comes in often enough to be broken itself.
    return Maker([*seeds, *_TELEMETRY * 60], JSON_WORDS, json_spans, b",")


_MAKERS: Final[dict[str, Callable[[], Maker]]] = {
    "messages": _messages,
    "library": _messages,
    "pipeline": _messages,
    "outbox": lambda: Maker(_ROWS, (*JSON_WORDS, b"\0", b"'", b"b"), json_spans, b","),
    "uploads": lambda: Maker(_uploads(), (*JSON_WORDS, b"\n"), json_spans, b","),
    "timestamps": lambda: Maker(_TIMES, JSON_WORDS, word_spans, b""),
    "traceparent": lambda: Maker(_TRACES, (b"-", b"0", b"\r\n", b"\xff", b"g"), word_spans, b"-"),
    "config": lambda: Maker(_config_seeds(), _TOML_WORDS, line_spans, b"\n"),
    "answers": lambda: Maker(
        _http_seeds(), (*JSON_WORDS, b'"embedding"', b'"f///fw=="', b'"AAAA"'), json_spans, b","
    ),
    "sinks": lambda: Maker(_http_seeds(), (*JSON_WORDS, *_STATUSES), line_spans, b"\n"),
    "retry-after": lambda: Maker(
        _DATES,
        (b"-", b":", b"9" * 20, b"\xb2", b" ", b"GMT", b"+9999", b"Feb", b"(", b",", b"60"),
        word_spans,
        b"",
    ),
}


@cache
def maker_of(target: str) -> Maker:
    """Return what makes this target's inputs."""
    return _MAKERS[target]()
