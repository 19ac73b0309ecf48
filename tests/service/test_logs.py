from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import attrs
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stationmaster import events
from stationmaster.batch import (
    BadEntry,
    Batch,
    BatchReport,
    ClosedBy,
    DeadLetter,
    OffsetRange,
    Outcome,
    Record,
    StationResult,
)
from stationmaster.errors import EmbedderBusyError, ProtocolError
from stationmaster.service.logs import LogObserver, configure_logs

if TYPE_CHECKING:
    from stationmaster.abc import Observer

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@attrs.define(eq=False)
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@attrs.define(eq=False)
class Log:
    """An observer at work, and what it wrote."""

    level: str = "debug"
    clock: Clock = attrs.field(factory=Clock)
    stream: io.StringIO = attrs.field(factory=io.StringIO)
    observer: LogObserver = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        configure_logs(self.level, "json", self.stream, environ={})
        self.observer = LogObserver(clock=self.clock)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def written_for(self, *happened: events.Event) -> list[dict[str, Any]]:
        """The lines for these events, without their time and logger."""
        before = len(self.lines())
        for event in happened:
            self.observer.observe(event)
        lines = self.lines()[before:]
        for line in lines:
            assert line.pop("logger") == "stationmaster"
            assert datetime.fromisoformat(line.pop("timestamp")).utcoffset() is not None
        return lines

    def line_for(self, event: events.Event) -> dict[str, Any]:
        (line,) = self.written_for(event)
        return line


def written(
    format: Literal["auto", "json", "console"], text: str, *args: object, **fields: object
) -> str:
    stream = io.StringIO()
    configure_logs("info", format, stream, environ={})
    structlog.stdlib.get_logger("test").info(text, *args, **fields)
    return stream.getvalue()


def a_batch(*stations: str, batch_id: str = "t_0_7_0") -> Batch:
    return Batch(
        batch_id=batch_id,
        topic="t",
        opened_at=MOMENT,
        deadline=5.0,
        ranges=(),
        entries=dict.fromkeys(stations, ()),
        last_message={},
    )


def a_report(closed_by: ClosedBy, **outcomes: Outcome) -> BatchReport:
    counts = dict.fromkeys(Outcome, 0)
    for outcome in outcomes.values():
        counts[outcome] += 1
    return BatchReport(
        batch=a_batch(*outcomes),
        closed_by=closed_by,
        closed_at=MOMENT,
        duration_s=1.23456,
        results=tuple(StationResult(station, outcome) for station, outcome in outcomes.items()),
        counts=counts,
    )


RECORD = Record(topic="t", partition=3, offset=9, timestamp_ms=0, value=b"x")
MIXED = a_report(
    ClosedBy.DEADLINE,
    S1=Outcome.SUCCEEDED,
    S2=Outcome.TIMED_OUT,
    S3=Outcome.FAILED,
    S4=Outcome.MISSING,
    S5=Outcome.NO_OUTPUT,
    S6=Outcome.TIMED_OUT,
    S7=Outcome.REJECTED,
)
GOOD = a_report(ClosedBy.COMPLETE, S1=Outcome.SUCCEEDED, S2=Outcome.FAILED)

