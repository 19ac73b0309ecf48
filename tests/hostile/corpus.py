"""The corpus: what a broken, careless or malicious producer may put into a topic, and what must become of it.

Each case is refused for one reason of `stationmaster.messages`, or accepted with exactly these stations. Values are
built by expressions: the corpus is a few hundred lines, its bytes are some 25 megabytes.
"""

from __future__ import annotations

import gzip
import json
import unicodedata
import zlib
from typing import Final

import attrs

RECORD_MS: Final = 1_700_000_000_000
"""The timestamp of every record here: what counts where a message has no time of its own that can be read."""
RECORD_TIME: Final = "2023-11-14T22:13:20+00:00"

MEBIBYTE: Final = 1_048_576

Headers = tuple[tuple[str, bytes | None], ...]


@attrs.frozen(kw_only=True)
class Hostile:
    """One message."""

    name: str
    value: bytes | None = attrs.field(repr=False)
    headers: Headers = attrs.field(default=(), repr=False)
    reason: str | None = None
    """Why it is refused; None: it is accepted."""
    stations: tuple[str, ...] = attrs.field(default=(), repr=False)
    """Of an accepted one, in order."""
    left_out: tuple[str, ...] = ()
    """Why entries of an accepted one are left out, in order."""
    time: str = RECORD_TIME
    """Of an accepted one, as ISO 8601."""
    traceparent: str | None = None
    """What an accepted one hands on."""


def refused(reason: str, name: str, value: bytes | None, *, headers: Headers = ()) -> Hostile:
    return Hostile(name=name, value=value, reason=reason, headers=headers)


def accepted(
    name: str,
    value: bytes,
    *stations: str,
    left_out: tuple[str, ...] = (),
    time: str = RECORD_TIME,
    headers: Headers = (),
    traceparent: str | None = None,
) -> Hostile:
    return Hostile(
        name=name,
        value=value,
        stations=stations,
        left_out=left_out,
        time=time,
        headers=headers,
        traceparent=traceparent,
    )


# ----------------------------------------------------------------------------------------------------------- how to say


def with_field(json_text: bytes) -> bytes:
    """Return a message of the station S1 with this JSON text as one of its fields."""
    return b'{"stationData":[{"stationId":"S1"}],"field":' + json_text + b"}"


def with_reading(json_text: bytes) -> bytes:
    """Return a message of the station S1 with this JSON text in its reading."""
    return b'{"stationData":[{"stationId":"S1","x":' + json_text + b"}]}"


def with_station(json_text: bytes) -> bytes:
    """Return a message of a station with this JSON text as its id, beside the station S2."""
    return b'{"stationData":[{"stationId":' + json_text + b'},{"stationId":"S2"}]}'


def with_time(json_text: bytes) -> bytes:
    return b'{"stationData":[{"stationId":"S1"}],"timestamp":' + json_text + b"}"


def of_stations(*station_ids: str) -> bytes:
    """Return a message of these stations."""
    entries = [{"stationId": station_id} for station_id in station_ids]
    return json.dumps({"stationData": entries}, ensure_ascii=False).encode()


GOOD: Final = of_stations("S1")
LONGEST_ID: Final = "\N{GRINNING FACE}" * 128
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Zürich") for form in ("NFC", "NFD"))

# -------------------------------------------------------------------------------------------------------------- refused

NOTHING: Final = [
    refused("empty-value", "a tombstone", None),
    refused("empty-value", "zero bytes", b""),
    refused("not-json", "white space alone", b" \t\r\n"),
    refused("not-json", "one zero byte", b"\0"),
    refused("not-json", "a kilobyte of zero bytes", b"\0" * 1024),
    refused("message-too-large", "one byte too many", GOOD.ljust(MEBIBYTE + 1)),
    refused("message-too-large", "ten megabytes of JSON", with_field(b'"%b"' % (b"x" * 10**7))),
    refused("message-too-large", "ten megabytes of brackets", b"[" * 10**7),
]

