"""A message's time: what can be read, and what counts when it cannot."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone

import pytest

from stationmaster.batch import Message
from stationmaster.messages import Limits, parse_message, parse_timestamp
from tests.telemetry import record


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("2024-01-01T12:00:00Z", datetime(2024, 1, 1, 12, tzinfo=UTC)),
        ("2024-01-01T12:00:00", datetime(2024, 1, 1, 12, tzinfo=UTC)),
        ("2024-01-01", datetime(2024, 1, 1, tzinfo=UTC)),
        (
            "2024-01-01T12:00:00.5+02:00",
            datetime(2024, 1, 1, 12, 0, 0, 500_000, tzinfo=timezone(timedelta(hours=2))),
        ),
        (1_704_110_400_000, datetime(2024, 1, 1, 12, tzinfo=UTC)),
        (1_704_110_400_000.5, datetime(2024, 1, 1, 12, 0, 0, 500, tzinfo=UTC)),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (-1_000, datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_a_timestamp_is_iso_8601_or_epoch_milliseconds(value: object, moment: datetime) -> None:
    found = parse_timestamp(value)
    assert found == moment
    assert found is not None
    assert found.utcoffset() is not None


@pytest.mark.parametrize(
    "value",
    [True, None, "", "noon", "2024-13-01", [], {}, 2**63, -(2**63), 1e300, math.nan, math.inf],
)
def test_an_unreadable_timestamp_is_none(value: object) -> None:
    assert parse_timestamp(value) is None


@pytest.mark.parametrize(
    ("value", "record_ms", "moment"),
    [
        (b'{"stationData": [], "timestamp": 1000}', 5_000, 1),
        (b'{"stationData": []}', 5_000, 5),
        (b'{"stationData": [], "timestamp": "noon"}', 5_000, 5),
        (b'{"stationData": [], "timestamp": true}', 5_000, 5),
        (b'{"stationData": [], "timestamp": null}', 0, 0),
        (b'{"stationData": []}', 2**63 - 1, 0),
    ],
)
def test_without_a_readable_timestamp_the_records_time_counts_and_then_the_epoch(
    value: bytes, record_ms: int, moment: int
) -> None:
    parsed = parse_message(record(value, timestamp_ms=record_ms), Limits())
    assert isinstance(parsed, Message)
    assert parsed.timestamp == datetime.fromtimestamp(moment, UTC)
    assert "timestamp" not in parsed.fields
