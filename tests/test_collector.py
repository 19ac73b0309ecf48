"""The collector of one batch: what counts, when it is done, and the one report."""

from __future__ import annotations

import pytest
import trio

from stationmaster.abc import NullObserver, Observer
from stationmaster.batch import BatchReport, ClosedBy, Outcome, StationResult
from stationmaster.collector import Collector
from stationmaster.events import LateResult, StationAnswered
from stationmaster.testing import RecordingObserver
from tests.telemetry import NOON, batch


def collector(
    *station_ids: str,
    quorum: float = 1.0,
    report_bytes: int = 1_000_000,
    observer: Observer | None = None,
) -> Collector:
    return Collector(
        batch(*station_ids),
        opened=trio.current_time(),
        quorum=quorum,
        report_bytes=report_bytes,
        observer=observer or NullObserver(),
    )


def succeeded(station_id: str, encoded: bytes = b"{}") -> StationResult:
    return StationResult(station_id, Outcome.SUCCEEDED, {}, "", encoded)


def result(station_id: str, outcome: Outcome) -> StationResult:
    return StationResult(station_id, outcome, None, "why")


def outcomes(report: BatchReport) -> dict[str, Outcome]:
    return {item.station_id: item.outcome for item in report.results}


def numbers(report: BatchReport) -> dict[Outcome, int]:
    return {outcome: count for outcome, count in report.counts.items() if count}


async def test_a_batch_is_complete_when_every_station_has_an_outcome_of_any_kind(
    autojump_clock: trio.testing.MockClock,
) -> None:
    collecting = collector("A", "B", "C", "D")
    await trio.sleep(0.8)
    collecting.settle(succeeded("C"))
    collecting.settle(result("A", Outcome.NO_OUTPUT))
    collecting.settle(result("D", Outcome.REJECTED))
    assert not collecting.done.is_set()
    collecting.settle(result("B", Outcome.FAILED))
    assert collecting.done.is_set()
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.COMPLETE
    assert report.duration_s == pytest.approx(0.8)
    assert report.closed_at is NOON
    assert report.batch is collecting.batch
    assert set(report.counts) == set(Outcome)
    assert numbers(report) == {
        Outcome.SUCCEEDED: 1,
        Outcome.NO_OUTPUT: 1,
        Outcome.FAILED: 1,
        Outcome.REJECTED: 1,
    }


async def test_results_stand_in_the_order_of_the_message_whoever_answers_first() -> None:
    collecting = collector("C", "A", "B")
    for station_id in ("B", "C", "A"):
        collecting.settle(succeeded(station_id))
    assert list(outcomes(collecting.close(closed_at=NOON))) == ["C", "A", "B"]


async def test_the_first_outcome_of_a_station_counts() -> None:
    collecting = collector("A", "B")
    collecting.settle(result("A", Outcome.FAILED))
    collecting.settle(succeeded("A"))
    assert not collecting.done.is_set()
    collecting.settle(succeeded("B"))
    assert outcomes(collecting.close(closed_at=NOON)) == {
        "A": Outcome.FAILED,
        "B": Outcome.SUCCEEDED,
    }


async def test_what_has_no_outcome_at_closing_is_timed_out_and_says_how_far_it_came() -> None:
    collecting = collector("A", "B", "C")
    collecting.settle(succeeded("A"))
    collecting.begin("B", lambda: None)
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.DEADLINE
    assert numbers(report) == {Outcome.SUCCEEDED: 1, Outcome.TIMED_OUT: 2}
    assert [item.reason for item in report.results] == [
        "",
        "no answer when the deadline closed the batch",
        "not started when the deadline closed the batch",
    ]


async def test_closing_cancels_what_still_runs_and_nothing_else() -> None:
    collecting = collector("A", "B", "C")
    cancelled: list[str] = []
    collecting.begin("A", lambda: cancelled.append("A"))
    collecting.begin("B", lambda: cancelled.append("B"))
    collecting.end("A")
    collecting.end("C")
    collecting.close(closed_at=NOON)
    assert collecting.closed
    assert cancelled == ["B"]


async def test_closing_cancels_a_call_for_many_stations_once_unless_it_ended() -> None:
    collecting = collector("A", "B", "C", "D")
    cancelled: list[str] = []

    def cancel_first() -> None:
        cancelled.append("first")

    def cancel_second() -> None:
        cancelled.append("second")

    collecting.begin_call(frozenset({"A", "B"}), cancel_first)
    collecting.begin_call(frozenset({"C"}), cancel_second)
    collecting.settle(succeeded("A"))
    collecting.end_call(cancel_second)
    collecting.end_call(cancel_second)
    report = collecting.close(closed_at=NOON)
    assert cancelled == ["first"]
    assert [item.reason.partition(" when")[0] for item in report.results] == [
        "",
        "no answer",
        "not started",
        "not started",
    ]


async def test_dropping_closes_without_a_report_and_cancels_what_runs() -> None:
    observer = RecordingObserver()
    collecting = collector("A", observer=observer)
    cancelled: list[str] = []
    collecting.begin("A", lambda: cancelled.append("A"))
    collecting.drop()
    collecting.drop()
    collecting.settle(succeeded("A"))
    assert cancelled == ["A"]
    assert collecting.closed
    assert collecting.done.is_set()
    assert len(observer.of(LateResult)) == 1


async def test_an_answer_after_closing_is_counted_as_late_and_changes_nothing() -> None:
    observer = RecordingObserver()
    collecting = collector("A", "B", observer=observer)
    report = collecting.close(closed_at=NOON)
    collecting.settle(succeeded("A"))
    collecting.settle(result("B", Outcome.REJECTED))
    assert [event.station_id for event in observer.of(LateResult)] == ["A"]
    assert numbers(report) == {Outcome.TIMED_OUT: 2}
    assert not collecting.done.is_set()


