"""The corpus through the parser, and the parser with another JSON library."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stationmaster import messages
from stationmaster.batch import Record, Refusal
from stationmaster.messages import Limits, parse_message
from tests.hostile.corpus import CORPUS, ENTRY_REASONS, REASONS, RECORD_MS, Hostile, with_reading
from tests.hostile.standard_library import StandardJson, another_library, essence
from tests.test_messages_judged import SMALL, documents

each = pytest.mark.parametrize("hostile", CORPUS, ids=[hostile.name for hostile in CORPUS])


def record(hostile: Hostile) -> Record:
    return Record(
        topic="air",
        partition=0,
        offset=0,
        timestamp_ms=RECORD_MS,
        value=hostile.value,
        headers=hostile.headers,
    )


@each
def test_a_hostile_message_is_refused_for_its_reason_or_accepted_with_its_stations(
    hostile: Hostile,
) -> None:
    parsed = parse_message(record(hostile), Limits())

    if isinstance(parsed, Refusal):
        assert parsed.reason == hostile.reason
        assert len(parsed.detail) < 300
        return
    assert hostile.reason is None
    assert parsed.station_ids == hostile.stations
    assert tuple(bad.reason for bad in parsed.bad_entries) == hostile.left_out
    assert parsed.timestamp.isoformat() == hostile.time
    assert parsed.traceparent == hostile.traceparent


def test_the_corpus_has_every_reason_several_times_and_no_name_twice() -> None:
    names = [hostile.name for hostile in CORPUS]
    assert len(set(names)) == len(names) >= 60
    reasons = [hostile.reason for hostile in CORPUS if hostile.reason is not None]
    assert set(reasons) == REASONS
    assert min(map(reasons.count, REASONS)) >= 2
    assert {reason for hostile in CORPUS for reason in hostile.left_out} <= ENTRY_REASONS


def test_the_parser_documents_every_reason_and_the_corpus_knows_them_all() -> None:
    told = messages.__doc__ or ""
    for reason in REASONS:
        assert f"    {reason} " in told
    entries = told.partition("Reasons for leaving out one entry: ")[2].partition(".")[0]
    assert set(entries.replace("\n", " ").split(", ")) == ENTRY_REASONS


# ------------------------------------------------------------------------------------------------- another JSON library


@each
def test_a_hostile_message_has_the_same_outcome_with_another_json_library(hostile: Hostile) -> None:
    with another_library():
        other = parse_message(record(hostile), Limits())
    assert essence(other) == essence(parse_message(record(hostile), Limits()))


@settings(max_examples=400, deadline=None)
@given(documents())
def test_any_json_has_the_same_outcome_with_another_json_library(value: bytes) -> None:
    one = Record(topic="air", partition=0, offset=0, timestamp_ms=0, value=value)
    with another_library():
        other = parse_message(one, SMALL)
    assert essence(other) == essence(parse_message(one, SMALL))


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(1e16)
@example(1e-5)
@example(1e-7)
def test_libraries_differ_by_no_more_than_two_characters_in_how_long_a_real_number_is(
    number: float,
) -> None:
    """All that is left to the library: the bound of a reading counts its compact JSON."""
    assert abs(len(orjson.dumps(number)) - len(StandardJson.dumps(number))) <= 2


@pytest.mark.parametrize("levels", [253, 254])
def test_what_is_half_at_the_greatest_depth_is_found_there_without_an_error_of_recursion(
    levels: int,
) -> None:
    """Twice as deep for the judge, who keeps an object as a list of pairs."""
    value = with_reading(b'{"a":' * (levels - 1) + b'{"a":"\\ud800"}' + b"}" * (levels - 1))
    one = Record(topic="air", partition=0, offset=0, timestamp_ms=0, value=value)
    parsed = parse_message(one, Limits(json_depth=256))
    assert isinstance(parsed, Refusal)
    assert parsed.reason == ("lone-surrogate" if levels == 253 else "json-too-deep")
