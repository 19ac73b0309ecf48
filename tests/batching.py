"""What the tests of the batcher share: callers that write down what they got, and when."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.errors import StationmasterError
from stationmaster.events import CallStarted
from stationmaster.testing import RecordingObserver, ScriptedEmbedder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@attrs.define(eq=False)
class Bench:
    """An open batcher, what stands behind it, and callers around it."""

    batcher: Batcher
    embedder: ScriptedEmbedder
    observer: RecordingObserver
    nursery: trio.Nursery
    got: dict[str, Any] = attrs.field(factory=dict)
    """What each text got: its vector or a typed error."""
    at: dict[str, float] = attrs.field(factory=dict)
    """When."""

    async def ask(self, text: str, **options: Any) -> None:
        """Be a caller."""
        try:
            self.got[text] = await self.batcher.embed(text, **options)
        except StationmasterError as error:
            self.got[text] = error
        self.at[text] = trio.current_time()

    async def submit(self, *texts: str, **options: Any) -> None:
        """Let callers ask for these, in this order, at this instant."""
        for text in texts:
            self.nursery.start_soon(partial(self.ask, text, **options))
            await wait_all_tasks_blocked()

    def right(self, *texts: str) -> bool:
        """Say whether these got their own vectors."""
        return all(self.got.get(text) == self.embedder.vector(text) for text in texts)

    def sent(self) -> list[tuple[float, int]]:
        """Return when calls began, and with how many rows."""
        return [
            (round(instant, 6), len(texts))
            for instant, texts in zip(self.embedder.began, self.embedder.calls, strict=True)
        ]

    def reasons(self) -> list[str]:
        """Return why calls were made."""
        return [event.reason for event in self.observer.of(CallStarted)]


@asynccontextmanager
async def bench(embedder: ScriptedEmbedder | None = None, **policy: Any) -> AsyncIterator[Bench]:
    """Open a batcher with callers around it; leaving waits for the callers first."""
    embedder = embedder or ScriptedEmbedder()
    observer = RecordingObserver(
        detailed=policy.pop("detailed", True)
    )  # if detailed, no caller is quick
    count_tokens = policy.pop("count_tokens", None)
    async with open_batcher(
        embedder,
        policy=policy.pop("policy", None) or BatchPolicy(**policy),
        observer=observer,
        count_tokens=count_tokens,
    ) as batcher:
        async with trio.open_nursery() as nursery:
            yield Bench(batcher, embedder, observer, nursery)
    left = batcher.statistics()
    assert left.queued_rows == left.queued_bytes == left.queued_tokens == 0
    assert left.rows_in_flight == left.calls_in_flight == left.busy_senders == 0


def texts(count: int, prefix: str = "t") -> list[str]:
    """Return different texts."""
    return [f"{prefix}{number}" for number in range(count)]
