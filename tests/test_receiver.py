"""The receiver: each batch once, an honest referee of the upload form, and faults on demand."""

from __future__ import annotations

import gzip
import signal
import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import httpx
import orjson
import pytest
import trio

from stationmaster.abc import Accepted, Rejected, TryAgain
from stationmaster.reports import encode_report
from stationmaster.service.asgi import bind, open_server
from stationmaster.service.receiver import Faults, StoreError, open_store, receiver_app
from stationmaster.service.upload_form import MAX_BODY_BYTES
from stationmaster.sinks import open_http_sink
from tests.http_requests import client_of
from tests.processes import open_part
from tests.uploads import form, report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock


@asynccontextmanager
async def open_receiver(database: Path, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the receiver behind a real socket."""
    with open_store(database) as store:
        app = receiver_app(store, **options)
        async with open_server(app, await bind("127.0.0.1", 0)) as url:
            async with httpx.AsyncClient(base_url=url) as client:
                yield client


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "receiver.sqlite"


async def post(
    client: httpx.AsyncClient, content: bytes | dict[str, Any], *, key: str = "", **headers: str
) -> httpx.Response:
    """Upload; the key is the form's batch id if not given, and nothing is sent for a key of "-"."""
    if isinstance(content, dict):
        key = key or str(content.get("batchId"))
        content = orjson.dumps(content)
    sent = {"content-type": "application/json", "idempotency-key": key}
    if key == "-":
        del sent["idempotency-key"]
    return await client.post("/batches", content=content, headers=sent | headers)


async def summary(client: httpx.AsyncClient) -> tuple[int, int, int]:
    told = (await client.get("/summary")).json()
    assert set(told) == {"batches", "results", "deliveries"}
    return told["batches"], told["results"], told["deliveries"]


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database)) as db:
        return db.execute(query).fetchall()


# ------------------------------------------------------------------------------------------------ each batch once


async def test_a_batch_is_stored_once_and_its_first_body_stays(database: Path) -> None:
    first, second = form(), form(durationSeconds=4.0)
    async with open_receiver(database) as client:
        answer = await post(client, first)
        assert (answer.status_code, answer.json()) == (
            201,
            {"batchId": first["batchId"], "duplicate": False},
        )
        answer = await post(client, second)
        assert (answer.status_code, answer.json()) == (
            200,
            {"batchId": first["batchId"], "duplicate": True},
        )
        assert await summary(client) == (1, 2, 2)
    ((batch_id, deliveries, body),) = rows(
        database, "SELECT batch_id, deliveries, body FROM batches"
    )
    assert (batch_id, deliveries, orjson.loads(body)) == (first["batchId"], 2, first)
    assert rows(database, "SELECT * FROM results") == [
        ("air", 0, 12345, 12345, "S001"),
        ("air", 0, 12345, 12345, "S003"),
    ]


async def test_a_result_has_a_row_for_each_range_and_counts_once(database: Path) -> None:
    async with open_receiver(database) as client:
        ranges = ((0, 10, 12), (3, 7, 7))
        content = encode_report(report("many", ranges=ranges))
        assert (await post(client, content, key="many")).status_code == 201
        assert await summary(client) == (1, 2, 1)
    assert rows(database, "SELECT * FROM results ORDER BY partition, station_id") == [
        ("air", 0, 10, 12, "S001"),
        ("air", 0, 10, 12, "S003"),
        ("air", 3, 7, 7, "S001"),
        ("air", 3, 7, 7, "S003"),
    ]


async def test_the_same_record_under_two_ids_shows_as_double_rows(database: Path) -> None:
    async with open_receiver(database) as client:
        for batch_id in ("a", "b"):
            assert (await post(client, form(batch_id))).status_code == 201
        assert await summary(client) == (2, 4, 2)
    assert rows(database, "SELECT count(*) - count(DISTINCT station_id) FROM results") == [(2,)]


async def test_uploads_at_once_are_each_counted(database: Path) -> None:
    async with open_receiver(database) as client, trio.open_nursery() as nursery:
        answers: list[int] = []

        async def upload(number: int) -> None:
            answers.append((await post(client, form(f"batch-{number % 20}"))).status_code)

        async with trio.open_nursery() as uploads:
            for number in range(60):
                uploads.start_soon(upload, number)
        assert sorted(answers) == [200] * 40 + [201] * 20
        assert await summary(client) == (20, 40, 60)
        nursery.cancel_scope.cancel()