LETTER = DeadLetter(
    reason="not-json", detail="at byte 3", topic="t", partition=3, offset=9, value=b"{"
)
TOLD: list[tuple[events.Event, dict[str, object]]] = [
    (
        events.BatchOpened(batch=a_batch("S1", "S2"), in_flight=3),
        {"level": "info", "event": "batch created", "topic": "t", "expected": 2, "in_flight": 3},
    ),
    (
        events.BatchJoined(
            batch_id="t_0_7_0",
            ranges=(OffsetRange(topic="t", partition=1, first=7, last=8),),
            stations=3,
        ),
        {"level": "debug", "event": "batch joined", "stations": 3},
    ),
    (
        events.EmptyBatch(batch=a_batch()),
        {"level": "info", "event": "batch empty", "topic": "t"},
    ),
    (
        events.StationAnswered(
            batch_id="t_0_7_0", station_id="S1", outcome=Outcome.NO_OUTPUT, answered=3, expected=10
        ),
        {
            "level": "debug",
            "event": "station result",
            "station_id": "S1",
            "outcome": "noOutput",
            "progress": "3/10",
        },
    ),
    (
        events.BatchClosed(report=GOOD, lateness_s=0.0),
        {"level": "info", "event": "batch complete", "done": "2/2", "seconds": 1.235},
    ),
    (
        events.BatchClosed(report=attrs.evolve(MIXED, closed_by=ClosedBy.QUORUM), lateness_s=0.0),
        {
            "level": "info",
            "event": "batch quorum",
            "done": "4/7",
            "late": ["S2", "S6"],
            "seconds": 1.235,
        },
    ),
    (
        events.BatchClosed(report=MIXED, lateness_s=0.0021),
        {
            "level": "warning",
            "event": "batch deadline",
            "done": "4/7",
            "late": ["S2", "S6"],
            "seconds": 1.235,
            "lateness_s": 0.002,
        },
    ),
    (
        events.BatchDropped(batch=a_batch("S1")),
        {"level": "warning", "event": "batch dropped"},
    ),
    (
        events.LateResult(batch_id="t_0_7_0", station_id="S1"),
        {"level": "debug", "event": "late result", "station_id": "S1"},
    ),
    (
        events.ThreadAbandoned(batch_id="t_0_7_0", station_id="S1", abandoned=1, threads=32),
        {
            "level": "warning",
            "event": "thread goes on after its job was given up",
            "station_id": "S1",
            "abandoned": 1,
            "threads": 32,
        },
    ),
    (
        events.ThreadAbandoned(batch_id="t_0_7_0", station_id="S1", abandoned=32, threads=32),
        {
            "level": "error",
            "event": "every thread is abandoned: no station is served until one of them ends",
            "station_id": "S1",
            "abandoned": 32,
            "threads": 32,
        },
    ),
    (
        events.ThreadReturned(
            batch_id="t_0_7_0", station_id="S1", abandoned=0, seconds=1.2345, error=None
        ),
        {
            "level": "info",
            "event": "abandoned thread ended",
            "station_id": "S1",
            "abandoned": 0,
            "seconds": 1.234,
        },
    ),
    (
        events.ThreadReturned(
            batch_id="t_0_7_0", station_id="S1", abandoned=0, seconds=1.0, error=ValueError("no")
        ),
        {
            "level": "info",
            "event": "abandoned thread ended in an error",
            "station_id": "S1",
            "abandoned": 0,
            "seconds": 1.0,
            "error": "ValueError: no",
        },
    ),
    (
        events.BatchHandlerTrouble(batch_id="t_0_7_0", error=ValueError("no"), unreported=2),
        {
            "level": "warning",
            "event": "batch handler failed",
            "unreported": 2,
            "error": "ValueError: no",
        },
    ),
    (
        events.ResultHookTrouble(batch_id="t_0_7_0", station_id="S1", reason="full"),
        {
            "level": "warning",
            "event": "result hook missed a result",
            "station_id": "S1",
            "reason": "full",
        },
    ),
    (
        events.ResultHookTrouble(
            batch_id="t_0_7_0", station_id="S1", reason="error", error=ValueError("no")
        ),
        {
            "level": "warning",
            "event": "result hook failed",
            "station_id": "S1",
            "reason": "error",
            "error": "ValueError: no",
        },
    ),
    (
        events.StationBreakerOpened(station_id="S1", failures=3),
        {
            "level": "warning",
            "event": "station does not answer: rejected at once until a probe is answered",
            "station_id": "S1",
            "timed_out_in_a_row": 3,
        },
    ),
    (
        events.StationBreakerClosed(station_id="S1", open_s=12.3456),
        {"level": "info", "event": "station answers again", "station_id": "S1", "down_s": 12.346},
    ),
    (
        events.StationBreakerClosed(station_id="S1", open_s=600.0, given_up=True),
        {
            "level": "info",
            "event": "silent station given up",
            "station_id": "S1",
            "down_s": 600.0,
        },
    ),
    (
        events.StationTrouble(station_id="S1", error=ValueError("no power")),
        {
            "level": "warning",
            "event": "station trouble",
            "station_id": "S1",
            "error": "ValueError: no power",
        },
    ),
    (
        events.MessageRefused(record=RECORD, reason="not-json", detail="at byte 3"),
        {
            "level": "warning",
            "event": "dead letter",
            "reason": "not-json",
            "topic": "t",
            "partition": 3,
            "offset": 9,
            "detail": "at byte 3",
        },
    ),
    (
        events.UploadDone(report=MIXED, attempts=2, seconds=0.1234, sent_bytes=512),
        {
            "level": "info",
            "event": "upload done",
            "succeeded": 1,
            "no_output": 1,
            "failed": 1,
            "timed_out": 2,
            "missing": 1,
            "rejected": 1,
            "attempts": 2,
            "bytes": 512,
            "seconds": 0.123,
        },
    ),
    (
        events.UploadAttempted(batch_id="t_0_7_0", status=503, seconds=0.12345, from_outbox=False),
        {"level": "debug", "event": "upload attempted", "status": 503, "seconds": 0.123},
    ),
    (
        events.UploadRetried(
            batch_id="t_0_7_0", attempt=1, reason="503", retry_in_s=0.5, remaining_s=59.4999
        ),
        {
            "level": "warning",
            "event": "upload failed",
            "attempt": 1,
            "reason": "503",
            "retry_in_s": 0.5,
            "remaining_s": 59.5,
        },
    ),
    (
        events.UploadFailed(batch_id="t_0_7_0", attempts=9, reason="503"),
        {"level": "error", "event": "upload failed", "attempts": 9, "reason": "503"},
    ),
    (
        events.UploadRejected(report=GOOD, status=422, answer="no such site"),
        {"level": "error", "event": "upload rejected", "status": 422, "answer": "no such site"},
    ),
    (
        events.BatchWithdrawn(batch=a_batch("S1")),
        {"level": "warning", "event": "batch withdrawn"},
    ),
    (
        events.UploadKept(batch_id="t_0_7_0", attempts=3, reason="503"),
        {"level": "warning", "event": "sent to outbox", "attempts": 3, "reason": "503"},
    ),
    (
        events.UploadsDiverted(reason="503"),
        {
            "level": "error",
            "event": "upload target down: batches go to the outbox until it answers",
            "reason": "503",
        },
    ),
    (
        events.UploadsResumed(diverted_s=3600.0004),
        {"level": "info", "event": "upload target answers again", "down_s": 3600.0},
    ),
    (
        events.OutboxDelivered(
            batch_id="t_0_7_0", attempts=2, waited_s=61.2345, sent_bytes=512, rows_left=7
        ),
        {
            "level": "info",
            "event": "upload done from outbox",
            "attempts": 2,
            "bytes": 512,
            "waited_s": 61.234,
            "rows_left": 7,
        },
    ),
    (
        events.OutboxRetried(batch_id="t_0_7_0", attempts=2, reason="503", retry_in_s=1.2345),
        {
            "level": "warning",
            "event": "upload from outbox failed",
            "attempts": 2,
            "reason": "503",
            "retry_in_s": 1.234,
        },
    ),
    (
        events.OutboxRejected(batch_id="t_0_7_0", status=422, answer="no such site"),
        {
            "level": "error",
            "event": "upload from outbox rejected",
            "status": 422,
            "answer": "no such site",
        },
    ),
    (
        events.DeadLettersKept(letters=(LETTER,)),
        {"level": "debug", "event": "dead letters kept", "letters": ["t/3@9"]},
    ),
    (
        events.StoreBlocked(store="outbox", kind="disk-full", detail="no space left"),
        {
            "level": "error",
            "event": "store takes nothing: consumption pauses until it does",
            "store": "outbox",
            "kind": "disk-full",
            "detail": "no space left",
        },
    ),
    (
        events.StoreUnblocked(store="outbox", blocked_s=12.3456),
        {"level": "info", "event": "store works again", "store": "outbox", "blocked_s": 12.346},
    ),
    (
        events.StateMovedAside(path="state.db", moved_to="state.db.corrupt", reason="malformed"),
        {
            "level": "error",
            "event": "state file damaged, moved aside and begun anew",
            "path": "state.db",
            "moved_to": "state.db.corrupt",
            "reason": "malformed",
        },
    ),
    (
        events.PartitionsAssigned(partitions=(("t", 0), ("t", 1))),
        {"level": "info", "event": "partitions assigned", "partitions": ["t/0", "t/1"]},
    ),
    (
        events.PartitionsRevoked(partitions=(("t", 0),), drain_s=0.5, drained=True),
        {
            "level": "info",
            "event": "partitions revoked",
            "partitions": ["t/0"],
            "drain_s": 0.5,
            "drained": True,
        },
    ),
    (
        events.PartitionsRevoked(partitions=(("t", 0),), drain_s=10.0, drained=False),
        {
            "level": "warning",
            "event": "partitions revoked",
            "partitions": ["t/0"],
            "drain_s": 10.0,
            "drained": False,
        },
    ),
    (
        events.PartitionsLost(partitions=(("t", 0),)),
        {"level": "warning", "event": "partitions lost", "partitions": ["t/0"]},
    ),
    (
        events.OffsetsCommitted(
            offsets=(OffsetRange(topic="t", partition=0, first=5, last=9, generation=1),)
        ),
        {"level": "debug", "event": "offsets committed", "offsets": ["t/0@9"]},
    ),
    (
        events.SourceTrouble(kind="all-brokers-down", detail="1/1 brokers are down"),
        {
            "level": "warning",
            "event": "source trouble",
            "kind": "all-brokers-down",
            "detail": "1/1 brokers are down",
        },
    ),
    (events.SourceRecovered(), {"level": "info", "event": "source recovered"}),
    (events.SourcePaused(paused=True), {"level": "info", "event": "source paused"}),
    (events.SourcePaused(paused=False), {"level": "info", "event": "source resumed"}),
    (
        events.RequestSubmitted(rows=1, queue_rows=12),
        {"level": "debug", "event": "batcher: request submitted", "rows": 1, "queue_rows": 12},
    ),
    (
        events.CallStarted(rows=4, reason="min", oldest_age_s=0.00512, queue_rows=2),
        {
            "level": "debug",
            "event": "batcher: batch sent",
            "rows": 4,
            "reason": "min",
            "oldest_age_s": 0.005,
            "queue_rows": 2,
        },
    ),
    (
        events.CallDone(rows=4, seconds=0.0251),
        {"level": "debug", "event": "batcher: call done", "rows": 4, "seconds": 0.025},
    ),
    (
        events.CallFailed(rows=4, seconds=1.0, error=ProtocolError("3 vectors for 4 texts")),
        {
            "level": "error",
            "event": "batcher: call failed",
            "rows": 4,
            "seconds": 1.0,
            "error": "ProtocolError: 3 vectors for 4 texts",
        },
    ),
    (
        events.CallAbandoned(rows=4, seconds=0.5),
        {"level": "debug", "event": "batcher: call abandoned", "rows": 4, "seconds": 0.5},
    ),
    (
        events.CallRerouted(rows=4, endpoint="http://a", to="http://b", error=ProtocolError("odd")),
        {
            "level": "warning",
            "event": "model server failed: its call goes to another",
            "endpoint": "http://a",
            "to": "http://b",
            "rows": 4,
            "error": "ProtocolError: odd",
        },
    ),
    (
        events.EndpointPaused(endpoint="http://a", pause_s=2.5, reason="429: wait"),
        {
            "level": "warning",
            "event": "model server asks to wait",
            "endpoint": "http://a",
            "pause_s": 2.5,
            "reason": "429: wait",
        },
    ),
    (
        events.EndpointOpened(endpoint="http://a", failures=3, reason="connection refused"),
        {
            "level": "error",
            "event": "model server down: no call goes there until a probe works",
            "endpoint": "http://a",
            "failures": 3,
            "reason": "connection refused",
        },
    ),
    (
        events.EndpointClosed(endpoint="http://a", open_s=12.5),
        {
            "level": "info",
            "event": "model server works again",
            "endpoint": "http://a",
            "down_s": 12.5,
        },
    ),
]


