"""A closed batch and its upload form, for tests of what takes it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson

from stationmaster.batch import (
    BadEntry,
    Batch,
    BatchReport,
    ClosedBy,
    OffsetRange,
    Outcome,
    StationResult,
)
from stationmaster.reports import encode_report

RANGES = ((0, 12345, 12345),)


def report(
    batch_id: str = "air_0_1_1700000000", *, ranges: tuple[Any, ...] = RANGES
) -> BatchReport:
    """A closed batch of four stations, two of which succeeded."""
    opened = datetime(2013, 3, 1, tzinfo=UTC)
    batch = Batch(
        batch_id=batch_id,
        topic="air",
        opened_at=opened,
        deadline=0.0,
        ranges=tuple(
            OffsetRange(topic="air", partition=partition, first=first, last=last)
            for partition, first, last in ranges
        ),
        entries={},
        last_message={},
        bad_entries=(BadEntry(index=4, reason="no stationId"),),
    )
    results = (
        StationResult("S001", Outcome.SUCCEEDED, encoded=b'{"stationId":"S001","embedding":[1]}'),
        StationResult("S002", Outcome.FAILED, reason="boom"),
        StationResult("S003", Outcome.SUCCEEDED, encoded=b'{"stationId":"S003","embedding":[2]}'),
        StationResult("S004", Outcome.TIMED_OUT, reason="5 s"),
    )
    outcomes = [result.outcome for result in results]
    return BatchReport(
        batch=batch,
        closed_by=ClosedBy.DEADLINE,
        closed_at=opened,
        duration_s=5.0,
        results=results,
        counts={outcome: outcomes.count(outcome) for outcome in Outcome},
    )


def form(batch_id: str = "air_0_1_1700000000", **changes: Any) -> dict[str, Any]:
    """The upload form of that batch, as an object, with some fields changed."""
    uploaded: dict[str, Any] = orjson.loads(encode_report(report(batch_id)))
    return uploaded | changes
