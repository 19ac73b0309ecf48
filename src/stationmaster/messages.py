"""The parser: a record's bytes become a `Message`, or a `Refusal` with its reason. Pure; all limits live here.

A message is a JSON object in UTF-8: `{"stationData": [{"stationId": "S001", ...}, ...], "timestamp"?: ..., ...}`.

Reasons for refusing a message (each a dead letter):

    empty-value         tombstone or zero bytes
    message-too-large   more than `Limits.message_bytes`
    json-too-deep       nested deeper than `Limits.json_depth`
    not-utf8            the bytes are no UTF-8 (or begin with a byte order mark)
    number-out-of-range NaN, an infinity, or an integer beyond 64 bits
    lone-surrogate      an escape that is half a character
    not-json            anything else that is no JSON
    not-an-object       JSON, but no object
    no-station-data     `stationData` is missing or no list
    too-many-stations   more entries than `Limits.stations_per_message`
    no-valid-entry      entries, but none that can be used

Reasons for leaving out one entry: not-an-object, station-id-missing, station-id-not-text, station-id-blank,
station-id-too-long, station-id-not-printable, readings-too-large. An empty `stationData` is a good message.

The outcome does not depend on the JSON library: orjson reads, but it turns integers beyond 64 bits into floats
without a word, so a scan of the bytes sends every suspicious text through the standard library first. What orjson
refuses (an exponent too large, half a character, anything that is no JSON) goes there second, for its reason. What is
left to it is the size of a reading: real numbers have no one shortest text, libraries differ by a character or two.

A large message is read in steps, so that others have their turn between them (`parse_in_steps`). What the JSON library
does is one of them: about 2.5 ms for 10,000 stations. So is whatever it refuses, or is suspicious: tens of milliseconds
at 1 MiB.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import attrs
import orjson

from stationmaster.batch import BadEntry, Message, Refusal
from stationmaster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from stationmaster.batch import Record

    Parsing: TypeAlias = Generator[None, None, Message | Refusal]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BRACKETS_ALIKE: Final = bytes.maketrans(b"{}", b"[]")
_NO_BRACKET_OR_QUOTE: Final = bytes(set(range(256)) - set(b'[]{}"'))
# What the JSON library writes, and Python's own reads, without a recursion error.
_DEEPEST: Final = 256
# Only a run of 19 digits can leave 64 bits. Looking for a plain substring after one translation is several times as
# fast as a regular expression.
_DIGITS_ALIKE: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG_RUN: Final = b"0" * 19
_DIGITS_OF_64_BITS: Final = 20
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
# Up to here the passes over the bytes are one step: well below a millisecond.
_LARGE_BYTES: Final = 65_536
_MOST_TRACEPARENT_BYTES: Final = 256  # version 00 has 55; later ones may have more
# Entries of a step: a fifth of a millisecond, or half of one if they are judged one by one.
_SLICE: Final = 512


@attrs.frozen(kw_only=True)
class Limits:
    """Bounds of a message. Counts are inclusive: exactly the limit is accepted.

    Raises:
        ConfigError: on a bound below 1, or a depth above 256; all faults at once.
    """

    message_bytes: int = 1_048_576
    json_depth: int = 32
    stations_per_message: int = 10_000
    station_id_chars: int = 128
    readings_bytes: int = 65_536
    """Of one entry, as compact JSON; not looked at in a message that has no more bytes than this altogether."""

    def __attrs_post_init__(self) -> None:
        """Check the bounds together."""
        faults = [
            f"limits.{name}: {value!r} is below 1"
            for name, value in attrs.asdict(self).items()
            if not value >= 1
        ]
        if self.json_depth > _DEEPEST:
            faults.append(f"limits.json_depth: {self.json_depth!r} is above {_DEEPEST}")
        if faults:
            raise ConfigError(faults)


def parse_message(record: Record, limits: Limits) -> Message | Refusal:
    """Read a record at once; never raises, whatever the bytes."""
    steps = parse_in_steps(record, limits)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            parsed: Message | Refusal = end.value
            return parsed


def parse_in_steps(record: Record, limits: Limits, *, follows: int | None = None) -> Parsing:
    """Read a record; never raises, whatever the bytes. Yields where a large one may pause; a small one never does.

    Args:
        record: its value is looked at only here.
        limits: the bounds.
        follows: offset of the record that was polled before it from its partition.
    """
    value = record.value
    if not value:
        return Refusal(
            reason="empty-value", detail="tombstone (null value)" if value is None else "zero bytes"
        )
    size = len(value)
    if size > limits.message_bytes:
        return Refusal(
            reason="message-too-large",
            detail=f"{size} bytes, limit {limits.message_bytes} (limits.message_bytes)",
        )
    is_large = size > _LARGE_BYTES
    if _too_deep(value, limits.json_depth):
        return Refusal(
            reason="json-too-deep",
            detail=f"nested deeper than {limits.json_depth} (limits.json_depth)",
        )
    if is_large:
        yield
    suspicious = _LONG_RUN in value.translate(_DIGITS_ALIKE)
    if suspicious and (refusal := _judge(value)) is not None:
        return refusal
    if is_large:
        yield
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        return _judge(value) or Refusal(reason="not-json", detail=str(error))
    if type(document) is not dict:
        return Refusal(
            reason="not-an-object", detail=f"the message is a JSON {_json_name(document)}"
        )
    entries = document.pop("stationData", None)
    if type(entries) is not list:
        return Refusal(reason="no-station-data", detail="`stationData` is missing or no list")
    if len(entries) > limits.stations_per_message:
        return Refusal(
            reason="too-many-stations",
            detail=f"{len(entries)} entries, limit {limits.stations_per_message} (limits.stations_per_message)",
        )
    station_ids: list[str] = []
    readings: list[Mapping[str, Any]] = []
    bad: list[BadEntry] = []
    most_bytes = limits.readings_bytes if size > limits.readings_bytes else None
    for first in range(0, len(entries), _SLICE):
        if is_large:
            yield
        some = entries[first : first + _SLICE]
        ids = _ids_if_all_are_good(some, limits, most_bytes)
        if ids is None:
            ids, some = _sort_entries(some, first, limits, most_bytes, bad)
        for entry in some:
            del entry["stationId"]
        station_ids += ids
        readings += some
    if bad and not readings:
        return Refusal(
            reason="no-valid-entry", detail=f"{len(bad)} entries, the first: {bad[0].reason}"
        )
    timestamp = parse_timestamp(document.pop("timestamp", None))
    topic = document.pop("topic", None)
    return Message(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        generation=record.generation,
        record_timestamp_ms=record.timestamp_ms,
        timestamp=timestamp or parse_timestamp(record.timestamp_ms) or _EPOCH,
        station_ids=tuple(station_ids),
        readings=tuple(readings),
        fields=document,
        bad_entries=tuple(bad),
        size_bytes=size,
        topic_differs=topic is not None and topic != record.topic,
        follows=follows,
        traceparent=_traceparent(record) if record.headers else None,
    )


def _traceparent(record: Record) -> str | None:
    """Return the last header of this name, if it is ASCII of a bounded length."""
    for name, value in reversed(record.headers):
        if name == "traceparent":
            if value is None or len(value) > _MOST_TRACEPARENT_BYTES or not value.isascii():
                return None
            return value.decode("ascii")
    return None


def parse_timestamp(value: object) -> datetime | None:
    """Read ISO 8601 (without a zone: UTC) or milliseconds since the epoch; None for anything else."""
    try:
        if type(value) is str:
            moment = datetime.fromisoformat(value)
            return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        if type(value) is int or type(value) is float:
            return _EPOCH + timedelta(milliseconds=value)
    except (ValueError, OverflowError):
        pass  # unreadable: the caller has another time to fall back to
    return None


def _ids_if_all_are_good(
    entries: list[Any], limits: Limits, most_bytes: int | None
) -> list[str] | None:
    """Return the ids of entries that are all valid, without a step of Python per check; None if one may be not.

    With its id, an entry has more bytes than its reading: None as well where that is what exceeds `most_bytes`.
    """
    try:
        ids: list[str] = [entry["stationId"] for entry in entries]
        # `join` refuses what is no text.
        fine = "".join(ids).isprintable() and all(map(str.strip, ids))
    except (KeyError, TypeError):
        return None
    if not fine or max(map(len, ids)) > limits.station_id_chars:
        return None
    if most_bytes is not None and max(map(len, map(orjson.dumps, entries))) > most_bytes:
        return None
    return ids


def _sort_entries(
    entries: list[Any], first: int, limits: Limits, most_bytes: int | None, bad: list[BadEntry]
) -> tuple[list[str], list[Any]]:
    """Judge entries, counted from `first`: return the ids and the entries of the good ones, and add to the `bad`."""
    ids: list[str] = []
    good: list[Any] = []
    for index, entry in enumerate(entries, first):
        reason = _why_bad(entry, limits, most_bytes)
        if reason is None:
            ids.append(entry["stationId"])
            good.append(entry)
        else:
            bad.append(BadEntry(index=index, reason=reason))
    return ids, good


def _why_bad(entry: object, limits: Limits, most_bytes: int | None) -> str | None:
    if type(entry) is not dict:
        return "not-an-object"
    if (reason := why_bad_id(entry.get("stationId"), limits)) is not None:
        return reason
    if most_bytes is not None:
        reading = {name: value for name, value in entry.items() if name != "stationId"}
        if len(orjson.dumps(reading)) > most_bytes:
            return "readings-too-large"
    return None


def why_bad_id(station_id: object, limits: Limits) -> str | None:
    """Return why this can be no station's id (one of the reasons on top of this file), or None if it can."""
    if station_id is None:
        return "station-id-missing"
    if type(station_id) is not str:
        return "station-id-not-text"
    if not station_id.strip():
        return "station-id-blank"
    if len(station_id) > limits.station_id_chars:
        return "station-id-too-long"
    return None if station_id.isprintable() else "station-id-not-printable"