@pytest.mark.parametrize(
    ("event", "line"), TOLD, ids=[f"{line['level']} {line['event']}" for _, line in TOLD]
)
def test_each_event_is_one_line(event: events.Event, line: dict[str, object]) -> None:
    told = Log().line_for(event)

    assert told.pop("batch_id", "t_0_7_0") == "t_0_7_0"
    assert told == line


def test_what_is_odd_about_a_batch_stands_in_the_line_of_its_opening() -> None:
    odd = attrs.evolve(
        a_batch("S1"),
        roster=("S1", "S2"),
        bad_entries=(BadEntry(index=0, reason="not-an-object"),),
        mislabelled=4,
        follow_up=True,
    )
    told = Log().line_for(events.BatchOpened(batch=odd, in_flight=1))

    assert (told["expected"], told["bad_entries"]) == (2, 1)
    assert (told["mislabelled"], told["follow_up"]) == (4, True)


def test_no_event_is_left_out() -> None:
    assert {type(event) for event, _ in TOLD} == set(get_args(events.Event))


def test_whatever_is_about_a_batch_names_it() -> None:
    log = Log()
    for event, _ in TOLD:
        names_one = bool({"batch", "batch_id", "report"} & {*attrs.fields_dict(type(event))})
        assert log.line_for(event).get("batch_id") == ("t_0_7_0" if names_one else None)
        log.clock.now += 60.0


