"""`stationmaster receiver`: an upload target for the demo and for tests. It keeps each batch once and can misbehave.

    POST /batches    an upload (docs: "Upload form"), body plain or gzip, `Idempotency-Key` = its `batchId`.
                     201 {"batchId", "duplicate": false} stored; 200 {..., "duplicate": true} known already: the first
                     body stays, the delivery is counted; 400, 408, 413, 415 {"error": reason} refused; 503 try again
    GET  /summary    {"batches": stored, "results": entries of `results` in the stored bodies, "deliveries": uploads
                     that were stored or known already}
    POST /control    from this machine only: {"status": int | null, "latencyMs": number, "failRate": number}, any of
                     them; changes the faults at runtime and answers with all of them

What is answered with 200 or 201 stands in SQLite: it outlives a kill of this process, though not a power cut.
"""

from __future__ import annotations

import random
import sqlite3
import time
from contextlib import closing, contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import attrs
import orjson
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from stationmaster.errors import StationmasterError
from stationmaster.service.asgi import (
    error_handlers,
    json_response,
    read_body,
    serve_until_told,
)
from stationmaster.service.upload_form import MAX_BODY_BYTES, RefusedUploadError, read_upload

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.requests import Request

    from stationmaster.service.upload_form import Upload

_MAX_CONTROL_BYTES = 4096
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS batches (
        batch_id TEXT PRIMARY KEY, received_at REAL, deliveries INTEGER, body BLOB);
    CREATE TABLE IF NOT EXISTS results (
        topic TEXT, partition INTEGER, first_offset INTEGER, last_offset INTEGER, station_id TEXT);
