"""What goes on, as a bounded picture for people: the status page and `/api/status`.

The board hears events and works per batch and per call, never per station's answer; what is a moment (open batches,
queues, lag) is asked of the running parts when somebody looks. A picture is plain JSON values. Texts from outside stand
in it as they came, except that what cannot be printed is escaped.
"""

from __future__ import annotations

from collections import Counter, deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from stationmaster import __version__
from stationmaster.batch import ClosedBy, Outcome
from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    BatchOpened,
    BatchWithdrawn,
    CallFailed,
    CallStarted,
    EmptyBatch,
    EndpointClosed,
    EndpointOpened,
    MessageRefused,
    OutboxDelivered,
    SourceRecovered,
    SourceTrouble,
    StoreBlocked,
    StoreUnblocked,
    UploadDone,
    UploadFailed,
    UploadKept,
    UploadRejected,
    UploadsDiverted,
    UploadsResumed,
)
from stationmaster.service.config_rules import printable
from stationmaster.service.station_grid import OUTCOMES, StationGrid

if TYPE_CHECKING:
    from collections.abc import Callable

    from stationmaster.batch import BatchReport
    from stationmaster.batcher import BatcherStatistics
    from stationmaster.events import Event
    from stationmaster.kafka import KafkaStatistics
    from stationmaster.pipeline import Pipeline
    from stationmaster.service.health import Health
    from stationmaster.state import StateStatistics, StoreStatistics

SHOWN_BATCHES: Final = 32
KEPT_REPORTS: Final = 50
_KEPT_CALLS: Final = 100
_SHOWN_PARTITIONS: Final = 64
_NAMED_STATIONS: Final = 5
_BRIEF: Final = 200
"""Characters of a text from outside."""


@attrs.define(eq=False, kw_only=True)
class RecentReport:
    """One closed batch, and what became of its upload."""

    number: int
    batch_id: str
    topic: str
    closed_at: str
    closed_by: str
    seconds: float
    deadline_s: float
    expected: int
    succeeded: int
    unsuccessful: tuple[tuple[str, str], ...]
    """The first few, each with its outcome."""
    unsuccessful_more: int
    upload: str = "uploading"
    """uploading, uploaded, in outbox, rejected, failed, dropped or withdrawn."""

    def picture(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "number": self.number,
            "batchId": self.batch_id,
            "topic": self.topic,
            "closedAt": self.closed_at,
            "closedBy": self.closed_by,
            "seconds": round(self.seconds, 3),
            "deadlineSeconds": round(self.deadline_s, 3),
            "expected": self.expected,
            "succeeded": self.succeeded,
            "unsuccessful": [
                {"stationId": name, "outcome": outcome} for name, outcome in self.unsuccessful
            ],
            "unsuccessfulMore": self.unsuccessful_more,
            "upload": self.upload,
        }


