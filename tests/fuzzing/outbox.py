"""The state file with rows that somebody else wrote: every one is delivered, rejected or made a dead letter.

A row that cannot be understood must not hold up the others, and must not end the service.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import zlib
from collections import Counter
from contextlib import closing
from math import inf
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

import attrs
import orjson
import trio
from trio.testing import MockClock

from stationmaster.abc import Accepted, Rejected, TryAgain
from stationmaster.service.state_cli import _outbox_facts, _short_ranges
from stationmaster.service.state_edge import iso
from stationmaster.state import open_outbox, open_state
from stationmaster.state.inspection import open_state_file
from stationmaster.state.rows import Move
from stationmaster.testing import RecordingObserver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stationmaster.abc import UploadAnswer

CHUNK: Final = 100
"""Rows of one state file."""

_EPOCH: Final = 1_700_000_000.0
_LARGEST: Final = 2**63 - 1
_TIMES: Final = (0.0, _EPOCH, 1e300, -1e300, inf, -inf, 5e-324)
_ATTEMPTS: Final = (0, 1, 40, -1, 2**53, _LARGEST - 1, _LARGEST, -_LARGEST)
_IDLE_S: Final = 0.002
"""Of real time, until the virtual clock jumps: threads work on the file meanwhile."""


@attrs.define(eq=False)
class _Target:
    """Takes, rejects, or takes at the second attempt; which, hangs on the batch."""

    answered: Counter[str] = attrs.field(factory=Counter)
    """Batch id -> how often it was taken or rejected."""
    _tried: set[str] = attrs.field(factory=set)

    async def send(self, batch_id: str, body: bytes) -> UploadAnswer:
        await trio.lowlevel.checkpoint()
        fate = zlib.crc32(batch_id.encode()) % 4
        if fate == 0 and batch_id not in self._tried:
            self._tried.add(batch_id)
            return TryAgain(reason="busy")
        self.answered[batch_id] += 1
        return Rejected(status=422, answer="no") if fate == 1 else Accepted()


def run_outbox(inputs: Sequence[bytes]) -> Counter[str]:
    """Write a row of each input, beside the service; let the service deliver them; requeue what was rejected."""
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        return trio.run(
            _deliver, Path(folder) / "state.db", inputs, clock=MockClock(autojump_threshold=_IDLE_S)
        )


def _memory_folder() -> str | None:
    """Return a folder in memory, if there is one: what is durable is not the question here."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


async def _deliver(path: Path, inputs: Sequence[bytes]) -> Counter[str]:
    target, observer = _Target(), RecordingObserver()
    async with open_state(path) as state:
        batch_ids = _write_rows(path, inputs)
        _look(path)
        async with open_outbox(
            state.outbox,
            send=target.send,
            dead_letters=state.dead_letters,
            observer=observer,
            clock=lambda: _EPOCH + trio.current_time(),
            jitter=Random(7),
        ) as replay:
            while not (target.answered.keys() >= batch_ids and not len(state.outbox)):
                await replay.wait_change()
            assert target.answered == Counter(batch_ids)
            rejected, stayed = _requeue(path)
            # A second time: what was rejected and requeued is sent again, and rejected again.
            while target.answered.total() < len(batch_ids) + rejected or len(state.outbox):
                await replay.wait_change()
        assert state.statistics().dead_letters.rows == rejected + stayed
        return Counter(accepted=len(batch_ids) - rejected, rejected=rejected)


def _write_rows(path: Path, inputs: Sequence[bytes]) -> set[str]:
    """Write rows as another program could; return the ids of those that SQLite took."""
    insert = (
        "INSERT OR IGNORE INTO outbox (batch_id, topic, ranges, kept_at, attempts, next_try, last_error, body)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    )
    taken: set[str] = set()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        for number, data in enumerate(inputs):
            hostile = zlib.crc32(data)
            ranges, batch_id, topic, error, body = (
                *(part.decode(errors="replace") for part in data.split(b"\0", 3)),
                *[""] * 4,
                "",
            )[:5]
            if number % 4:  # else it may be the id of another, or empty
                batch_id += f"#{number}"
            row = (
                batch_id,
                topic,
                ranges,
                _TIMES[hostile % len(_TIMES)],
                _ATTEMPTS[hostile // 16 % len(_ATTEMPTS)],
                _TIMES[hostile // 256 % len(_TIMES)],
                error,
                body.encode() or ranges.encode(),  # as an upload says where it is from
            )
            if connection.execute(insert, row).rowcount:
                taken.add(batch_id)
        connection.execute("COMMIT")
    return taken


def _look(path: Path) -> None:
    """See the outbox as an operator does, in a table and as JSON Lines."""
    with open_state_file(path) as state:
        for row in state.outbox():
            assert len(state.body(row.seq)) == row.body_bytes
            _short_ranges(row.ranges)
            facts = {**_outbox_facts(row), "keptAt": iso(row.kept_at)}
            assert json.loads(orjson.dumps(facts))["batchId"] == row.batch_id


def _requeue(path: Path) -> tuple[int, int]:
    """Look at everything as an operator does, and put what was rejected back into the outbox.

    Returns:
        How many dead letters went there, and how many stayed: without an id it is no upload's.
    """
    with open_state_file(path, writable=True) as state:
        assert list(state.outbox()) == []
        letters = list(state.letters())
        moves = [state.move_to_outbox(letter.seq, max_bytes=10**9) for letter in letters]
        assert set(moves) <= {Move.DONE, Move.GONE}
        for row in state.outbox():
            state.body(row.seq)
        state.summarize_outbox()
        state.retry_all()
    return moves.count(Move.DONE), moves.count(Move.GONE)