NO_TEXT: Final = [
    refused("not-utf8", "a byte that no UTF-8 has", with_field(b'"\xff"')),
    refused("not-utf8", "a continuation without a beginning", with_field(b'"\x80"')),
    refused("not-utf8", "a beginning without a continuation", with_field(b'"\xe2\x82"')),
    refused("not-utf8", "an overlong slash", with_field(b'"\xc0\xaf"')),
    refused("not-utf8", "an overlong zero", with_field(b'"\xc0\x80"')),
    refused("not-utf8", "an overlong zero of four bytes", with_field(b'"\xf0\x80\x80\x80"')),
    refused("not-utf8", "a surrogate as three bytes", with_field(b'"\xed\xa0\x80"')),
    refused("not-utf8", "a surrogate pair as six bytes", with_field(b'"\xed\xa0\xbd\xed\xb8\x80"')),
    refused("not-utf8", "beyond the last character", with_field(b'"\xf4\x90\x80\x80"')),
    refused("not-utf8", "Latin-1", '{"stationData":[],"place":"Zürich"}'.encode("latin-1")),
    refused("not-utf8", "cut within a character", '{"stationData":[],"place":"ü'.encode()[:-1]),
    refused("not-utf8", "a byte order mark", b"\xef\xbb\xbf" + GOOD),
    refused("not-utf8", "a byte order mark alone", b"\xef\xbb\xbf"),
    refused("not-utf8", "UTF-16 with its mark", GOOD.decode().encode("utf-16")),
    refused("not-json", "UTF-16 without a mark", GOOD.decode().encode("utf-16-le")),
    refused("not-utf8", "UTF-32 with its mark", GOOD.decode().encode("utf-32")),
    refused("not-utf8", "gzip", gzip.compress(GOOD, mtime=0)),
    refused("not-utf8", "zlib", zlib.compress(GOOD)),
    refused("not-utf8", "Avro's envelope of a schema registry", b"\0\0\0\0\x07\x04S1\xff"),
]

NO_JSON: Final = [
    refused("not-json", "cut after the first bracket", b"{"),
    refused("not-json", "cut before the last bracket", GOOD[:-1]),
    refused("not-json", "cut within a key", b'{"stationDa'),
    refused("not-json", "cut within an escape", b'{"stationData":[],"a":"\\u00'),
    refused("not-json", "cut within a literal", b'{"stationData":[],"a":tru'),
    refused("not-json", "two messages in one", GOOD + GOOD),
    refused("not-json", "two messages on two lines", GOOD + b"\n" + GOOD),
    refused("not-json", "something behind it", GOOD + b";"),
    refused("not-json", "a zero byte behind it", GOOD + b"\0"),
    refused("not-json", "a comment", b'{"stationData":[] /* none */}'),
    refused("not-json", "a comment to the end of the line", b'{"stationData":[]} // none'),
    refused("not-json", "a comma at the end of a list", b'{"stationData":[{"stationId":"S1"},]}'),
    refused("not-json", "a comma at the end of an object", b'{"stationData":[],}'),
    refused("not-json", "commas alone", b'{"stationData":[,,]}'),
    refused("not-json", "single quotes", b"{'stationData':[]}"),
    refused("not-json", "keys without quotes", b"{stationData:[]}"),
    refused("not-json", "Python's literals", b'{"stationData":[],"a":None,"b":True}'),
    refused("not-json", "a raw line feed in a text", with_field(b'"\n"')),
    refused("not-json", "a raw zero byte in a text", with_field(b'"\0"')),
    refused("not-json", "an escape that is none", with_field(b'"\\x41"')),
    refused("not-json", "an escape of three digits", with_field(b'"\\u041"')),
    refused("not-json", "a leading zero", with_field(b"007")),
    refused("not-json", "a plus sign", with_field(b"+1")),
    refused("not-json", "no digit before the point", with_field(b".5")),
    refused("not-json", "no digit after the point", with_field(b"1.")),
    refused("not-json", "a hexadecimal number", with_field(b"0x1F")),
    refused("not-json", "two minus signs", with_field(b"--1")),
    refused("not-json", "digits of another script", with_field("१२".encode())),
    refused("not-json", "a no-break space between tokens", b'{"stationData":\xc2\xa0[]}'),
    refused("not-json", "a bracket of the other kind", b'{"stationData":[}]'),
    refused("not-json", "closing brackets alone", b"]" * 100_000),
    refused("not-json", "a quarter of a million backslashes", b"\\" * 250_000),
    refused("not-json", "XML", b"<stationData><station id='S1'/></stationData>"),
    refused("not-json", "CSV", b"stationId,x\nS1,7\n"),
    refused("not-json", "an HTTP request", b"POST / HTTP/1.1\r\nHost: kafka\r\n\r\n"),
]