@attrs.define(eq=False)
class StatusBoard:
    """An observer that keeps the picture. The parts it watches may come later, or never."""

    stations: StationGrid = attrs.field(factory=StationGrid)
    max_batch_rows: int | None = None
    """Of the batcher: a full call."""
    max_in_flight: int | None = None
    """Of the pipeline: its slots."""
    detailed: bool = attrs.field(default=False, init=False)
    _opened_at: datetime = attrs.field(factory=lambda: datetime.now(UTC), init=False)
    _reports: deque[RecentReport] = attrs.field(
        factory=lambda: deque(maxlen=KEPT_REPORTS), init=False
    )
    _by_id: dict[str, RecentReport] = attrs.field(factory=dict, init=False)
    """The recent ones whose upload may still change."""
    _changed: dict[int, RecentReport] = attrs.field(factory=dict, init=False)
    _counters: Counter[str] = attrs.field(factory=Counter, init=False)
    _outcomes: Counter[Outcome] = attrs.field(factory=Counter, init=False)
    _closed_by: Counter[ClosedBy] = attrs.field(factory=Counter, init=False)
    _seconds: float = attrs.field(default=0.0, init=False)
    _worst_lateness_s: float = attrs.field(default=0.0, init=False)
    _call_rows: deque[int] = attrs.field(factory=lambda: deque(maxlen=_KEPT_CALLS), init=False)
    _troubles: dict[str, str] = attrs.field(factory=dict, init=False)
    """What is wrong now -> in words. As many kinds as there are parts."""
    _health: Health | None = attrs.field(default=None, init=False)
    _pipeline: Pipeline | None = attrs.field(default=None, init=False)
    _batcher: Callable[[], BatcherStatistics] | None = attrs.field(default=None, init=False)
    _kafka: Callable[[], KafkaStatistics] | None = attrs.field(default=None, init=False)
    _state: Callable[[], StateStatistics] | None = attrs.field(default=None, init=False)

    # ------------------------------------------------------------------------------------------------- what it knows

    def watch(
        self,
        *,
        health: Health | None = None,
        pipeline: Pipeline | None = None,
        batcher: Callable[[], BatcherStatistics] | None = None,
        kafka: Callable[[], KafkaStatistics] | None = None,
        state: Callable[[], StateStatistics] | None = None,
    ) -> None:
        """Ask these from now on; what is None stays as it was."""
        self._health = health or self._health
        self._pipeline = pipeline or self._pipeline
        self._batcher = batcher or self._batcher
        self._kafka = kafka or self._kafka
        self._state = state or self._state

    def observe(self, event: Event, /) -> None:
        """Learn from one event."""
        match event:
            case BatchOpened():
                self._counters["opened"] += 1
            case BatchClosed():
                self._close(event.report, event.lateness_s)
            case UploadDone() | UploadRejected() | UploadFailed() | UploadKept():
                self._end_upload(event)
            case BatchDropped() | BatchWithdrawn():
                word = "dropped" if isinstance(event, BatchDropped) else "withdrawn"
                self._count_upload(word, event.batch.batch_id)
            case EmptyBatch():
                self._counters["empty"] += 1
            case MessageRefused():
                self._counters["refused"] += 1
            case OutboxDelivered():
                self._counters["uploadedFromOutbox"] += 1
                self._end_report(event.batch_id, "uploaded")
            case CallStarted():
                self._call_rows.append(event.rows)
            case CallFailed():
                self._counters["failedCalls"] += 1
            case _:
                self._note_trouble(event)

    def _close(self, report: BatchReport, lateness_s: float) -> None:
        self.stations.take(report.results)
        self._closed_by[report.closed_by] += 1
        self._seconds += report.duration_s
        self._worst_lateness_s = max(self._worst_lateness_s, lateness_s)
        for outcome, count in report.counts.items():
            self._outcomes[outcome] += count
        expected, succeeded = sum(report.counts.values()), report.counts[Outcome.SUCCEEDED]
        named: list[tuple[str, str]] = []
        if succeeded < expected:
            for result in report.results:
                if result.outcome is not Outcome.SUCCEEDED:
                    named.append((result.station_id, result.outcome.value))
                    if len(named) == _NAMED_STATIONS:
                        break
        self._counters["closed"] += 1
        recent = RecentReport(
            number=self._counters["closed"],
            batch_id=report.batch.batch_id,
            topic=report.batch.topic,
            closed_at=_iso(report.closed_at),
            closed_by=report.closed_by.value,
            seconds=report.duration_s,
            deadline_s=report.batch.deadline - trio.current_time() + report.duration_s,
            expected=expected,
            succeeded=succeeded,
            unsuccessful=tuple(named),
            unsuccessful_more=expected - succeeded - len(named),
        )
        if len(self._reports) == KEPT_REPORTS:
            oldest = self._reports[0]
            if self._by_id.get(oldest.batch_id) is oldest:
                del self._by_id[oldest.batch_id]
            self._changed.pop(oldest.number, None)
        self._reports.append(recent)
        self._by_id[recent.batch_id] = recent
        self._changed[recent.number] = recent

    def _end_upload(self, event: UploadDone | UploadRejected | UploadFailed | UploadKept) -> None:
        match event:
            case UploadDone():
                self._count_upload("uploaded", event.report.batch.batch_id)
            case UploadRejected():
                self._count_upload("rejected", event.report.batch.batch_id)
            case UploadFailed():
                self._count_upload("failed", event.batch_id)
            case UploadKept():
                self._count_upload("in outbox", event.batch_id)

    def _count_upload(self, word: str, batch_id: str) -> None:
        self._counters[word] += 1
        self._end_report(batch_id, word)

    def _end_report(self, batch_id: str, word: str) -> None:
        recent = self._by_id.get(batch_id)
        if recent is not None:
            recent.upload = word
            self._changed[recent.number] = recent

    def _note_trouble(self, event: Event) -> None:
        match event:
            case SourceTrouble():
                self._troubles["source"] = f"{event.kind}: {event.detail}"
            case SourceRecovered():
                self._troubles.pop("source", None)
            case UploadsDiverted():
                self._troubles["upload target"] = f"down: {event.reason}"
            case UploadsResumed():
                self._troubles.pop("upload target", None)
            case StoreBlocked():
                self._troubles[event.store] = f"takes nothing: {event.detail}"
            case StoreUnblocked():
                self._troubles.pop(event.store, None)
            case EndpointOpened():
                self._troubles[f"model server {event.endpoint}"] = f"down: {event.reason}"
            case EndpointClosed():
                self._troubles.pop(f"model server {event.endpoint}", None)
            case _:
                pass

    # -------------------------------------------------------------------------------------------------- the picture

    def picture(self) -> dict[str, Any]:
        """Return everything but the single stations and the recent reports, as JSON values."""
        pipeline = self._pipeline.statistics() if self._pipeline is not None else None
        checks = self._health.ready() if self._health is not None else ()
        stores = self._state() if self._state is not None else None
        return {
            "version": __version__,
            "startedAt": _iso(self._opened_at),
            "state": "starting"
            if pipeline is None
            else "draining"
            if pipeline.draining
            else "running",
            "ready": all(check.ok for check in checks),
            "checks": [
                {"name": check.name, "ok": check.ok, "detail": _brief(check.detail)}
                for check in checks
            ],
            "troubles": [
                {"name": _brief(name), "detail": _brief(detail)}
                for name, detail in self._troubles.items()
            ],
            "batches": {
                "open": 0 if pipeline is None else pipeline.in_flight,
                "slots": self.max_in_flight,
                "bytes": 0 if pipeline is None else pipeline.in_flight_bytes,
                "nearest": self._open_batches(),
            },
            "stations": {
                "shown": len(self.stations),
                "displaced": self.stations.displaced,
                "live": 0 if pipeline is None else pipeline.live_stations,
                "outcomes": self.stations.counts(),
            },
            "counters": self._count(),
            "batcher": self._picture_batcher(),
            "kafka": self._picture_kafka(),
            "outbox": _store(stores.outbox) if stores is not None else None,
            "deadLetters": _store(stores.dead_letters) if stores is not None else None,
        }

    def whole_picture(self) -> dict[str, Any]:
        """Return everything, as JSON values: what `/api/status` answers."""
        return {
            **self.picture(),
            "reports": self.reports(),
            "stationOutcomes": {name: OUTCOMES[code] for name, code in self.stations.rows()},
        }

    def reports(self) -> list[dict[str, Any]]:
        """Return the recent reports, newest first."""
        return [report.picture() for report in reversed(self._reports)]

    def take_changed_reports(self) -> list[dict[str, Any]]:
        """Return those that are new or changed since the last call, oldest first. For one caller."""
        changed, self._changed = self._changed, {}
        return [changed[number].picture() for number in sorted(changed)]

    def _open_batches(self) -> list[dict[str, Any]]:
        if self._pipeline is None:
            return []
        now = trio.current_time()
        return [
            {
                "batchId": batch.batch_id,
                "topic": batch.topic,
                "seconds": round(now - batch.opened, 2),
                "deadlineSeconds": round(batch.deadline - batch.opened, 2),
                "answered": batch.expected if batch.delivering else batch.answered,
                "expected": batch.expected,
                "stage": "uploading" if batch.delivering else "collecting",
            }
            for batch in self._pipeline.open_batches(limit=SHOWN_BATCHES)
        ]

    def _count(self) -> dict[str, Any]:
        counters, closed = self._counters, self._counters["closed"]
        expected = self._outcomes.total()
        return {
            "opened": counters["opened"],
            "closed": closed,
            "uploaded": counters["uploaded"],
            "sentToOutbox": counters["in outbox"],
            "uploadedFromOutbox": counters["uploadedFromOutbox"],
            "rejected": counters["rejected"],
            "failed": counters["failed"],
            "dropped": counters["dropped"],
            "withdrawn": counters["withdrawn"],
            "empty": counters["empty"],
            "deadLetters": counters["refused"],
            "closedBy": {rule.value: self._closed_by[rule] for rule in ClosedBy},
            "outcomes": {outcome.value: self._outcomes[outcome] for outcome in Outcome},
            "stationSuccessRate": _share(self._outcomes[Outcome.SUCCEEDED], expected),
            "deadlineRate": _share(self._closed_by[ClosedBy.DEADLINE], closed),
            "meanSeconds": round(self._seconds / closed, 3) if closed else None,
            "worstLatenessSeconds": round(self._worst_lateness_s, 4),
        }

    def _picture_batcher(self) -> dict[str, Any] | None:
        if self._batcher is None:
            return None
        now = self._batcher()
        calls = self._call_rows
        return {
            "queuedRows": now.queued_rows,
            "oldestSeconds": round(now.oldest_age_s, 3),
            "callsInFlight": now.calls_in_flight,
            "rowsInFlight": now.rows_in_flight,
            "pausedSeconds": round(now.paused_s, 1),
            "meanRows": round(sum(calls) / len(calls), 1) if calls else None,
            "maxRows": self.max_batch_rows,
            "answeredRows": now.answered_rows,
            "failedRows": now.failed_rows,
            "refusedRows": now.refused_rows,
            "failedCalls": self._counters["failedCalls"],
            "callEstimateSeconds": round(now.call_estimate_s, 4),
        }

    def _picture_kafka(self) -> dict[str, Any] | None:
        if self._kafka is None:
            return None
        now = self._kafka()
        lags = [one.lag for one in now.partitions if one.lag is not None]
        worst = sorted(now.partitions, key=lambda one: one.lag or 0, reverse=True)
        return {
            "lag": sum(lags) if lags else None,
            "paused": now.paused,
            "assigned": len(now.partitions),
            "rebalances": now.rebalances,
            "partitions": [
                {
                    "topic": one.topic,
                    "partition": one.partition,
                    "lag": one.lag,
                    "committed": one.committed,
                    "outstanding": one.outstanding,
                }
                for one in worst[:_SHOWN_PARTITIONS]
            ],
        }


def _store(now: StoreStatistics) -> dict[str, Any]:
    return {
        "rows": now.rows,
        "bytes": now.bytes,
        "maxBytes": now.max_bytes,
        "oldestSeconds": round(now.oldest_age_s, 1),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _brief(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."
