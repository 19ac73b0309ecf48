from __future__ import annotations

import gzip
import random
from collections import Counter
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.batch import (
    BadEntry,
    Batch,
    BatchReport,
    ClosedBy,
    OffsetRange,
    Outcome,
    StationResult,
)
from stationmaster.http_words import MAX_RETRY_AFTER_S
from stationmaster.reports import encode_report
from stationmaster.sinks import open_http_sink
from stationmaster.testing.server import HANG, RESET, Reply, ScriptedServer, open_server
from stationmaster.testing.sink import Hang, RecordingSink, Slow

from .http_server import closed_port, passing_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from trio.testing import MockClock

    from stationmaster.abc import UploadAnswer

OPENED = datetime(2026, 3, 1, 12, 0, 0, 123_456, tzinfo=timezone(timedelta(hours=8)))


def succeeded(station_id: str, **value: Any) -> StationResult:
    encoded = orjson.dumps({"stationId": station_id, **value})
    return StationResult(station_id, Outcome.SUCCEEDED, value=value, encoded=encoded)


def report_of(
    *results: StationResult, batch_id: str = "t_0_5_1", bad_entries: Sequence[BadEntry] = ()
) -> BatchReport:
    counts = Counter(result.outcome for result in results)
    batch = Batch(
        batch_id=batch_id,
        topic="t",
        opened_at=OPENED,
        deadline=5.0,
        ranges=(
            OffsetRange(topic="t", partition=0, first=5, last=5, generation=3),
            OffsetRange(topic="t", partition=2, first=7, last=9, generation=3),
        ),
        entries={},
        last_message={},
        bad_entries=tuple(bad_entries),
    )
    return BatchReport(
        batch=batch,
        closed_by=ClosedBy.QUORUM,
        closed_at=OPENED + timedelta(seconds=0.8),
        duration_s=0.8000000001,
        results=results,
        counts={outcome: counts[outcome] for outcome in Outcome},
    )


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    with trio.fail_after(10):
        async with open_server(lambda _: Reply(status=201)) as scripted:
            yield scripted


# ----------------------------------------------------------------------------------------------------------- the form


def test_a_report_has_exactly_the_documented_form() -> None:
    report = report_of(
        succeeded("S001", level=1.5, tags=["a"]),
        StationResult("S002", Outcome.FAILED, reason="ValueError: no"),
        StationResult("S003", Outcome.NO_OUTPUT),
        succeeded("S004"),
        StationResult("S005", Outcome.TIMED_OUT, reason="at the deadline"),
        StationResult("S006", Outcome.MISSING, reason="no data"),
        StationResult("S007", Outcome.REJECTED, reason="queue full"),
        bad_entries=[BadEntry(index=3, reason="no stationId")],
    )
    assert encode_report(report).decode() == (
        '{"batchId":"t_0_5_1","topic":"t","closedBy":"quorum",'
        '"openedAt":"2026-03-01T04:00:00.123Z","closedAt":"2026-03-01T04:00:00.923Z","durationSeconds":0.8,'
        '"ranges":[{"partition":0,"first":5,"last":5},{"partition":2,"first":7,"last":9}],'
        '"counts":{"expected":7,"succeeded":2,"noOutput":1,"failed":1,"timedOut":1,"missing":1,"rejected":1},'
        '"results":[{"stationId":"S001","level":1.5,"tags":["a"]},{"stationId":"S004"}],'
        '"unsuccessful":[{"stationId":"S002","outcome":"failed","reason":"ValueError: no"},'
        '{"stationId":"S003","outcome":"noOutput","reason":""},'
        '{"stationId":"S005","outcome":"timedOut","reason":"at the deadline"},'
        '{"stationId":"S006","outcome":"missing","reason":"no data"},'
        '{"stationId":"S007","outcome":"rejected","reason":"queue full"}],'
        '"badEntries":[{"index":3,"reason":"no stationId"}]}'
    )


def test_the_three_lists_are_there_even_when_empty() -> None:
    form = orjson.loads(encode_report(report_of()))
    assert (form["results"], form["unsuccessful"], form["badEntries"]) == ([], [], [])
    assert form["counts"]["expected"] == 0


def test_a_reason_that_json_cannot_hold_is_escaped_and_harms_nobody() -> None:
    report = report_of(
        succeeded("S001"),
        StationResult("S002", Outcome.FAILED, reason="bad \ud83d"),
        bad_entries=[BadEntry(index=0, reason="\udfff")],
    )
    form = orjson.loads(encode_report(report))
    assert form["unsuccessful"][0]["reason"] == r"bad \ud83d"
    assert form["badEntries"][0]["reason"] == r"\udfff"
    assert form["results"] == [{"stationId": "S001"}]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(Outcome), st.text()), max_size=20))