def test_at_most_twenty_late_stations_are_named_and_the_others_counted() -> None:
    outcomes = {f"S{number}": Outcome.TIMED_OUT for number in range(23)}

    twenty_three = Log().line_for(
        events.BatchClosed(report=a_report(ClosedBy.DEADLINE, **outcomes), lateness_s=0.0)
    )
    outcomes = {f"S{number}": Outcome.TIMED_OUT for number in range(20)}
    twenty = Log().line_for(
        events.BatchClosed(report=a_report(ClosedBy.DEADLINE, **outcomes), lateness_s=0.0)
    )

    assert twenty_three["late"] == [f"S{number}" for number in range(20)]
    assert twenty_three["late_more"] == 3
    assert twenty_three["done"] == "0/23"
    assert len(twenty["late"]) == 20
    assert "late_more" not in twenty


def test_long_texts_from_outside_are_cut() -> None:
    line = Log().line_for(events.SourceTrouble(kind="x", detail="d" * 301))

    assert line["detail"] == "d" * 300 + "..."


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_only_lines_of_the_level_and_above_are_written(level: str) -> None:
    levels = ["debug", "info", "warning", "error"]
    log = Log(level)

    lines = log.written_for(*(event for event, _ in TOLD))

    assert {line["level"] for line in lines} == set(levels[levels.index(level) :])
    assert log.observer.detailed is (level == "debug")