async def test_what_was_accepted_is_there_when_the_receiver_opens_again(database: Path) -> None:
    async with open_receiver(database) as client:
        await post(client, form("a"))
    async with open_receiver(database) as client:
        assert await summary(client) == (1, 2, 1)
        assert (await post(client, form("a"))).json()["duplicate"] is True
        assert (await post(client, form("b"))).json()["duplicate"] is False
        assert await summary(client) == (2, 4, 3)


@pytest.mark.parametrize("compression", ["none", "gzip"])
async def test_our_own_sink_is_understood(database: Path, compression: Any) -> None:
    # An id that cannot stand in a header as it is: the sink escapes it.
    closed = report("Luft\N{LATIN SMALL LETTER U WITH DIAERESIS} 100%_0_1")
    async with open_receiver(database) as client:
        url = f"{client.base_url}/batches"
        async with open_http_sink(url, compression=compression) as sink:
            assert await sink.upload(closed) == Accepted(status=201)
            assert await sink.upload(closed) == Accepted(status=200)
            await client.post("/control", json={"status": 413})
            assert isinstance(await sink.upload(closed), Rejected)
            await client.post("/control", json={"status": 503})
            assert isinstance(await sink.upload(closed), TryAgain)
    ((batch_id, body),) = rows(database, "SELECT batch_id, body FROM batches")
    assert (batch_id, body) == (closed.batch.batch_id, encode_report(closed))


# -------------------------------------------------------------------------------------------------------- refusals


async def test_an_upload_that_breaks_the_form_is_refused_with_the_reason(database: Path) -> None:
    async with open_receiver(database) as client:
        answer = await post(client, form(closedBy="whim"))
        assert (answer.status_code, answer.json()) == (
            400,
            {"error": "closedBy: not one of the known rules"},
        )
        assert await summary(client) == (0, 0, 0)


async def test_an_upload_without_a_key_is_refused(database: Path) -> None:
    async with open_receiver(database) as client:
        answer = await post(client, form(), key="-")
        assert (answer.status_code, answer.json()) == (
            400,
            {"error": "Idempotency-Key: expected the body's batchId"},
        )


async def test_a_bomb_and_an_unknown_encoding_are_refused(database: Path) -> None:
    bomb = gzip.compress(bytes(MAX_BODY_BYTES + 1), 1)
    async with open_receiver(database) as client:
        answer = await post(client, bomb, key="x", **{"content-encoding": "gzip"})
        assert answer.status_code == 413
        answer = await post(client, form(), **{"content-encoding": "br"})
        assert answer.status_code == 415
        assert await summary(client) == (0, 0, 0)


# ----------------------------------------------------------------------------------------------------------- faults


async def test_a_status_is_answered_to_every_upload_and_nothing_is_stored(database: Path) -> None:
    for status in (200, 204, 302, 409, 503):
        async with open_receiver(database, faults=Faults(status=status)) as client:
            for upload in (form(), {}):
                answer = await post(client, upload)
                assert (answer.status_code, answer.content) == (status, b"")
            assert await summary(client) == (0, 0, 0)


async def test_failing_uploads_are_in_part_stored_all_the_same(database: Path) -> None:
    async with open_receiver(database, faults=Faults(fail_rate=1.0)) as client:
        said = []
        for number in range(20):
            answer = await post(client, form(f"batch-{number}"))
            assert answer.status_code == 503
            said.append(answer.json()["error"])
        stored = said.count("pretended fault, though the batch was stored")
        assert said.count("pretended fault, nothing was stored") == 20 - stored
        assert 0 < stored < 20
        assert await summary(client) == (stored, 2 * stored, stored)


async def test_the_same_seed_fails_the_same_uploads(tmp_path: Path) -> None:
    async def statuses(run: str, seed: int) -> list[int]:
        faults = Faults(fail_rate=0.5)
        async with open_receiver(tmp_path / run, faults=faults, seed=seed) as client:
            return [(await post(client, form(f"batch-{n}"))).status_code for n in range(30)]

    first = await statuses("first", 1)
    assert set(first) == {201, 503}
    assert await statuses("second", 1) == first
    assert await statuses("third", 2) != first


async def test_the_latency_is_waited_before_an_answer(
    database: Path, autojump_clock: MockClock
) -> None:
    with open_store(database) as store:
        app = receiver_app(store, faults=Faults(latency_s=2.5, status=503))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
            started = trio.current_time()
            assert (await post(client, form())).status_code == 503
            assert trio.current_time() - started == 2.5


