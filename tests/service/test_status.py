"""The status board: what it keeps of what happens, and that this is bounded and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import trio
import trio.testing

from stationmaster.batch import (
    Batch,
    BatchReport,
    ClosedBy,
    Outcome,
    StationResult,
)
from stationmaster.batcher import BatchPolicy, open_batcher
from stationmaster.errors import EmbedderUnavailableError
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
    LateResult,
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
from stationmaster.service.status import KEPT_REPORTS, SHOWN_BATCHES, StatusBoard
from stationmaster.state import open_state
from stationmaster.testing import Hang, RecordingSink, ScriptedEmbedder
from tests.service.standing import kafka, partition
from tests.telemetry import NOON, record
from tests.watched import open_watched

if TYPE_CHECKING:
    from pathlib import Path

    from stationmaster.events import Event


def batch(batch_id: str = "air_0_1_0", *, deadline: float = 5.0) -> Batch:
    return Batch(
        batch_id=batch_id,
        topic="air",
        opened_at=NOON,
        deadline=deadline,
        ranges=(),
        entries={},
        last_message={},
    )


def report(
    batch_id: str = "air_0_1_0",
    *,
    closed_by: ClosedBy = ClosedBy.COMPLETE,
    duration_s: float = 0.5,
    deadline: float = 5.0,
    **outcomes: Outcome,
) -> BatchReport:
    """The report of a batch with these stations, "A" alone if none is named."""
    named = outcomes or {"A": Outcome.SUCCEEDED}
    counts = dict.fromkeys(Outcome, 0)
    for outcome in named.values():
        counts[outcome] += 1
    return BatchReport(
        batch=batch(batch_id, deadline=deadline),
        closed_by=closed_by,
        closed_at=NOON,
        duration_s=duration_s,
        results=tuple(StationResult(name, outcome) for name, outcome in named.items()),
        counts=counts,
    )


def closed(*arguments: Any, **outcomes: Any) -> BatchClosed:
    return BatchClosed(report=report(*arguments, **outcomes), lateness_s=0.0)


def hear(board: StatusBoard, *events: Event) -> dict[str, Any]:
    for event in events:
        board.observe(event)
    picture = board.whole_picture()
    assert orjson.loads(orjson.dumps(picture)) == picture
    return picture


async def test_a_board_that_heard_nothing_has_a_picture() -> None:
    picture = hear(StatusBoard())

    assert picture["state"] == "starting"
    assert picture["batches"] == {"open": 0, "slots": None, "bytes": 0, "nearest": []}
    assert picture["counters"]["stationSuccessRate"] is None
    assert picture["counters"]["meanSeconds"] is None
    assert picture["batcher"] is picture["kafka"] is picture["outbox"] is None
    assert picture["reports"] == []
    assert picture["stationOutcomes"] == {}


async def test_a_closed_batch_shows_in_the_reports_the_stations_and_the_figures(
    autojump_clock: trio.testing.MockClock,
) -> None:
    now = trio.current_time()
    one = report(
        closed_by=ClosedBy.DEADLINE,
        duration_s=2.0,
        deadline=now,
        A=Outcome.SUCCEEDED,
        B=Outcome.TIMED_OUT,
        C=Outcome.FAILED,
    )
    picture = hear(
        StatusBoard(),
        BatchOpened(batch=one.batch, in_flight=1),
        BatchClosed(report=one, lateness_s=0.0125),
        UploadDone(report=one, attempts=1, seconds=0.1),
    )

    assert picture["reports"] == [
        {
            "number": 1,
            "batchId": "air_0_1_0",
            "topic": "air",
            "closedAt": "2024-01-01T12:00:00.000Z",
            "closedBy": "deadline",
            "seconds": 2.0,
            "deadlineSeconds": 2.0,
            "expected": 3,
            "succeeded": 1,
            "unsuccessful": [
                {"stationId": "B", "outcome": "timedOut"},
                {"stationId": "C", "outcome": "failed"},
            ],
            "unsuccessfulMore": 0,
            "upload": "uploaded",
        }
    ]
    assert picture["stationOutcomes"] == {"A": "succeeded", "B": "timedOut", "C": "failed"}
    counters = picture["counters"]
    assert (counters["opened"], counters["closed"], counters["uploaded"]) == (1, 1, 1)
    assert counters["closedBy"] == {"complete": 0, "quorum": 0, "deadline": 1}
    assert counters["outcomes"]["timedOut"] == 1
    assert counters["stationSuccessRate"] == 0.3333
    assert counters["deadlineRate"] == 1.0
    assert counters["meanSeconds"] == 2.0
    assert counters["worstLatenessSeconds"] == 0.0125


async def test_a_report_names_the_first_five_that_did_not_succeed_and_counts_the_others() -> None:
    late = {f"S{number}": Outcome.TIMED_OUT for number in range(9)}
    [recent] = hear(StatusBoard(), closed(**late))["reports"]

    assert [one["stationId"] for one in recent["unsuccessful"]] == ["S0", "S1", "S2", "S3", "S4"]
    assert recent["unsuccessfulMore"] == 4


async def test_a_report_says_what_became_of_its_upload() -> None:
    one = report()
    fates: dict[str, list[Event]] = {
        "uploading": [],
        "uploaded": [UploadDone(report=one, attempts=1, seconds=0.1)],
        "rejected": [UploadRejected(report=one, status=400, answer="no")],
        "failed": [UploadFailed(batch_id="air_0_1_0", attempts=3, reason="away")],
        "in outbox": [UploadKept(batch_id="air_0_1_0", attempts=3, reason="away")],
        "dropped": [BatchDropped(batch=one.batch)],
        "withdrawn": [BatchWithdrawn(batch=one.batch)],
    }
    for word, events in fates.items():
        picture = hear(StatusBoard(), BatchClosed(report=one, lateness_s=0.0), *events)
        assert picture["reports"][0]["upload"] == word

    delivered = OutboxDelivered(
        batch_id="air_0_1_0", attempts=1, waited_s=9.0, sent_bytes=1, rows_left=0
    )
    kept = UploadKept(batch_id="air_0_1_0", attempts=0, reason="down")
    picture = hear(StatusBoard(), BatchClosed(report=one, lateness_s=0.0), kept, delivered)
    assert picture["reports"][0]["upload"] == "uploaded"
    assert picture["counters"]["sentToOutbox"] == 1
    assert picture["counters"]["uploadedFromOutbox"] == 1


async def test_only_the_last_reports_are_kept_and_what_an_older_one_becomes_is_only_counted() -> (
    None
):
    board = StatusBoard()
    for number in range(3 * KEPT_REPORTS):
        board.observe(closed(f"air_0_{number}_0"))
    first = report("air_0_0_0")
    picture = hear(board, UploadDone(report=first, attempts=1, seconds=0.1))

    assert len(picture["reports"]) == KEPT_REPORTS
    assert picture["reports"][0]["number"] == 3 * KEPT_REPORTS
    assert {one["upload"] for one in picture["reports"]} == {"uploading"}
    assert picture["counters"]["uploaded"] == 1
    assert len(board.take_changed_reports()) == KEPT_REPORTS


async def test_a_batch_that_comes_again_has_two_reports_and_the_newer_one_hears_of_the_upload() -> (
    None
):
    board = StatusBoard()
    for _ in range(KEPT_REPORTS):  # the last pushes nothing out
        board.observe(closed())
    board.observe(closed())  # now the oldest goes, and must not take the newest's place with it
    picture = hear(board, UploadDone(report=report(), attempts=1, seconds=0.1))

    assert [one["upload"] for one in picture["reports"][:2]] == ["uploaded", "uploading"]


async def test_new_and_changed_reports_are_told_once_oldest_first() -> None:
    board = StatusBoard()
    board.observe(closed("a"))
    board.observe(closed("b"))
    assert [one["batchId"] for one in board.take_changed_reports()] == ["a", "b"]
    assert board.take_changed_reports() == []

    board.observe(UploadDone(report=report("a"), attempts=1, seconds=0.1))
    assert [(one["batchId"], one["upload"]) for one in board.take_changed_reports()] == [
        ("a", "uploaded")
    ]


async def test_troubles_stand_there_until_they_are_over() -> None:
    board = StatusBoard()
    picture = hear(
        board,
        SourceTrouble(kind="broker-down", detail="nobody\x1b[31m answers"),
        UploadsDiverted(reason="503"),
        StoreBlocked(store="outbox", kind="full", detail="no room " + "x" * 500),
        EndpointOpened(endpoint="http://m:1", failures=3, reason="away"),
    )
    assert picture["troubles"][:2] == [
        {"name": "source", "detail": "broker-down: nobody\\u001b[31m answers"},
        {"name": "upload target", "detail": "down: 503"},
    ]
    assert [one["name"] for one in picture["troubles"][2:]] == ["outbox", "model server http://m:1"]
    assert len(picture["troubles"][2]["detail"]) == 203

    picture = hear(
        board,
        SourceRecovered(),
        UploadsResumed(diverted_s=1.0),
        StoreUnblocked(store="outbox", blocked_s=1.0),
        EndpointClosed(endpoint="http://m:1", open_s=1.0),
    )
    assert picture["troubles"] == []


async def test_lone_surrogates_in_an_error_do_not_break_the_picture() -> None:
    picture = hear(StatusBoard(), SourceTrouble(kind="x", detail="\ud800"))
    assert picture["troubles"] == [{"name": "source", "detail": "x: \\ud800"}]


async def test_what_else_happens_is_counted_or_ignored() -> None:
    counters = hear(
        StatusBoard(),
        EmptyBatch(batch=batch()),
        MessageRefused(record=record(), reason="bad-json", detail=""),
        LateResult(batch_id="air_0_1_0", station_id="A"),
    )["counters"]

    assert (counters["empty"], counters["deadLetters"]) == (1, 1)


async def test_the_batcher_is_shown_by_its_queue_and_by_the_mean_size_of_its_last_calls() -> None:
    board = StatusBoard(max_batch_rows=32)
    async with open_batcher(ScriptedEmbedder(), policy=BatchPolicy()) as batcher:
        board.watch(batcher=batcher.statistics)
        assert hear(board)["batcher"]["meanRows"] is None
        calls = [
            CallStarted(rows=rows, reason="full", oldest_age_s=0.0, queue_rows=0)
            for rows in (10, 31)
        ]
        failed = CallFailed(rows=10, seconds=0.1, error=EmbedderUnavailableError("away"))
        shown = hear(board, *calls, failed)["batcher"]

    assert shown["meanRows"] == 20.5
    assert shown["maxRows"] == 32
    assert (shown["queuedRows"], shown["callsInFlight"], shown["failedCalls"]) == (0, 0, 1)


async def test_kafka_is_shown_by_its_lag_the_worst_partitions_first() -> None:
    board = StatusBoard()
    lags = (partition(0, 5), partition(1, None), partition(2, 7))
    board.watch(kafka=lambda: kafka(*lags, paused=True, rebalances=2))
    shown = hear(board)["kafka"]

    assert (shown["lag"], shown["assigned"], shown["paused"], shown["rebalances"]) == (
        12,
        3,
        True,
        2,
    )
    assert [one["partition"] for one in shown["partitions"]] == [2, 0, 1]


async def test_a_lag_that_nobody_knows_is_none_and_of_many_partitions_the_worst_are_shown() -> None:
    board = StatusBoard()
    board.watch(kafka=lambda: kafka(partition(0, None)))
    assert hear(board)["kafka"]["lag"] is None

    board.watch(kafka=lambda: kafka(*(partition(number, number) for number in range(200))))
    shown = hear(board)["kafka"]["partitions"]
    assert len(shown) == 64
    assert shown[0]["lag"] == 199


async def test_outbox_and_dead_letters_are_shown_by_what_they_hold(tmp_path: Path) -> None:
    board = StatusBoard()
    async with open_state(tmp_path / "state.db", outbox_max_bytes=100) as state:
        board.watch(state=state.statistics)
        await state.outbox.put(
            "b", topic="air", ranges=(), body=b"12345", kept_at=0.0, reason="away"
        )
        picture = hear(board)

    assert (picture["outbox"]["rows"], picture["outbox"]["bytes"]) == (1, 5)
    assert picture["outbox"]["maxBytes"] == 100
    assert picture["outbox"]["oldestSeconds"] > 1_000_000
    assert picture["deadLetters"]["rows"] == 0


async def test_open_batches_stand_against_their_deadline_the_nearest_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_watched() as watched:
        watched.send("A", "B", "C", hang=["C"])
        await trio.sleep(0.5)
        watched.send("D", hang=["D"])
        await trio.sleep(0.25)
        picture = hear(watched.board)
        assert picture["state"] == "running"
        assert picture["batches"]["open"] == 2
        assert picture["batches"]["nearest"] == [
            {
                "batchId": "air_0_0_0",
                "topic": "air",
                "seconds": 0.75,
                "deadlineSeconds": 2.0,
                "answered": 2,
                "expected": 3,
                "stage": "collecting",
            },
            {
                "batchId": "air_0_1_0",
                "topic": "air",
                "seconds": 0.25,
                "deadlineSeconds": 2.0,
                "answered": 0,
                "expected": 1,
                "stage": "collecting",
            },
        ]
        for number in range(40):
            watched.send(f"E{number}", hang=[f"E{number}"])
        await trio.sleep(0.1)
        picture = hear(watched.board)
        assert picture["batches"]["open"] == 42
        assert len(picture["batches"]["nearest"]) == SHOWN_BATCHES
        watched.pipeline.drain(grace_s=5)
        assert hear(watched.board)["state"] == "draining"
        await watched.pipeline.wait_finished()
        assert hear(watched.board)["stationOutcomes"]["C"] == "timedOut"


async def test_a_batch_whose_upload_is_under_way_says_so(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_watched(sink=RecordingSink([Hang()])) as watched:
        watched.send("A", "B")
        await trio.sleep(0.5)
        [shown] = hear(watched.board)["batches"]["nearest"]

    assert (shown["stage"], shown["answered"], shown["expected"]) == ("uploading", 2, 2)