"""

# ------------------------------------------------------------------------------------------------------- the store


class StoreError(StationmasterError):
    """The database cannot be opened, or did not take a batch."""


@attrs.define(eq=False)
class BatchStore:
    """The database. Made by `open_store`; any thread may use it, one at a time."""

    _db: sqlite3.Connection
    _results: int
    """Entries of `results` in the stored bodies. In the table a result of several ranges has a row for each."""

    def put(self, upload: Upload) -> bool:
        """Store a batch, or count a further delivery of a known one, in one transaction; return whether it is new.

        Raises:
            StoreError: the database did not take it; nothing of it is stored.
        """
        try:
            with self._db:
                # Unpacked whole: a statement that is not read to its end would hinder the commit.
                ((deliveries,),) = self._db.execute(
                    "INSERT INTO batches VALUES (?, ?, 1, ?) "
                    "ON CONFLICT (batch_id) DO UPDATE SET deliveries = deliveries + 1 RETURNING deliveries",
                    (upload.batch_id, time.time(), upload.body),
                )
                if deliveries > 1:
                    return False
                self._db.executemany(
                    "INSERT INTO results VALUES (?, ?, ?, ?, ?)",
                    [
                        (upload.topic, *offsets, station_id)
                        for offsets in upload.ranges
                        for station_id in upload.station_ids
                    ],
                )
        except sqlite3.Error as error:
            raise StoreError(f"batch {upload.batch_id} is not stored: {error}") from error
        self._results += len(upload.station_ids)
        return True

    def summary(self) -> dict[str, int]:
        """Return what `GET /summary` says.

        Raises:
            StoreError: the database cannot be read.
        """
        try:
            ((batches, deliveries),) = self._db.execute(
                "SELECT count(*), coalesce(sum(deliveries), 0) FROM batches"
            )
        except sqlite3.Error as error:
            raise StoreError(f"the database cannot be read: {error}") from error
        return {"batches": batches, "results": self._results, "deliveries": deliveries}


@contextmanager
def open_store(path: Path) -> Iterator[BatchStore]:
    """Open the database, and make it if it is missing. Blocks for a moment; meant for a process's start and end.

    Raises:
        StoreError: there is no such folder, or the file is no database.
    """
    try:
        db = sqlite3.connect(path, check_same_thread=False, timeout=5.0)
    except sqlite3.Error as error:
        raise StoreError(f"cannot open {path}: {error}") from error
    with closing(db):
        try:
            # NORMAL: what is committed outlives the process. A power cut is not what this target is for.
            db.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; {_SCHEMA}")
            bodies = db.execute("SELECT body FROM batches")
            store = BatchStore(db, sum(len(orjson.loads(body)["results"]) for (body,) in bodies))
        except sqlite3.Error as error:
            raise StoreError(f"cannot use {path}: {error}") from error
        yield store


# --------------------------------------------------------------------------------------------------------- the app


@attrs.frozen(kw_only=True)
class Faults:
    """How uploads are mistreated.

    Raises:
        ValueError: a value is out of its range.
    """

    status: int | None = None
    """Answer every upload with this status and store nothing; from 200 to 599."""
    latency_s: float = 0.0
    """Seconds that every upload waits; up to an hour."""
    fail_rate: float = 0.0
    """Share of uploads that are answered with 503: half of them unstored, half of them stored all the same, as if the
    accepting answer had been lost on its way."""

    def __attrs_post_init__(self) -> None:
        if self.status is not None and not 200 <= self.status <= 599:
            raise ValueError(f"status: expected 200 to 599, not {self.status}")
        if not 0 <= self.latency_s <= 3600:
            raise ValueError(f"latency: expected 0 to 3600 s, not {self.latency_s:g} s")
        if not 0 <= self.fail_rate <= 1:
            raise ValueError(f"fail rate: expected 0 to 1, not {self.fail_rate:g}")

    def changed(self, wanted: object) -> Faults:
        """Return these faults with the changes that a `POST /control` asks for.

        Raises:
            ValueError: it is not in that form.
        """
        if not isinstance(wanted, dict):
            raise ValueError("expected a JSON object")  # noqa: TRY004 - wrong input, not a bug
        changes: dict[str, Any] = {}
        for key, value in wanted.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            match key:
                case "status" if value is None or (number and isinstance(value, int)):
                    changes["status"] = value
                case "latencyMs" if number:
                    changes["latency_s"] = value / 1000
                case "failRate" if number:
                    changes["fail_rate"] = value
                case _:
                    raise ValueError(f"{key!r}: no such fault, or a value of another type")
        return attrs.evolve(self, **changes)

    def told(self) -> dict[str, float | None]:
        """Return the form that `POST /control` answers."""
        latency_ms = self.latency_s * 1000
        return {"status": self.status, "latencyMs": latency_ms, "failRate": self.fail_rate}


@attrs.define(eq=False)
class _Receiver:
    """The endpoints."""

    store: BatchStore
    faults: Faults
    dice: random.Random
    _thread: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), init=False)
    """One thread at a time uses the store."""

    async def batches(self, request: Request) -> Response:
        raw = await read_body(request, limit_bytes=MAX_BODY_BYTES)
        faults = self.faults
        await trio.sleep(faults.latency_s)
        if faults.status is not None:
            return Response(status_code=faults.status)
        failing = self.dice.random() < faults.fail_rate
        if failing and self.dice.random() < 0.5:
            raise HTTPException(503, "pretended fault, nothing was stored")
        encoding = request.headers.get("content-encoding", "")
        key = request.headers.get("idempotency-key", "")

        def take() -> tuple[str, bool]:
            upload = read_upload(raw, encoding=encoding, key=key)
            return upload.batch_id, self.store.put(upload)

        try:
            batch_id, new = await trio.to_thread.run_sync(take, limiter=self._thread)
        except RefusedUploadError as error:
            raise HTTPException(error.status, str(error)) from error
        except StoreError as error:
            raise HTTPException(503, str(error)) from error
        if failing:
            raise HTTPException(503, "pretended fault, though the batch was stored")
        answer = {"batchId": batch_id, "duplicate": not new}
        return json_response(answer, status=201 if new else 200)

    async def summary(self, _: Request) -> Response:
        try:
            summary = await trio.to_thread.run_sync(self.store.summary, limiter=self._thread)
        except StoreError as error:
            raise HTTPException(503, str(error)) from error
        return json_response(summary)

    async def control(self, request: Request) -> Response:
        if request.client is None or not ip_address(request.client.host).is_loopback:
            raise HTTPException(403, "faults are changed from this machine only")
        body = await read_body(request, limit_bytes=_MAX_CONTROL_BYTES)
        try:
            self.faults = self.faults.changed(orjson.loads(body))
        except ValueError as error:  # not JSON is one of them
            raise HTTPException(400, str(error)) from error
        return json_response(self.faults.told())


def receiver_app(store: BatchStore, *, faults: Faults = Faults(), seed: int = 0) -> Starlette:
    """Make the ASGI app.

    Args:
        store: where batches go; stays open as long as the app is served.
        faults: how uploads are mistreated at first.
        seed: of the dice behind `Faults.fail_rate`: the same uploads in the same order meet the same faults.
    """
    receiver = _Receiver(store=store, faults=faults, dice=random.Random(seed))  # noqa: S311 - faults, no secrets
    return Starlette(
        routes=[
            Route("/batches", receiver.batches, methods=["POST"]),
            Route("/summary", receiver.summary),
            Route("/control", receiver.control, methods=["POST"]),
        ],
        exception_handlers=error_handlers(_error),
    )


async def run_receiver(
    host: str,
    port: int,
    *,
    db: Path,
    fail_rate: float = 0.0,
    latency_s: float = 0.0,
    status: int | None = None,
) -> None:
    """Take uploads until SIGTERM or SIGINT; see `stationmaster.service.asgi.serve_until_told`.

    Raises:
        ListenError: the address is not to be had.
        StoreError: the database cannot be opened.
        ValueError: a fault is out of its range (see `Faults`).
    """
    faults = Faults(status=status, latency_s=latency_s, fail_rate=fail_rate)
    with open_store(db) as store:
        await serve_until_told(receiver_app(store, faults=faults), host=host, port=port)


def _error(error: HTTPException) -> Response:
    return json_response({"error": error.detail}, status=error.status_code, headers=error.headers)