async def test_faults_are_changed_at_runtime(database: Path) -> None:
    async with open_receiver(database) as client:
        answer = await client.post("/control", json={"status": 503, "latencyMs": 1.5})
        assert answer.json() == {"status": 503, "latencyMs": 1.5, "failRate": 0.0}
        assert (await post(client, form())).status_code == 503
        answer = await client.post("/control", json={"status": None, "failRate": 1})
        assert answer.json() == {"status": None, "latencyMs": 1.5, "failRate": 1}
        assert (await post(client, form())).status_code == 503
        assert (await client.post("/control", json={"failRate": 0})).json()["failRate"] == 0
        assert (await post(client, form())).status_code in {200, 201}


@pytest.mark.parametrize(
    "wanted",
    [
        [],
        {"status": "503"},
        {"status": 503.0},
        {"status": True},
        {"status": 100},
        {"status": 600},
        {"latencyMs": -1},
        {"latencyMs": None},
        {"latencyMs": 3_600_001},
        {"failRate": 1.1},
        {"failRate": True},
        {"fail_rate": 1},
    ],
    ids=str,
)
async def test_faults_that_are_none_are_refused_and_change_nothing(
    database: Path, wanted: object
) -> None:
    async with open_receiver(database) as client:
        answer = await client.post("/control", json=wanted)
        assert answer.status_code == 400
        assert answer.json()["error"]
        told = (await client.post("/control", json={})).json()
        assert told == {"status": None, "latencyMs": 0.0, "failRate": 0.0}


async def test_faults_are_changed_from_this_machine_only(database: Path) -> None:
    with open_store(database) as store:
        transport = httpx.ASGITransport(receiver_app(store), client=("192.0.2.7", 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
            assert (await client.post("/control", json={"status": 503})).status_code == 403
            assert (await post(client, form())).status_code == 201


# --------------------------------------------------------------------------------------------------------- the store


async def test_a_database_that_takes_nothing_is_told_and_nothing_is_half_stored(
    database: Path,
) -> None:
    async with open_receiver(database) as client:
        with closing(sqlite3.connect(database)) as db:
            db.execute("ALTER TABLE results RENAME TO moved")
        answer = await post(client, form())
        assert answer.status_code == 503
        assert "is not stored: no such table: results" in answer.json()["error"]
        assert await summary(client) == (0, 0, 0)
        with closing(sqlite3.connect(database)) as db:
            db.execute("ALTER TABLE moved RENAME TO results")
        assert (await post(client, form())).status_code == 201
        with closing(sqlite3.connect(database)) as db:
            db.execute("ALTER TABLE batches RENAME TO moved")
        assert (await client.get("/summary")).status_code == 503


def test_a_database_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot open .*receiver\.sqlite"):
        with open_store(tmp_path / "nowhere" / "receiver.sqlite"):
            pass
    (tmp_path / "text").write_text("this is no database, whatever its name may say" * 100)
    with pytest.raises(StoreError, match=r"cannot use .*text: file is not a database"):
        with open_store(tmp_path / "text"):
            pass


# ------------------------------------------------------------------------------------------------------ the process


async def test_what_the_process_accepted_outlives_its_kill(database: Path) -> None:
    async with open_part("receiver", "--db", str(database)) as part:
        url = (await part.wait_line("listening on ")).removeprefix("listening on ")
        async with client_of(url) as client:
            assert (await post(client, form())).status_code == 201
        part.process.kill()
        assert await part.ends() == -signal.SIGKILL
    assert rows(database, "SELECT deliveries FROM batches") == [(1,)]


async def test_the_process_serves_and_ends_cleanly_at_sigterm(database: Path) -> None:
    options = ("--db", str(database), "--status", "503", "--latency-ms", "1", "--fail-rate", "0.5")
    async with open_part("receiver", *options) as part:
        url = (await part.wait_line("listening on ")).removeprefix("listening on ")
        async with client_of(url) as client:
            assert (await post(client, form())).status_code == 503
            told = (await client.post("/control", json={"status": None, "failRate": 0})).json()
            assert told == {"status": None, "latencyMs": 1.0, "failRate": 0}
            assert (await post(client, form())).status_code == 201
            part.process.send_signal(signal.SIGTERM)
            assert await part.ends() == 0
    assert part.lines == [f"listening on {url}"]
    assert rows(database, "SELECT count(*) FROM batches") == [(1,)]
    assert [path.name for path in database.parent.iterdir()] == [
        database.name
    ]  # no log left behind
