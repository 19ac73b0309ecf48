"""The parser: every refusal by name, every bound exactly."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stationmaster.batch import Message, Refusal
from stationmaster.errors import ConfigError
from stationmaster.messages import Limits, parse_message
from tests.telemetry import message_bytes, record


def parse(value: bytes | None, **limits: int) -> Message | Refusal:
    return parse_message(record(value), Limits(**limits))


def accepted(value: bytes, **limits: int) -> Message:
    parsed = parse(value, **limits)
    assert isinstance(parsed, Message), parsed
    return parsed


def refused(value: bytes | None, **limits: int) -> str:
    parsed = parse(value, **limits)
    assert isinstance(parsed, Refusal), parsed
    assert parsed.detail
    return parsed.reason


def with_value(json_text: bytes) -> bytes:
    return b'{"stationData": [{"stationId": "S1", "x": ' + json_text + b"}]}"


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """A message whose reading nests so deep that the whole text has `levels` levels."""
    return with_value(opening * (levels - 3) + closing * (levels - 3))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        pytest.param(None, "empty-value", id="a tombstone"),
        pytest.param(b"", "empty-value", id="zero bytes"),
        pytest.param(b" ", "not-json", id="one space"),
        pytest.param(b" \t\r\n ", "not-json", id="white space"),
        pytest.param(b"{", "not-json", id="one byte"),
        pytest.param(b"\x00", "not-json", id="one zero byte"),
        pytest.param(b"{'stationData': []}", "not-json", id="single quotes"),
        pytest.param(b'{"stationData": [],}', "not-json", id="a trailing comma"),
        pytest.param(b'{"stationData": []} {}', "not-json", id="trailing data"),
        pytest.param(b'{"stationData": []}\x00', "not-json", id="a trailing zero byte"),
        pytest.param(b'{"stationData": []', "not-json", id="cut short"),
        pytest.param(b'{"stationData": "', "not-json", id="cut within a text"),
        pytest.param(b'{"stationData": [], "a": "\n"}', "not-json", id="a raw line break"),
        pytest.param(b'{"stationData": [], "a": 01}', "not-json", id="a leading zero"),
        pytest.param(b"]" * 100, "not-json", id="only closing brackets"),
        pytest.param(b'{"stationData": [], "a": "\xff"}', "not-utf8", id="a byte that is no UTF-8"),
        pytest.param(
            b'{"stationData": [], "a": "\xed\xa0\x80"}', "not-utf8", id="a surrogate as UTF-8"
        ),
        pytest.param(b'{"stationData": [], "a": "\xc0\xaf"}', "not-utf8", id="an overlong form"),
        pytest.param(b"\xef\xbb\xbf" + message_bytes("S1"), "not-utf8", id="a byte order mark"),
        pytest.param(message_bytes("S1").decode().encode("utf-16"), "not-utf8", id="UTF-16"),
        pytest.param(b"null", "not-an-object", id="null"),
        pytest.param(b"true", "not-an-object", id="a boolean"),
        pytest.param(b"7", "not-an-object", id="a number"),
        pytest.param(b'"S1"', "not-an-object", id="a text"),
        pytest.param(b'[{"stationId": "S1"}]', "not-an-object", id="an array"),
        pytest.param(b"{}", "no-station-data", id="an empty object"),
        pytest.param(b'{"stationdata": []}', "no-station-data", id="another name"),
        pytest.param(b'{"stationData": null}', "no-station-data", id="null stations"),
        pytest.param(b'{"stationData": {"S1": {}}}', "no-station-data", id="stations as an object"),
        pytest.param(
            b'{"stationData": [], "stationData": 1}', "no-station-data", id="the last key wins"
        ),
        pytest.param(b'{"stationData": [7]}', "no-valid-entry", id="no entry can be used"),
    ],
)
def test_a_bad_message_is_refused_for_its_reason(value: bytes | None, reason: str) -> None:
    assert refused(value) == reason


@pytest.mark.parametrize(
    ("json_text", "reason"),
    [
        (b"NaN", "number-out-of-range"),
        (b"Infinity", "number-out-of-range"),
        (b"-Infinity", "number-out-of-range"),
        (b"1e400", "number-out-of-range"),
        (b"-1E400", "number-out-of-range"),
        (b"1.5e+0400", "number-out-of-range"),
        (b"9" * 400 + b".0", "number-out-of-range"),
        (b"9" * 18 + b"e300", "number-out-of-range"),
        (b"18446744073709551616", "number-out-of-range"),
        (b"-9223372036854775809", "number-out-of-range"),
        (b"9" * 5_000, "number-out-of-range"),
        (b"-" + b"9" * 5_000, "number-out-of-range"),
        (b'"\\ud800"', "lone-surrogate"),
        (b'"\\udc00\\ud800"', "lone-surrogate"),
        (b'{"\\udfff": 1}', "lone-surrogate"),
    ],
)
def test_a_number_beyond_64_bits_and_half_a_character_are_refused(
    json_text: bytes, reason: str
) -> None:
    assert refused(with_value(json_text)) == reason
    assert refused(b'{"stationData": [], "other": ' + json_text + b"}") == reason


def test_a_station_id_with_half_a_character_is_refused_with_its_message() -> None:
    assert refused(b'{"stationData": [{"stationId": "S\\ud800"}]}') == "lone-surrogate"


@pytest.mark.parametrize(
    ("json_text", "number"),
    [
        (b"18446744073709551615", 2**64 - 1),
        (b"-9223372036854775808", -(2**63)),
        (b"9223372036854775808", 2**63),
        (b"-0", 0),
        (b"1e99", 1e99),
        (b"1.7976931348623157e308", 1.7976931348623157e308),
        (b"1e-400", 0.0),
        (b"0." + b"3" * 5_000, 1 / 3),
        (b"1e0000000000000000000000001", 10.0),
        (b'"' + b"9" * 5_000 + b'"', "9" * 5_000),
        (b'"id 12345678901234567890 1e400 NaN"', "id 12345678901234567890 1e400 NaN"),
        (b'"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
    ],
)
def test_numbers_within_range_and_digits_within_texts_are_fine(
    json_text: bytes, number: object
) -> None:
    ((_, reading),) = accepted(with_value(json_text)).entries
    assert reading["x"] == number
    assert type(reading["x"]) is type(number)


@given(number=st.integers(-(2**70), 2**70) | st.sampled_from([10**18, 10**19, 10**20]))
@example(2**64 - 1)
@example(2**64)
@example(-(2**63))
@example(-(2**63) - 1)
def test_an_integer_is_read_exactly_or_refused(number: int) -> None:
    parsed = parse(with_value(str(number).encode()))
    if -(2**63) <= number < 2**64:
        assert isinstance(parsed, Message)
        assert parsed.entries[0][1] == {"x": number}
    else:
        assert isinstance(parsed, Refusal)
        assert parsed.reason == "number-out-of-range"


# -------------------------------------------------------------------------------------------------------------- bounds


def test_every_bound_is_inclusive() -> None:
    value = message_bytes("S1", "S2")
    accepted(value, message_bytes=len(value))
    assert refused(value, message_bytes=len(value) - 1) == "message-too-large"
    accepted(value, stations_per_message=2)
    assert refused(value, stations_per_message=1) == "too-many-stations"
    accepted(value, station_id_chars=2)
    assert refused(value, station_id_chars=1) == "no-valid-entry"


def test_the_bound_of_a_reading_counts_its_compact_json() -> None:
    value = b'{"stationData": [{"stationId": "S1", "x":     "' + b"y" * 100 + b'"}]}'
    compact = len(b'{"x":"' + b"y" * 100 + b'"}')
    accepted(value, readings_bytes=compact)
    assert refused(value, readings_bytes=compact - 1) == "no-valid-entry"


@pytest.mark.parametrize("deepest", [3, 4, 5, 32, 256])
@pytest.mark.parametrize(
    ("opening", "closing"),
    [(b"[", b"]"), (b'{"a":', b"}"), (b'["]",', b',"["]'), (b'{"\\"]":', b"}")],
)
def test_depth_is_counted_outside_of_texts_only(
    deepest: int, opening: bytes, closing: bytes
) -> None:
    inner = closing if opening == b"[" else b"1" + closing
    texts = opening * (deepest - 4) + opening + inner + closing * (deepest - 4)
    value = with_value(b"1" if deepest == 3 else texts)
    accepted(value, json_depth=deepest)
    if deepest > 3:
        assert refused(value, json_depth=deepest - 1) == "json-too-deep"


def test_arrays_and_objects_in_turn_count_each() -> None:
    value = with_value(b'[{"a":' * 10 + b"1" + b"}]" * 10)
    accepted(value, json_depth=23)
    assert refused(value, json_depth=22) == "json-too-deep"


@pytest.mark.parametrize(
    "text",
    [
        b'"' + b"[" * 100 + b'"',
        b'"\\"' + b"[{" * 100 + b'"',
        b'"\\\\"',
        b'"\\\\\\"[[[["',
        b'"]}]}"',
    ],
)
def test_brackets_within_texts_do_not_count(text: bytes) -> None:
    accepted(with_value(text), json_depth=3)


@pytest.mark.parametrize("levels", [40, 1_000, 2_000, 100_000])
def test_depth_cannot_hide_behind_brackets_within_texts(levels: int) -> None:
    hidden = b'["]",' * levels + b'"["' + b'],"["' * (levels - 1) + b"]"
    assert refused(with_value(hidden)) == "json-too-deep"


@pytest.mark.parametrize(
    "text", [b'"\\\\"', b'"\\\\\\\\"', b'"\\\\\\""', b'"\\"\\\\"', b'"\\u005c"']
)
def test_depth_cannot_hide_behind_escapes(text: bytes) -> None:
    value = with_value(b"[" + text + b"," + b"[" * 40 + text + b"]" * 40 + b"]")
    accepted(value, json_depth=44)
    assert refused(value, json_depth=43) == "json-too-deep"


@pytest.mark.parametrize("levels", [33, 1_000, 2_000, 100_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'["[",', b'[{"a":'])
def test_endless_nesting_that_is_cut_short_is_refused_and_never_raises(
    levels: int, opening: bytes
) -> None:
    assert refused(opening * levels) == "json-too-deep"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"[[]" * 300_000, "json-too-deep"),
        (b"[]," * 300_000 + b"[", "not-json"),
        (b"\\" * 1_000_000, "not-json"),
        (b'"[' * 500_000, "json-too-deep"),
        (b"[]" + b"]" * 100_000 + b"[" * 32, "not-json"),
    ],
)
def test_a_megabyte_of_brackets_is_refused_like_anything_else(value: bytes, reason: str) -> None:
    assert refused(value) == reason


@pytest.mark.parametrize(
    ("limits", "fault"),
    [
        ({"json_depth": 257}, "limits.json_depth: 257 is above 256"),
        ({"json_depth": 0}, "limits.json_depth: 0 is below 1"),
        ({"message_bytes": 0}, "limits.message_bytes: 0 is below 1"),
    ],
)
def test_nonsensical_bounds_are_refused(limits: dict[str, int], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Limits(**limits)
    assert caught.value.faults == (fault,)


def test_a_reading_at_the_greatest_depth_can_still_be_measured() -> None:
    accepted(nested(256) + b" " * 100, json_depth=256, readings_bytes=600)
    assert refused(nested(257), json_depth=256) == "json-too-deep"


# ------------------------------------------------------------------------------------------------------------- entries


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (b"7", "not-an-object"),
        (b"null", "not-an-object"),
        (b"[]", "not-an-object"),
        (b'"S1"', "not-an-object"),
        (b"{}", "station-id-missing"),
        (b'{"stationId": null}', "station-id-missing"),
        (b'{"stationID": "S1"}', "station-id-missing"),
        (b'{"stationId": 7}', "station-id-not-text"),
        (b'{"stationId": true}', "station-id-not-text"),
        (b'{"stationId": ["S1"]}', "station-id-not-text"),
        (b'{"stationId": ""}', "station-id-blank"),
        (b'{"stationId": "  "}', "station-id-blank"),
        (b'{"stationId": "\\u00a0"}', "station-id-blank"),
        (b'{"stationId": "' + b"x" * 129 + b'"}', "station-id-too-long"),
        (b'{"stationId": "S\\u00001"}', "station-id-not-printable"),
        (b'{"stationId": "S1\\n"}', "station-id-not-printable"),
        (b'{"stationId": "S\\u202e1"}', "station-id-not-printable"),
        (b'{"stationId": "S1", "x": "' + b"y" * 65_536 + b'"}', "readings-too-large"),
    ],
)
def test_a_bad_entry_is_left_out_with_its_reason_and_its_neighbours_stay(
    entry: bytes, reason: str
) -> None:
    parsed = accepted(
        b'{"stationData": [{"stationId": "A"}, ' + entry + b', {"stationId": "B", "x": 1}]}'
    )
    assert [station_id for station_id, _ in parsed.entries] == ["A", "B"]
    assert [(bad.index, bad.reason) for bad in parsed.bad_entries] == [(1, reason)]
    assert refused(b'{"stationData": [' + entry + b"]}") == "no-valid-entry"


def test_a_station_id_may_have_128_characters_of_any_script_and_spaces_within() -> None:
    for station_id in ("x" * 128, "Gänserndorf Süd", "北京 12", "S/1:2"):
        ((found, _),) = accepted(message_bytes(station_id)).entries
        assert found == station_id


def test_an_empty_list_of_stations_is_a_good_message() -> None:
    parsed = accepted(b'{"stationData": []}')
    assert parsed.entries == ()
    assert parsed.bad_entries == ()


def test_the_same_station_twice_keeps_both_readings_in_order() -> None:
    value = message_bytes({"stationId": "A", "x": 1}, "B", {"stationId": "A", "x": 2})
    assert accepted(value).entries == (("A", {"x": 1}), ("B", {}), ("A", {"x": 2}))


def test_of_a_key_given_twice_the_last_one_counts() -> None:
    parsed = accepted(
        b'{"stationData": 1, "unit": "a", "unit": "b",'
        b' "stationData": [{"stationId": "S1", "stationId": "S2", "x": 1, "x": 2}]}'
    )
    assert parsed.entries == (("S2", {"x": 2}),)
    assert parsed.fields == {"unit": "b"}


def test_a_message_keeps_its_place_its_size_and_its_other_fields() -> None:
    value = message_bytes("S1", unit="ug/m3", timestamp=0, topic="air")
    parsed = parse_message(
        record(value, topic="air", partition=3, offset=42, generation=7, timestamp_ms=1_234),
        Limits(),
    )
    assert isinstance(parsed, Message)
    assert (parsed.topic, parsed.partition, parsed.offset) == ("air", 3, 42)
    assert (parsed.generation, parsed.record_timestamp_ms) == (7, 1_234)
    assert parsed.size_bytes == len(value)
    assert parsed.fields == {"unit": "ug/m3"}
    assert not parsed.topic_differs


@pytest.mark.parametrize(
    ("field", "differs"), [({}, False), ({"topic": "air"}, False), ({"topic": "water"}, True)]
)
def test_a_topic_field_that_names_another_topic_is_only_noted(
    field: dict[str, str], differs: bool
) -> None:
    parsed = accepted(message_bytes("S1", **field))
    assert parsed.topic == "air"
    assert parsed.topic_differs is differs
