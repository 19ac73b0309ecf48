"""The parser: a large message is read in steps, and its entries are judged slice by slice."""

from __future__ import annotations

import pytest

from stationmaster.messages import Limits, parse_in_steps
from tests.telemetry import message_bytes, record
from tests.test_messages import accepted, refused


def test_a_small_message_is_read_in_one_step_and_a_large_one_pauses_every_512_entries() -> None:
    small = message_bytes(*(f"S{number}" for number in range(1_000)))
    assert list(parse_in_steps(record(small), Limits())) == []
    large = message_bytes(*({"stationId": f"S{number}", "x": 20.5} for number in range(5_120)))
    pauses = list(parse_in_steps(record(large), Limits()))
    assert len(pauses) == 2 + 10  # after the depth, after the digits, and before each slice


@pytest.mark.parametrize("value", [b"[" * 70_000, b"\xff" * 70_000, b"[%b]" % (b"7," * 50_000)])
def test_a_large_record_that_is_refused_ends_the_steps(value: bytes) -> None:
    assert len(list(parse_in_steps(record(value), Limits()))) <= 2


@pytest.mark.parametrize("filling", ["", "y" * 100])
def test_bad_entries_of_a_large_message_keep_their_places_and_harm_no_slice(filling: str) -> None:
    entries: list[object] = [{"stationId": f"S{number}", "x": filling} for number in range(1_300)]
    entries[0] = entries[512] = entries[1_299] = 7
    entries[511] = {"stationId": "large", "x": "y" * 65_536}
    good = [entry for entry in entries if isinstance(entry, dict) and len(entry["x"]) < 200]
    parsed = accepted(message_bytes(*entries))
    assert [(bad.index, bad.reason) for bad in parsed.bad_entries] == [
        (0, "not-an-object"),
        (511, "readings-too-large"),
        (512, "not-an-object"),
        (1_299, "not-an-object"),
    ]
    assert list(parsed.entries) == [(entry["stationId"], {"x": filling}) for entry in good]


def test_the_id_of_a_station_is_no_part_of_its_reading_in_a_large_message_either() -> None:
    entry = {"stationId": "S" * 100, "x": "y" * 100}
    compact = len(b'{"x":"' + b"y" * 100 + b'"}')
    accepted(message_bytes(*[entry] * 2), readings_bytes=compact)
    assert refused(message_bytes(*[entry] * 2), readings_bytes=compact - 1) == "no-valid-entry"


@pytest.mark.parametrize("neighbour", [b'{"stationId":"S2"}', b"7"])
def test_readings_that_grow_when_they_are_written_are_judged_alike_whatever_their_neighbours(
    neighbour: bytes,
) -> None:
    """A real number may take ten characters more as compact JSON; a small message is not measured at all."""
    value = b'{"stationData":[{"stationId":"S1","x":[%b1]},%b]}' % (b"1e9," * 10_000, neighbour)
    assert "S1" in accepted(value).station_ids