def test_the_level_can_be_changed_while_running() -> None:
    log = Log("info")
    configure_logs("debug", "json", log.stream, environ={})

    assert log.observer.detailed
    assert log.line_for(events.CallDone(rows=1, seconds=0.0))["level"] == "debug"


def test_the_log_is_an_observer() -> None:
    observer: Observer = LogObserver()

    observer.observe(events.SourceRecovered())


# ----------------------------------------------------------------------------------------------------------- repeats


def trouble(kind: str) -> events.SourceTrouble:
    return events.SourceTrouble(kind=kind, detail="")


def test_repeated_errors_are_told_once_a_minute_with_the_number_left_out() -> None:
    log = Log()

    first = log.written_for(*[trouble("not-json")] * 5)
    log.clock.now += 59.9
    within = log.written_for(trouble("not-json"))
    log.clock.now += 0.1
    second = log.written_for(*[trouble("not-json")] * 3)
    log.clock.now += 60.0
    third = log.written_for(trouble("not-json"))
    log.clock.now += 60.0
    fourth = log.written_for(trouble("not-json"))

    assert len(first) == 1
    assert "repeated" not in first[0]
    assert within == []
    assert [line["repeated"] for line in second] == [5]
    assert [line["repeated"] for line in third] == [2]
    assert [line.get("repeated") for line in fourth] == [None]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            events.EndpointPaused(endpoint="http://a", pause_s=1.0, reason="429"),
            events.EndpointPaused(endpoint="http://b", pause_s=1.0, reason="429"),
        ),
        (
            events.CallFailed(rows=1, seconds=0.0, error=EmbedderBusyError("wait")),
            events.CallFailed(rows=1, seconds=0.0, error=ProtocolError("odd")),
        ),
        (
            events.SourceTrouble(kind="unknown-topic", detail=""),
            events.SourceTrouble(kind="authorization", detail=""),
        ),
        (
            events.UploadRetried(
                batch_id="a", attempt=1, reason="503", retry_in_s=1.0, remaining_s=1.0
            ),
            events.UploadRetried(
                batch_id="a", attempt=1, reason="429", retry_in_s=1.0, remaining_s=1.0
            ),
        ),
        (
            events.StationTrouble(station_id="S1", error=ValueError()),
            events.StationTrouble(station_id="S1", error=KeyError()),
        ),
    ],
    ids=lambda event: type(event).__name__,
)
def test_each_kind_of_error_has_its_own_minute(one: events.Event, other: events.Event) -> None:
    log = Log()

    assert len(log.written_for(one, other, one, other)) == 2


