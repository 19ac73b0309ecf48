"""What surrounds a replay in tests on a virtual clock."""

from __future__ import annotations

from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, Any

import attrs
import trio

from stationmaster.reports import encode_report
from stationmaster.state import Replay, open_outbox
from stationmaster.testing import MemoryDeadLetters, MemoryOutboxRows, RecordingObserver
from tests.state.targets import Target
from tests.uploads import report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EPOCH = 1_700_000_000.0


@attrs.define(eq=False)
class Setting:
    """An outbox in memory between a target and dead letters, on trio's (virtual) clock."""

    target: Target = attrs.field(factory=Target)
    rows: MemoryOutboxRows = attrs.field(factory=MemoryOutboxRows)
    dead_letters: MemoryDeadLetters = attrs.field(factory=MemoryDeadLetters)
    observer: RecordingObserver = attrs.field(factory=RecordingObserver)
    jump_s: float = 0.0
    """By how much the wall clock was put forward or back."""

    def wall(self) -> float:
        return EPOCH + trio.current_time() + self.jump_s

    async def lay(self, *batch_ids: str) -> None:
        """Let batches lie there from before."""
        for batch_id in batch_ids:
            await self.rows.put(
                batch_id,
                topic="air",
                ranges=report().batch.ranges,
                body=encode_report(report(batch_id)),
                kept_at=self.wall(),
                reason="500",
            )

    @asynccontextmanager
    async def open(self, **settings: Any) -> AsyncIterator[Replay]:
        async with open_outbox(
            self.rows,
            send=self.target.send,
            dead_letters=self.dead_letters,
            observer=self.observer,
            clock=self.wall,
            jitter=Random(7),
            **settings,
        ) as outbox:
            yield outbox


def ids(count: int) -> list[str]:
    return [f"b{number:04}" for number in range(count)]
