"""State files for tests, filled by hand: rows as the service would write them."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stationmaster.state.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def connect(path: str | Path) -> Iterator[sqlite3.Connection]:
    """Open the file as the service does."""
    connection = sqlite3.connect(path, timeout=5, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        yield connection
    finally:
        connection.close()


def make_state_file(path: Path) -> Path:
    with connect(path) as connection:
        migrate(connection)
    return path


def add_batch(
    connection: sqlite3.Connection,
    batch_id: str,
    *,
    topic: str = "telemetry",
    ranges: str = '[{"partition":0,"first":1,"last":2}]',
    body: bytes = b"{}",
    kept_at: float = 1_700_000_000.0,
    attempts: int = 0,
    next_try: float = 0.0,
    last_error: str = "",
) -> None:
    connection.execute(
        "INSERT INTO outbox (batch_id, topic, ranges, body, kept_at, attempts, next_try, last_error) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (batch_id, topic, ranges, body, kept_at, attempts, next_try, last_error),
    )


def add_letter(
    connection: sqlite3.Connection,
    *,
    offset: int,
    reason: str = "invalid-json",
    detail: str = "not JSON",
    topic: str = "telemetry",
    partition: int = 0,
    timestamp_ms: int = 1_700_000_000_123,
    headers: tuple[tuple[str, str | None], ...] = (),
    value: bytes | None = b"?",
    batch_id: str = "",
    first_seen: float = 1_700_000_001.0,
) -> None:
    connection.execute(
        'INSERT INTO dead_letters (reason, detail, topic, partition, "offset", timestamp_ms, headers, value, '
        "batch_id, first_seen) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            reason,
            detail,
            topic,
            partition,
            offset,
            timestamp_ms,
            json.dumps(headers),
            value,
            batch_id,
            first_seen,
        ),
    )


@contextmanager
def open_writer(path: Path) -> Iterator[None]:
    """A second process that adds a batch and a dead letter in turns, a transaction each, some 200 a second."""
    program = """
import sys
import time
from itertools import count
from tests.state.files import add_batch, add_letter, connect
with connect(sys.argv[1]) as db:
    for number in count():
        add_batch(db, f"load-{number}", body=b'{"n":1}' * 100, next_try=1.5)
        add_letter(db, offset=1_000_000 + number, value=b"x" * 1000)
        if number == 5:
            print("writing", flush=True)
        time.sleep(0.01)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"writing\n"
            yield
            assert process.poll() is None, "the writer was disturbed"
        finally:
            process.kill()