NUMBERS: Final = [
    refused("number-out-of-range", "NaN", with_reading(b"NaN")),
    refused("number-out-of-range", "an infinity", with_reading(b"Infinity")),
    refused("number-out-of-range", "the other infinity", with_reading(b"-Infinity")),
    refused("number-out-of-range", "beyond a double", with_reading(b"1e400")),
    refused("number-out-of-range", "far beyond a double", with_reading(b"-1E+999999999")),
    refused("number-out-of-range", "an integer of 65 bits", with_reading(b"18446744073709551616")),
    refused("number-out-of-range", "below 64 bits", with_reading(b"-9223372036854775809")),
    refused("number-out-of-range", "an integer of 400 digits", with_reading(b"9" * 400)),
    refused("number-out-of-range", "an integer of 100,000 digits", with_reading(b"9" * 100_000)),
    refused("number-out-of-range", "hidden by a later key", b'{"a":1e999,"a":1,"stationData":[]}'),
    refused("number-out-of-range", "a huge id", with_station(b"9" * 30)),
]

HALF_CHARACTERS: Final = [
    refused("lone-surrogate", "the first half of a character", with_field(b'"\\ud83d"')),
    refused("lone-surrogate", "the second half of a character", with_field(b'"\\ude00"')),
    refused("lone-surrogate", "the halves the wrong way round", with_field(b'"\\ude00\\ud83d"')),
    refused("lone-surrogate", "half a character in a key", with_field(b'{"\\ud800":1}')),
    refused("lone-surrogate", "half a character in an id", with_station(b'"S\\udfff"')),
    refused(
        "lone-surrogate",
        "half a character that a later key hides",
        b'{"a":"\\ud800","a":1,"stationData":[]}',
    ),
    refused(
        "lone-surrogate",
        "half a character in an object that a later key hides",
        b'{"a":[{"b":["\\ud800"]}],"a":1,"stationData":[]}',
    ),
]