async def test_at_a_tie_of_last_result_and_deadline_the_batch_is_complete(
    autojump_clock: trio.testing.MockClock,
) -> None:
    collecting = collector("A")
    await trio.sleep_until(collecting.deadline)
    collecting.settle(succeeded("A"))
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.COMPLETE
    assert report.duration_s == 5.0


async def test_a_batch_without_stations_is_done_at_once() -> None:
    collecting = collector()
    assert collecting.done.is_set()
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.COMPLETE
    assert report.results == ()
    assert numbers(report) == {}


# -------------------------------------------------------------------------------------------------------------- quorum


@pytest.mark.parametrize(
    ("quorum", "stations", "rejected", "needed"),
    [
        (0.5, 12, 0, 6),
        (0.5, 11, 0, 6),
        (0.5, 12, 3, 5),
        (0.01, 12, 0, 1),
        (0.99, 12, 0, 12),
        (0.9, 10, 0, 9),
        (0.55, 100, 0, 55),
        (0.07, 100, 0, 7),
        (0.5, 3, 2, 1),
    ],
)
async def test_a_quorum_is_reached_by_its_share_of_the_stations_that_were_not_rejected(
    quorum: float, stations: int, rejected: int, needed: int
) -> None:
    station_ids = [f"S{number}" for number in range(stations)]
    collecting = collector(*station_ids, quorum=quorum)
    for station_id in station_ids[:rejected]:
        collecting.settle(result(station_id, Outcome.REJECTED))
    answers = iter(station_ids[rejected:])
    for _ in range(needed):
        assert not collecting.done.is_set()
        collecting.settle(succeeded(next(answers)))
    assert collecting.done.is_set()
    complete = rejected + needed == stations
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is (ClosedBy.COMPLETE if complete else ClosedBy.QUORUM)
    assert report.counts[Outcome.TIMED_OUT] == stations - rejected - needed


async def test_a_failure_and_a_none_are_answers_for_the_quorum() -> None:
    collecting = collector("A", "B", "C", "D", quorum=0.5)
    collecting.settle(result("A", Outcome.FAILED))
    collecting.settle(result("B", Outcome.NO_OUTPUT))
    assert collecting.done.is_set()
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.QUORUM
    assert report.results[3].reason == "not started when the quorum closed the batch"


async def test_a_late_rejection_can_be_what_reaches_the_quorum() -> None:
    collecting = collector("A", "B", "C", "D", quorum=0.5)
    collecting.settle(succeeded("A"))
    collecting.settle(result("B", Outcome.REJECTED))
    assert not collecting.done.is_set()
    collecting.settle(result("C", Outcome.REJECTED))
    assert collecting.done.is_set()


async def test_rejections_alone_make_no_quorum() -> None:
    collecting = collector("A", "B", quorum=0.1)
    collecting.settle(result("A", Outcome.REJECTED))
    assert not collecting.done.is_set()
    collecting.settle(result("B", Outcome.REJECTED))
    assert collecting.close(closed_at=NOON).closed_by is ClosedBy.COMPLETE


async def test_an_answer_between_the_quorum_and_the_closing_still_counts() -> None:
    collecting = collector("A", "B", "C", quorum=0.3)
    collecting.settle(succeeded("A"))
    assert collecting.done.is_set()
    collecting.settle(succeeded("B"))
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.QUORUM
    assert report.counts[Outcome.SUCCEEDED] == 2


# -------------------------------------------------------------------------------------------------------------- bounds


async def test_a_result_that_overfills_the_report_fails_its_own_station_only() -> None:
    collecting = collector("A", "B", "C", "D", report_bytes=10)
    collecting.settle(succeeded("A", b"x" * 6))
    collecting.settle(succeeded("B", b"x" * 5))
    collecting.settle(succeeded("C", b"x" * 4))
    collecting.settle(succeeded("D", b"x"))
    report = collecting.close(closed_at=NOON)
    assert outcomes(report) == {
        "A": Outcome.SUCCEEDED,
        "B": Outcome.FAILED,
        "C": Outcome.SUCCEEDED,
        "D": Outcome.FAILED,
    }
    assert report.results[1].reason == "the report is full (limits.report_bytes)"
    assert sum(len(item.encoded) for item in report.results) == 10


# -------------------------------------------------------------------------------------------------------------- events


async def test_a_detailed_observer_hears_of_every_outcome_and_others_do_not() -> None:
    detailed, brief = RecordingObserver(), RecordingObserver(detailed=False)
    for observer in (detailed, brief):
        collecting = collector("A", "B", observer=observer)
        collecting.settle(succeeded("B"))
        collecting.settle(succeeded("B"))
        collecting.settle(result("A", Outcome.REJECTED))
    assert [
        (e.station_id, e.outcome, e.answered, e.expected) for e in detailed.of(StationAnswered)
    ] == [
        ("B", Outcome.SUCCEEDED, 1, 2),
        ("A", Outcome.REJECTED, 2, 2),
    ]
    assert brief.events == []


async def test_a_batch_that_was_dropped_has_no_answers_any_more() -> None:
    collecting = collector("A", "B")
    collecting.settle(succeeded("A"))
    assert (collecting.closed, collecting.answered, collecting.expected) == (False, 1, 2)
    collecting.drop()
    assert (collecting.closed, collecting.answered) == (True, 0)
    assert collecting.done.is_set()