def test_every_expected_station_stands_in_one_of_the_two_lists(
    stations: list[tuple[Outcome, str]],
) -> None:
    results = [
        succeeded(f"S{number}", said=reason)
        if outcome is Outcome.SUCCEEDED
        else StationResult(f"S{number}", outcome, reason=reason)
        for number, (outcome, reason) in enumerate(stations)
    ]
    form = orjson.loads(encode_report(report_of(*results)))
    listed = [*form["results"], *form["unsuccessful"]]
    assert Counter(row["stationId"] for row in listed) == Counter(
        f"S{n}" for n in range(len(stations))
    )
    assert sum(form["counts"].values()) == 2 * form["counts"]["expected"] == 2 * len(stations)
    for rows in (form["results"], form["unsuccessful"]):
        assert [int(row["stationId"][1:]) for row in rows] == sorted(
            int(row["stationId"][1:]) for row in rows
        )


# ---------------------------------------------------------------------------------------------------------- the post


async def test_an_upload_is_a_post_with_the_batch_id_as_its_key(server: ScriptedServer) -> None:
    report = report_of(succeeded("S001"))
    async with open_http_sink(server.url + "/batches?site=3", token="sesame") as sink:
        assert await sink.upload(report) == Accepted(status=201)
        assert "sesame" not in repr(sink)
    [seen] = server.seen
    assert (seen.method, seen.target, seen.body) == (
        "POST",
        "/batches?site=3",
        encode_report(report),
    )
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["idempotency-key"] == "t_0_5_1"
    assert seen.headers["authorization"] == "Bearer sesame"
    assert seen.headers["user-agent"].startswith("stationmaster/")
    assert "content-encoding" not in seen.headers


@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_body_is_compressed_if_wanted(server: ScriptedServer, size: int) -> None:
    noise = random.Random(1).randbytes(size).hex()
    report = report_of(succeeded("S001", noise=noise))
    async with open_http_sink(server.url, compression="gzip") as sink:
        await sink.upload(report)
    [seen] = server.seen
    assert seen.headers["content-encoding"] == "gzip"
    assert gzip.decompress(seen.body) == encode_report(report)
    assert "authorization" not in seen.headers


@pytest.mark.parametrize(
    ("batch_id", "key"),
    [
        ("a.b-c_0_5_1", "a.b-c_0_5_1"),
        ("größe 1\r\nX: y", "gr%C3%B6%C3%9Fe%201%0D%0AX:%20y"),
        ("%41", "%2541"),
    ],
)
async def test_any_batch_id_is_a_legal_key_and_no_two_are_alike(
    server: ScriptedServer, batch_id: str, key: str
) -> None:
    async with open_http_sink(server.url) as sink:
        await sink.upload(report_of(batch_id=batch_id))
    assert server.seen[0].headers["idempotency-key"] == key


# -------------------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, Accepted) for status in (200, 201, 202, 204, 299)),
        *((status, Rejected) for status in (400, 413, 422)),
        *((status, Unavailable) for status in (301, 307, 401, 403, 404, 405)),
        *((status, TryAgain) for status in (402, 408, 409, 410, 425, 429, 500, 502, 503, 507)),
    ],
)
async def test_a_status_has_its_meaning(
    server: ScriptedServer, status: int, kind: type[UploadAnswer]
) -> None:
    body = b"" if status == 204 else b'{"error": "your token sesame"}'
    server.script.append(Reply(status=status, body=body, headers={"Location": server.url}))
    async with open_http_sink(server.url + "/in?key=hidden", token="sesame") as sink:
        answer = await sink.upload(report_of())
        assert type(answer) is kind
        assert await sink.upload(report_of()) == Accepted(status=201)
    assert len(server.seen) == 2, "a redirect was followed"
    match answer:
        case Rejected(status=told, answer=words):
            assert (told, words) == (status, '{"error": "your token ***"}')
        case TryAgain(reason=reason) | Unavailable(reason=reason):
            assert f"/in answered {status}: your token ***" in reason
            assert "hidden" not in reason
        case Accepted(status=told):
            assert told == status


async def test_a_status_may_be_counted_as_accepted(server: ScriptedServer) -> None:
    server.script.extend([Reply(status=409), Reply(status=400), Reply(status=409)])
    async with open_http_sink(server.url, accepted={409, 400}) as sink:
        assert await sink.upload(report_of()) == Accepted(status=409)
        assert await sink.upload(report_of()) == Accepted(status=400)
    async with open_http_sink(server.url) as sink:
        assert isinstance(await sink.upload(report_of()), TryAgain)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_a_target_may_say_when_to_try_again(server: ScriptedServer, status: int) -> None:
    past, future = "Sun, 01 Mar 2020 12:00:30 GMT", "Fri, 01 Mar 2120 12:00:30 GMT"
    said = [{}, *({"Retry-After": value} for value in ("7", past, future, "soon"))]
    server.script.extend(Reply(status=status, headers=headers) for headers in said)
    waits: list[float | None] = []
    async with open_http_sink(server.url) as sink:
        for _ in said:
            answer = await sink.upload(report_of())
            assert isinstance(answer, TryAgain)
            assert answer.reason.endswith(f"{status}: no words")
            waits.append(answer.retry_after_s)
    assert waits == [None, 7.0, 0.0, MAX_RETRY_AFTER_S, None]