DEEP: Final = [
    refused("json-too-deep", "33 levels", with_field(b"[" * 32 + b"]" * 32)),
    refused("json-too-deep", "1,000 lists", b"[" * 1_000 + b"]" * 1_000),
    refused("json-too-deep", "100,000 lists", b"[" * 100_000 + b"]" * 100_000),
    refused("json-too-deep", "100,000 lists that never end", b"[" * 100_000),
    refused("json-too-deep", "100,000 objects that never end", b'{"a":' * 100_000),
    refused(
        "json-too-deep", "1,000 levels behind quotes", with_field(b'["]",' * 1000 + b"]" * 1000)
    ),
    refused("json-too-deep", "a megabyte of brackets and quotes", b'"[' * (MEBIBYTE // 2)),
]

NO_MESSAGE: Final = [
    refused("not-an-object", "null", b"null"),
    refused("not-an-object", "a boolean", b"false"),
    refused("not-an-object", "a number", b"-0"),
    refused("not-an-object", "a text", b'"stationData"'),
    refused("not-an-object", "an empty list", b"[]"),
    refused("not-an-object", "a list of messages", b"[" + GOOD + b"]"),
    refused("no-station-data", "an empty object", b"{}"),
    refused("no-station-data", "the key in another case", b'{"STATIONDATA":[],"stationdata":[]}'),
    refused("no-station-data", "the key with a blank", b'{"stationData ":[]}'),
    refused("no-station-data", "the key with a zero byte", b'{"stationData\\u0000":[]}'),
    refused(
        "no-station-data",
        "a look-alike key",
        '{"st\N{CYRILLIC SMALL LETTER A}tionData":[]}'.encode(),
    ),
    refused("no-station-data", "null for the stations", b'{"stationData":null}'),
    refused("no-station-data", "a text for the stations", b'{"stationData":"[]"}'),
    refused(
        "no-station-data", "an object for the stations", b'{"stationData":{"0":{"stationId":"S1"}}}'
    ),
    refused("no-station-data", "true for the stations", b'{"stationData":true}'),
    refused(
        "no-station-data",
        "the stations hidden by a later key",
        b'{"stationData":[],"stationData":{}}',
    ),
    refused("no-station-data", "the message within a message", b'{"message":' + GOOD + b"}"),
    refused(
        "no-station-data",
        "Python's names",
        b'{"__class__":"Message","__dict__":{"stationData":[]}}',
    ),
    refused(
        "no-valid-entry", "entries of every wrong type", b'{"stationData":[null,7,"S1",[],true]}'
    ),
    refused("no-valid-entry", "an entry without an id", b'{"stationData":[{"station":"S1"}]}'),
    refused("no-valid-entry", "the id in another case", b'{"stationData":[{"StationId":"S1"}]}'),
    refused(
        "no-valid-entry",
        "an id hidden by a later key",
        b'{"stationData":[{"stationId":"S1","stationId":null}]}',
    ),
    refused(
        "no-valid-entry",
        "a list of 10,000 nulls",
        b'{"stationData":[' + b"null," * 9_999 + b"null]}",
    ),
    refused(
        "no-valid-entry", "one reading that is too large", with_reading(b'"%b"' % (b"y" * 65_536))
    ),
    refused("too-many-stations", "100,000 ones", b'{"stationData":[' + b"1," * 99_999 + b"1]}"),
    refused(
        "too-many-stations", "one station too many", of_stations(*(f"S{n}" for n in range(10_001)))
    ),
]

# ------------------------------------------------------------------------------------------------------------- accepted

LEFT_OUT: Final = [
    accepted(f"an id that is {what}", with_station(text), "S2", left_out=(reason,))
    for what, text, reason in [
        ("empty", b'""', "station-id-blank"),
        ("blank", b'" \\t\\u3000"', "station-id-blank"),
        ("null", b"null", "station-id-missing"),
        ("zero", b"0", "station-id-not-text"),
        ("false", b"false", "station-id-not-text"),
        ("a list", b'["S1"]', "station-id-not-text"),
        ("an object", b'{"stationId":"S1"}', "station-id-not-text"),
        ("too long by one", b'"%b"' % (b"x" * 129), "station-id-too-long"),
        ("a megabyte", b'"%b"' % (b"x" * 1_000_000), "station-id-too-long"),
        ("a zero byte", b'"\\u0000"', "station-id-not-printable"),
        ("cut by a zero byte", b'"S1\\u0000.json"', "station-id-not-printable"),
        ("a colour of the terminal", b'"\\u001b[31mS1"', "station-id-not-printable"),
        ("two lines of a log", b'"S1\\nlevel=error"', "station-id-not-printable"),
        ("parted by a line separator", b'"S1\\u2028S2"', "station-id-not-printable"),
        ("turned to the left", b'"S\\u202e1"', "station-id-not-printable"),
        ("joined by nothing", b'"S\\u200b1"', "station-id-not-printable"),
        ("a byte order mark", b'"\\ufeff"', "station-id-not-printable"),
        ("no character", b'"\\uffff"', "station-id-not-printable"),
        ("of private use", b'"\\ue000"', "station-id-not-printable"),
        ("deleted", b'"S\\u007f"', "station-id-not-printable"),
    ]
]

STRANGE_IDS: Final = [
    accepted(f"an id of {what}", of_stations(station_id), station_id)
    for what, station_id in [
        ("128 emoji", LONGEST_ID),
        ("a script tag", "<script>alert(1)</script>"),
        ("an entity and quotes", "&lt;\"'`><img src=x onerror=alert(1)>"),
        ("a path", "../../../etc/passwd"),
        ("SQL", "S1'; DROP TABLE outbox; --"),
        ("a format", "%s{0}{station.__class__}${jndi:ldap://x}"),
        ("a label of a metric", 'S1",le="0.5} 1 #'),
        ("one combining mark", "\N{COMBINING ACUTE ACCENT}"),
        ("64 combining marks", "e" + "\N{COMBINING ACUTE ACCENT}" * 64),
        ("letters from right to left", "محطة ١"),
        ("Python's names", "__class__"),
        ("JavaScript's names", "__proto__"),
        ("a comma and a semicolon", "S1,S2;S3"),
        ("a blank on either side", " S1 "),
        ("another kind of number", "Ⅷ½²"),
    ]
]

ODD_LISTS: Final = [
    accepted("no stations at all", b'{"stationData":[]}'),
    accepted("the same station twice", of_stations("S1", "S1"), "S1", "S1"),
    accepted("ids that differ in case", of_stations("s1", "S1"), "s1", "S1"),
    accepted(
        "ids that are equal after NFC", of_stations(COMPOSED, DECOMPOSED), COMPOSED, DECOMPOSED
    ),
    accepted("look-alike ids", of_stations("S1", "Ѕ1"), "S1", "Ѕ1"),
    accepted(
        "one good station between bad ones",
        b'{"stationData":[null,{"stationId":7},{"stationId":"S1"},[[]],{}]}',
        "S1",
        left_out=("not-an-object", "station-id-not-text", "not-an-object", "station-id-missing"),
    ),
    accepted(
        "10,000 stations",
        of_stations(*(f"S{n}" for n in range(10_000))),
        *(f"S{n}" for n in range(10_000)),
    ),
    accepted("a station 1,000 times", of_stations(*["S1"] * 1_000), *["S1"] * 1_000),
    accepted(
        "the last of two lists",
        b'{"stationData":[{"stationId":"S1"}],"stationData":[{"stationId":"S2"}]}',
        "S2",
    ),
    accepted("the last of two ids", b'{"stationData":[{"stationId":7,"stationId":"S1"}]}', "S1"),
    accepted(
        "a key written in escapes",
        b'{"\\u0073tationData":[{"station\\u0049d":"\\u0053\\u0031"}]}',
        "S1",
    ),
]

ODD_VALUES: Final = [
    accepted(
        f"{what} in a reading and a field", with_reading(text)[:-1] + b',"f":' + text + b"}", "S1"
    )
    for what, text in [
        ("minus zero", b"-0"),
        ("minus zero as a real", b"-0.0"),
        ("the greatest integer", b"18446744073709551615"),
        ("the least integer", b"-9223372036854775808"),
        ("the greatest double", b"1.7976931348623157e308"),
        ("the least double", b"5e-324"),
        ("nearly nothing", b"1e-999999"),
        ("5,000 digits behind the point", b"0." + b"3" * 5_000),
        ("an exponent with many zeros", b"1e" + b"0" * 500 + b"1"),
        ("a hundred digits as a text", b'"%b"' % (b"9" * 100)),
        ("NaN as a text", b'"NaN"'),
        ("an escaped zero byte", b'"\\u0000"'),
        ("a pair of surrogates", b'"\\ud83d\\ude00"'),
        ("no characters", b'"\\uffff\\ufdd0"'),
        ("ten thousand backslashes", b'"%b"' % (b"\\\\" * 10_000)),
        ("brackets as a text", b'"%b"' % (b"[{" * 10_000)),
        ("nesting up to the limit", b"[" * 29 + b"]" * 29),
        ("Python's names", b'{"__class__":{"__init__":{}},"self":1,"__slots__":[]}'),
        ("JavaScript's names", b'{"__proto__":{"toString":1},"constructor":{}}'),
        ("an empty key", b'{"":{"":{"":0}}}'),
        ("the words of the upload", b'{"stationId":"S9","batchId":"x","results":[]}'),
        ("six thousand keys", json.dumps({str(n): n % 7 for n in range(6_000)}).encode()),
    ]
]

TIMES: Final = [
    accepted(f"a time that is {what}", with_time(text), "S1", time=time)
    for what, text, time in [
        ("empty", b'""', RECORD_TIME),
        ("a word", b'"yesterday"', RECORD_TIME),
        ("null", b"null", RECORD_TIME),
        ("true", b"true", RECORD_TIME),
        ("a list", b"[2024,1,1]", RECORD_TIME),
        ("an object", b'{"$date":0}', RECORD_TIME),
        ("in the year 10000", b'"+10000-01-01T00:00:00Z"', RECORD_TIME),
        ("in the year 0", b'"0000-01-01T00:00:00Z"', RECORD_TIME),
        ("a leap second", b'"2016-12-31T23:59:60Z"', RECORD_TIME),
        ("the 30th of February", b'"2024-02-30T00:00:00Z"', RECORD_TIME),
        ("beyond all years", b"253402300800000", RECORD_TIME),
        ("before all years", b"-62135596800001", RECORD_TIME),
        ("the greatest double", b"1.7e308", RECORD_TIME),
        ("the greatest integer", b"18446744073709551615", RECORD_TIME),
        ("a text of 100,000 digits", b'"%b"' % (b"9" * 100_000), RECORD_TIME),
        ("before the epoch", b"-1", "1969-12-31T23:59:59.999000+00:00"),
        ("zero", b"0", "1970-01-01T00:00:00+00:00"),
        ("minus zero", b"-0.0", "1970-01-01T00:00:00+00:00"),
        ("in half milliseconds", b"0.5", "1970-01-01T00:00:00.000500+00:00"),
        ("without a zone", b'"2024-01-01T00:00:00"', "2024-01-01T00:00:00+00:00"),
        ("the last moment", b'"9999-12-31T23:59:59.999999Z"', "9999-12-31T23:59:59.999999+00:00"),
        ("the first moment", b'"0001-01-01T00:00:00Z"', "0001-01-01T00:00:00+00:00"),
        (
            "before the first moment, by its zone",
            b'"0001-01-01T00:00:00+23:59"',
            "0001-01-01T00:00:00+23:59",
        ),
        (
            "after the last moment, by its zone",
            b'"9999-12-31T23:59:59-23:59"',
            "9999-12-31T23:59:59-23:59",
        ),
    ]
]

TRACE: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NO_TRACE: Final = f"00-{0:032}-{0:016}-00"
HEADERS: Final = [
    accepted("a header without a value", GOOD, "S1", headers=(("traceparent", None),)),
    accepted("a header of no ASCII", GOOD, "S1", headers=(("traceparent", b"\xff\xfe"),)),
    accepted("a header that is too long", GOOD, "S1", headers=(("traceparent", b"0" * 257),)),
    accepted("a header of a megabyte", GOOD, "S1", headers=(("traceparent", b"0" * 1_000_000),)),
    accepted(
        "a header of control characters",
        GOOD,
        "S1",
        headers=(("traceparent", b"\r\nX: y"),),
        traceparent="\r\nX: y",
    ),
    accepted("an empty header", GOOD, "S1", headers=(("traceparent", b""),), traceparent=""),
    accepted(
        "a trace of zeros",
        GOOD,
        "S1",
        headers=(("traceparent", NO_TRACE.encode()),),
        traceparent=NO_TRACE,
    ),
    accepted(
        "a thousand headers",
        GOOD,
        "S1",
        headers=(
            ("traceparent", TRACE.encode()),
            *((f"h{n}", b"\0\xff" * 10) for n in range(1_000)),
        ),
        traceparent=TRACE,
    ),
    accepted(
        "a thousand headers of one name",
        GOOD,
        "S1",
        headers=(
            *(("traceparent", b"%d" % n) for n in range(999)),
            ("traceparent", TRACE.encode()),
        ),
        traceparent=TRACE,
    ),
    accepted(
        "a header with an empty name",
        GOOD,
        "S1",
        headers=(("", b"x"), ("é\N{GRINNING FACE}", None)),
    ),
    refused(
        "not-json",
        "bad headers beside bad bytes",
        b"{",
        headers=(("traceparent", b"\xff"), ("", None)),
    ),
]

CORPUS: Final[tuple[Hostile, ...]] = (
    *NOTHING,
    *NO_TEXT,
    *NO_JSON,
    *NUMBERS,
    *HALF_CHARACTERS,
    *DEEP,
    *NO_MESSAGE,
    *LEFT_OUT,
    *STRANGE_IDS,
    *ODD_LISTS,
    *ODD_VALUES,
    *TIMES,
    *HEADERS,
)

REASONS: Final = frozenset(
    {
        "empty-value",
        "message-too-large",
        "json-too-deep",
        "not-utf8",
        "number-out-of-range",
        "lone-surrogate",
        "not-json",
        "not-an-object",
        "no-station-data",
        "too-many-stations",
        "no-valid-entry",
    }
)
"""Every reason that a message is refused for."""

ENTRY_REASONS: Final = frozenset(
    {
        "not-an-object",
        "station-id-missing",
        "station-id-not-text",
        "station-id-blank",
        "station-id-too-long",
        "station-id-not-printable",
        "readings-too-large",
    }
)
"""Every reason that an entry is left out for."""