def test_stations_that_fall_silent_together_are_one_line_a_minute() -> None:
    together = [
        events.StationBreakerOpened(station_id=f"S{number}", failures=3) for number in range(100)
    ]
    back = [events.StationBreakerClosed(station_id=f"S{number}", open_s=1.0) for number in range(9)]

    assert len(Log().written_for(*together, *back)) == 2


def test_the_end_of_an_upload_and_of_a_batch_are_told_always() -> None:
    ends: list[events.Event] = [
        events.UploadFailed(batch_id="a", attempts=1, reason="503"),
        events.UploadRejected(report=GOOD, status=422, answer=""),
        events.BatchDropped(batch=a_batch()),
        events.UploadKept(batch_id="a", attempts=0, reason="503"),
    ]

    assert len(Log().written_for(*ends * 3)) == 12


def test_dead_letters_are_told_once_a_minute_for_each_reason() -> None:
    letters = [
        events.MessageRefused(record=RECORD, reason=reason, detail="")
        for reason in ("not-json", "not-utf8")
    ]

    assert len(Log().written_for(*letters * 1000)) == 2


def test_kinds_beyond_the_bound_share_one_until_old_ones_are_forgotten() -> None:
    log = Log()

    known = log.written_for(*(trouble(f"kind-{number}") for number in range(64)))
    beyond = log.written_for(*(trouble(f"more-{number}") for number in range(10)))
    log.clock.now += 60.0
    later = log.written_for(trouble("more-0"), trouble("more-1"), trouble("kind-0"))

    assert len(known) == 64
    assert [line["kind"] for line in beyond] == ["more-0"]
    assert [line["kind"] for line in later] == ["more-0", "more-1", "kind-0"]


def test_errors_without_number_and_of_ever_new_kinds_stay_within_bounds() -> None:
    log = Log("error")

    for number in range(10_000):
        log.observer.observe(trouble(f"kind-{number}"))
        log.clock.now += 0.5

    assert len(log.observer._repeats._told) <= 65


# ------------------------------------------------------------------------------------------------------------- forms

NASTY = 'S1\n{"event": "forged"}\r\x1b[31m\x9b2J\u2028\u202e<b>&"\'\x00\udcff'


def test_a_json_line_is_one_object_of_ascii_with_time_level_and_event_first() -> None:
    text = written("json", "hello", station_id=NASTY, Ü=1)

    assert text.isascii()
    assert text.count("\n") == 1
    assert text.endswith("}\n")
    line = json.loads(text)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert line["station_id"] == NASTY
    assert line["level"] == "info"
    assert line["event"] == "hello"
    assert line["logger"] == "test"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["timestamp"])


def test_what_json_cannot_hold_is_written_as_text() -> None:
    circle: list[object] = []
    circle.append(circle)

    not_finite = json.loads(written("json", "hello", value=float("nan")))
    endless = json.loads(written("json", "hello", value=circle))
    odd = json.loads(written("json", "hello", value={("a", 1): 2}))
    foreign = json.loads(written("json", "hello", value=Path("/x")))

    assert not_finite["value"] == "nan"
    assert endless["value"] == "[[...]]"
    assert odd["value"] == "{('a', 1): 2}"
    assert foreign["value"] == "/x"


def test_a_console_line_is_one_line_that_cannot_steer_the_terminal() -> None:
    text = written("console", f"hello {NASTY}", station_id=NASTY, ids=["a b", NASTY], n=1.5)

    assert text.count("\n") == 1
    assert text.removesuffix("\n").isprintable()
    assert '\\u001b[31m\\u009b2J\\u2028\\u202e<b>&\\"' in text
    assert text.endswith(" n=1.5 logger=test\n")


def test_a_console_leaves_plain_values_plain_and_quotes_the_others() -> None:
    text = written("console", "hello", batch_id="t_0_7_0", error="no power", empty="", late=["S1"])

    assert text.endswith(
        ' info     hello batch_id=t_0_7_0 error="no power" empty="" late=["S1"] logger=test\n'
    )