async def test_the_first_two_kib_of_a_rejection_are_kept(server: ScriptedServer) -> None:
    server.script.append(Reply(status=413, body=b"\xff" + b"x" * 10_000_000))
    async with open_http_sink(server.url) as sink:
        answer = await sink.upload(report_of())
    assert answer == Rejected(status=413, answer=r"\xff" + "x" * 2044)


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(Reply(body=b"x" * 10_000_000), id="is endless"),
        pytest.param(Reply(body=b"x" * 99, first=60, end="reset"), id="is reset"),
        pytest.param(Reply(body=b"\x1f", headers={"Content-Encoding": "gzip"}), id="is compressed"),
    ],
)
async def test_a_batch_is_accepted_by_the_status_whatever_the_body(
    server: ScriptedServer, reply: Reply
) -> None:
    server.script.append(reply)
    async with open_http_sink(server.url, connections=1) as sink:
        assert await sink.upload(report_of()) == Accepted(status=200)
        assert await sink.upload(report_of()) == Accepted(status=201)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        pytest.param(HANG, "did not answer in time", id="hangs"),
        pytest.param(Reply(pause_s=1.0), "did not answer in time", id="drips"),
        pytest.param(RESET, "broke the connection", id="resets"),
        pytest.param(
            Reply(raw=b"* OK IMAP4rev1\r\n\r\n"), "broke the connection", id="is no HTTP server"
        ),
        pytest.param(
            Reply(status=502, body=b"<html>Bad Gateway</html>", end="ambush"),
            "502: <html>Bad",
            id="is a proxy",
        ),
    ],
)
async def test_trouble_means_try_again_and_harms_no_later_upload(
    mock_clock: MockClock, server: ScriptedServer, reply: Reply, words: str
) -> None:
    server.script.append(reply)
    async with open_http_sink(server.url, connections=1, attempt_timeout_s=5.0) as sink:
        async with passing_time(server, mock_clock):
            answer = await sink.upload(report_of())
        assert isinstance(answer, TryAgain)
        assert words in answer.reason
        assert answer.retry_after_s is None
        assert await sink.upload(report_of()) == Accepted(status=201)


async def test_an_absent_target_means_try_again() -> None:
    async with open_http_sink(f"http://127.0.0.1:{closed_port()}") as sink:
        answer = await sink.upload(report_of())
    assert isinstance(answer, TryAgain)
    assert "cannot be reached" in answer.reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "ftp://host"}, "not of the form"),
        ({"token": "a b"}, "visible ASCII"),
        ({"compression": "zstd"}, "none or gzip"),
        ({"connections": 0}, "connections"),
    ],
)
async def test_wrong_arguments_are_refused_at_opening(options: dict[str, Any], words: str) -> None:
    arguments = {"url": "http://host", **options}
    with pytest.raises(ValueError, match=words):
        async with open_http_sink(arguments.pop("url"), **arguments):
            pass


# --------------------------------------------------------------------------------------------------- the recording sink


async def test_a_recording_sink_follows_its_script_and_then_accepts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sink = RecordingSink([Rejected(status=400, answer="no"), Slow(3.0, TryAgain(reason="busy"))])
    assert await sink.upload(report_of(batch_id="a")) == Rejected(status=400, answer="no")
    assert await sink.upload(report_of(batch_id="b")) == TryAgain(reason="busy")
    assert trio.current_time() == 3.0
    assert await sink.upload(report_of(batch_id="c")) == Accepted()
    assert list(sink.reports) == ["c"]
    assert [report.batch.batch_id for report in sink.attempts] == ["a", "b", "c"]
    assert sink.accepted.value == 1


async def test_a_recording_sink_may_answer_otherwise_for_ever() -> None:
    sink = RecordingSink(otherwise=Unavailable(reason="401"))
    for _ in range(3):
        assert await sink.upload(report_of()) == Unavailable(reason="401")
    assert sink.reports == {}


async def test_a_recording_sink_may_lose_its_answer(autojump_clock: trio.testing.MockClock) -> None:
    sink = RecordingSink([Hang(keeps=True), Hang()])
    with trio.move_on_after(1):
        await sink.upload(report_of(batch_id="kept"))
    with trio.move_on_after(1):
        await sink.upload(report_of(batch_id="lost"))
    assert list(sink.reports) == ["kept"]
    await sink.upload(report_of(batch_id="kept"))
    assert sink.deliveries == {"kept": 2}


async def test_a_recording_sink_may_have_a_bug() -> None:
    sink = RecordingSink([ZeroDivisionError()])
    with pytest.raises(ZeroDivisionError):
        await sink.upload(report_of())