def _too_deep(value: bytes, depth: int) -> bool:
    """Tell whether brackets outside of texts nest deeper than `depth`; exact for whatever is JSON.

    Some twenty passes in C instead of one in Python: hostile bytes of 1 MiB take tens of milliseconds, not seconds.
    """
    if value.count(b"{") + value.count(b"[") <= depth:
        return False  # the common case: too few brackets, wherever they stand
    if b"\\" in value:
        value = value.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Two quotes side by side go together: what is left between quotes stays within a text, or outside of one.
    brackets = value.translate(_BRACKETS_ALIKE, _NO_BRACKET_OR_QUOTE).replace(b'""', b"")
    if b'"' in brackets:
        brackets = b"".join(brackets.split(b'"')[::2])
    for _ in range(depth):
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    return b"[]" in brackets or brackets.count(b"[") > depth


def _judge(value: bytes) -> Refusal | None:
    """Say why a suspicious text is refused, by the standard library; None if nothing is wrong with it."""
    if value.startswith(_BYTE_ORDER_MARK):
        return Refusal(reason="not-utf8", detail="begins with a byte order mark")
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        return Refusal(reason="not-utf8", detail=f"byte {error.start}: {error.reason}")
    try:
        document = json.loads(
            text,
            parse_int=_int64,
            parse_float=_finite,
            parse_constant=_constant,
            object_pairs_hook=list,  # of all pairs: what a later key hides must be whole as well
        )
        json.dumps(document, ensure_ascii=False).encode()
    except _OutOfRangeError as error:
        return Refusal(reason="number-out-of-range", detail=str(error))
    except UnicodeEncodeError:
        return Refusal(reason="lone-surrogate", detail="an escape is half a surrogate pair")
    except ValueError as error:
        return Refusal(reason="not-json", detail=str(error)[:200])
    return None


class _OutOfRangeError(Exception):
    pass


def _int64(digits: str) -> int:
    # Length first: Python itself refuses to read thousands of digits.
    if len(digits.lstrip("-")) > _DIGITS_OF_64_BITS or not -(2**63) <= int(digits) < 2**64:
        raise _OutOfRangeError(f"integer of {len(digits)} characters beyond 64 bits: {digits[:24]}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _OutOfRangeError(f"number beyond a double: {digits[:24]}")
    return number


def _constant(name: str) -> NoReturn:
    raise _OutOfRangeError(f"{name} is no JSON number")


def _json_name(value: object) -> str:
    if value is None:
        return "null"
    names: Mapping[type, str] = {list: "array", str: "text", bool: "boolean"}
    return names.get(type(value), "number")