def test_a_console_shows_a_traceback_below_its_line_and_json_within() -> None:
    def fail() -> NoReturn:
        raise ValueError(NASTY)

    def failed(format: Literal["json", "console"]) -> str:
        stream = io.StringIO()
        configure_logs("info", format, stream, environ={})
        try:
            fail()
        except ValueError:
            logging.getLogger("foreign").exception("it failed")
        return stream.getvalue()

    first, *below = failed("console").split("\n")
    assert first.endswith("error    it failed logger=foreign")
    assert below[0] == "Traceback (most recent call last):"
    assert all(line.isprintable() for line in below)
    assert "\\u001b[31m" in "".join(below)
    line = json.loads(failed("json"))
    assert line["level"] == "error"
    assert line["exception"].startswith("Traceback (most recent call last):")


@pytest.mark.parametrize("format", ["json", "console"])
def test_logging_of_others_goes_the_same_way(format: Literal["json", "console"]) -> None:
    stream = io.StringIO()
    configure_logs("warning", format, stream, environ={})
    foreign = logging.getLogger("hypercorn.error")
    foreign.info("not told")
    foreign.warning("port %d: %s", 80, NASTY)
    foreign.log(60, "a level of their own")

    first, second, *rest = stream.getvalue().split("\n")

    assert rest == [""]
    assert "port 80: S1" in first
    assert first.isprintable()
    assert "a level of their own" in second


def test_the_client_library_is_silent_below_warnings() -> None:
    stream = io.StringIO()
    configure_logs("debug", "json", stream, environ={})

    logging.getLogger("httpx").info("HTTP Request: POST ...")
    logging.getLogger("httpcore.connection").debug("connect_tcp.started")
    logging.getLogger("httpx").warning("told")

    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["told"]


def test_configuring_twice_writes_each_line_once() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", io.StringIO(), environ={})
    configure_logs("info", "json", stream, environ={})

    logging.getLogger("x").info("once")

    assert stream.getvalue().count("once") == 1


def on_a_terminal(format: Literal["auto", "json", "console"]) -> str:
    outer, inner = pty.openpty()
    with os.fdopen(inner, "w", encoding="utf-8") as stream:
        configure_logs("info", format, stream)
        logging.getLogger("x").warning("hello")
        text = os.read(outer, 4_096).decode()
    os.close(outer)
    return text


def test_auto_is_a_console_in_colour_on_a_terminal_and_json_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[33mwarning \x1b[0m \x1b[1mhello\x1b[0m" in on_a_terminal("auto")
    assert json.loads(on_a_terminal("json"))["event"] == "hello"
    assert json.loads(written("auto", "hello"))["event"] == "hello"
    assert "\x1b" not in written("console", "hello")


def test_a_terminal_stays_without_colour_if_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    assert "\x1b" not in on_a_terminal("auto")


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3)]
)
def test_a_line_for_the_journal_begins_with_its_priority(
    tmp_path: Path, level: str, priority: int
) -> None:
    path = tmp_path / "journal"
    with path.open("w") as stream:
        status = os.fstat(stream.fileno())
        connected = f"{status.st_dev}:{status.st_ino}"
        for environ in ({"JOURNAL_STREAM": connected}, {"JOURNAL_STREAM": "1:1"}, {}):
            configure_logs("debug", "json", stream, environ=environ)
            structlog.stdlib.get_logger("x").log(logging.getLevelName(level.upper()), "hello")

    ours, foreign, none = path.read_text().splitlines()

    assert ours.startswith(f'<{priority}>{{"timestamp": ')
    assert foreign.startswith('{"timestamp": ')
    assert none.startswith('{"timestamp": ')


@given(text=st.text(), fields=st.dictionaries(st.text(min_size=1), st.text() | st.lists(st.text())))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_and_any_fields_are_one_printable_line(
    text: str, fields: dict[str, object]
) -> None:
    for name in ("event", "level", "logger", "timestamp", "exc_info", "stack_info", "self"):
        fields.pop(name, None)

    for form in ("json", "console"):
        stream = io.StringIO()
        configure_logs("info", form, stream, environ={})
        structlog.stdlib.get_logger("test").info(text, **fields)
        line = stream.getvalue()
        assert line.count("\n") == 1
        assert line.removesuffix("\n").isprintable()
