"""The state of one service, on one SQLite file: what must not be lost."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from stationmaster.abc import NullObserver
from stationmaster.state.dead_letters import DeadLettersTable
from stationmaster.state.opening import open_database
from stationmaster.state.outbox import OutboxTable

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator

    from stationmaster.abc import Observer
    from stationmaster.state.bounds import Tally

OUTBOX_MAX_BYTES: Final = 1024 * 1024 * 1024
DEAD_LETTERS_MAX_BYTES: Final = 256 * 1024 * 1024


@attrs.frozen(kw_only=True)
class StoreStatistics:
    """How much one of the two holds."""

    rows: int
    bytes: int
    max_bytes: int
    oldest_age_s: float
    """By the wall clock; 0 when it is empty."""


@attrs.frozen(kw_only=True)
class StateStatistics:
    """How much both hold."""

    outbox: StoreStatistics
    dead_letters: StoreStatistics


@attrs.frozen(kw_only=True, eq=False)
class State:
    """An open state file; made by `open_state`."""

    path: Path
    outbox: OutboxTable
    dead_letters: DeadLettersTable
    _outbox_max_bytes: int
    _dead_letters_max_bytes: int

    def statistics(self) -> StateStatistics:
        """Return what is known without looking at the disk.

        What the command line changes shows about a second later (`OutboxTable.refresh`).
        """
        now = time.time()
        return StateStatistics(
            outbox=_statistics(self.outbox.tally, self._outbox_max_bytes, now),
            dead_letters=_statistics(self.dead_letters.tally, self._dead_letters_max_bytes, now),
        )


def _statistics(tally: Tally, max_bytes: int, now: float) -> StoreStatistics:
    return StoreStatistics(
        rows=tally.rows,
        bytes=tally.bytes,
        max_bytes=max_bytes,
        oldest_age_s=0.0 if tally.oldest_at is None else max(0.0, now - tally.oldest_at),
    )


@asynccontextmanager
async def open_state(
    path: str | os.PathLike[str],
    *,
    outbox_max_bytes: int = OUTBOX_MAX_BYTES,
    dead_letters_max_bytes: int = DEAD_LETTERS_MAX_BYTES,
    observer: Observer | None = None,
) -> AsyncIterator[State]:
    """Open the state file, or make it. One service per file; the command line may look on.

    A damaged file is moved aside whole, and a new one begun: `StateMovedAside` says so.

    Args:
        path: in a folder that exists.
        outbox_max_bytes: for the bodies in the outbox; a single larger one is taken when it is empty.
        dead_letters_max_bytes: for values, headers and details of dead letters, likewise.
        observer: hears `StateMovedAside`.

    Raises:
        ConfigError: the folder is missing, permissions are, another service uses the file, or it is not ours: of a
            newer version, or of another program.
        StoreError: the disk is full or fails.

    Leave it last: what uses it must have ended.
    """
    file = Path(path)
    async with open_database(file, observer=observer or NullObserver()) as database:
        outbox = OutboxTable(database, outbox_max_bytes)
        dead_letters = DeadLettersTable(database, dead_letters_max_bytes)
        await database.add(outbox)
        await database.add(dead_letters)
        yield State(
            path=file,
            outbox=outbox,
            dead_letters=dead_letters,
            outbox_max_bytes=outbox_max_bytes,
            dead_letters_max_bytes=dead_letters_max_bytes,
        )
