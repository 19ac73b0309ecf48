"""A closed batch as JSON: what is uploaded, and what an outbox keeps. Pure.

The form of a report, its keys in this order:

    {"batchId", "topic", "closedBy", "followUp"?, "openedAt", "closedAt", "durationSeconds",
     "ranges": [{"partition", "first", "last"}],
     "counts": {"expected", "succeeded", "noOutput", "failed", "timedOut", "missing", "rejected"},
     "results": [{"stationId", ...the handler's mapping}],
     "unsuccessful": [{"stationId", "outcome", "reason"}],
     "badEntries": [{"index", "reason"}]}

`followUp` is there, and true, where another batch of the same time was before.
"""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Any

import orjson

from stationmaster.batch import Outcome

if TYPE_CHECKING:
    from datetime import datetime

    from stationmaster.batch import BatchReport


def encode_report(report: BatchReport) -> bytes:
    """Return the report as JSON, in the form that is uploaded (on top of this file)."""
    batch = report.batch
    succeeded = Outcome.SUCCEEDED  # to look it up once per result takes longer than all the rest
    # Joined here: a `Fragment` for each of thousands of results would cost more than all the rest.
    encoded = b",".join(
        [result.encoded for result in report.results if result.outcome is succeeded]
    )
    unsuccessful = [
        {
            "stationId": result.station_id,
            "outcome": result.outcome.value,
            "reason": _legal(result.reason),
        }
        for result in report.results
        if result.outcome is not succeeded
    ]
    form: dict[str, Any] = {
        "batchId": batch.batch_id,
        "topic": batch.topic,
        "closedBy": report.closed_by.value,
        **({"followUp": True} if batch.follow_up else {}),
        "openedAt": _iso(batch.opened_at),
        "closedAt": _iso(report.closed_at),
        "durationSeconds": round(report.duration_s, 6),
        "ranges": [
            {"partition": offsets.partition, "first": offsets.first, "last": offsets.last}
            for offsets in batch.ranges
        ],
        "counts": {
            "expected": len(report.results),
            **{outcome.value: report.counts[outcome] for outcome in Outcome},
        },
        "results": orjson.Fragment(b"[%b]" % encoded),
        "unsuccessful": unsuccessful,
        "badEntries": [
            {"index": bad.index, "reason": _legal(bad.reason)} for bad in batch.bad_entries
        ],
    }
    return orjson.dumps(form)


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _legal(text: str) -> str:
    """Return a text from anywhere (a handler's error, say) without the lone surrogates that JSON cannot hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
