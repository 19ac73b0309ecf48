"""Many callers, some bad rows and a restart, against a server that is not ours.

Its vector is the text's length, so a mixed-up answer shows. A text of more than 122,880 characters is refused with 422,
and so is the whole call that carries it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import attrs
import trio

from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.embeddings import open_openai_embedder
from stationmaster.errors import EmbedderUnavailableError, RowRejectedError
from tests.infinity.server import MODEL, free_port, run_infinity

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 10_000
CALLERS = 500
BAD_ONE_IN = 200
LONGEST = 122_880


@attrs.define(eq=False)
class Crowd:
    """Callers that ask for texts of different lengths, each once and until there is an answer."""

    batcher: Batcher
    back: trio.Event
    """The server runs again."""
    half_done: trio.Event = attrs.field(factory=trio.Event)
    done: trio.Event = attrs.field(factory=trio.Event)
    turned_away: trio.Event = attrs.field(factory=trio.Event)
    """Somebody met a server that was gone."""
    ends: Counter[str] = attrs.field(factory=Counter)

    async def caller(self, rows: range) -> None:
        for row in rows:
            await self.ask(row)
            if self.ends.total() >= ROWS / 2:
                self.half_done.set()
        if self.ends.total() == ROWS:
            self.done.set()

    async def ask(self, row: int) -> None:
        bad = row % BAD_ONE_IN == 0
        text = "x" * (LONGEST + 1 if bad else row)
        try:
            try:
                vector = await self.batcher.embed(text)
            except EmbedderUnavailableError:
                self.turned_away.set()
                await self.back.wait()
                vector = await self.batcher.embed(text)
            assert not bad
            self.ends["right" if set(vector) == {float(row)} else "WRONG"] += 1
        except RowRejectedError:
            assert bad
            self.ends["refused"] += 1


async def test_every_caller_gets_its_own_vector_also_across_bad_rows_and_a_restart(
    infinity_program: Path,
) -> None:
    port = free_port()
    back = trio.Event()
    policy = BatchPolicy(max_queue_rows=ROWS)
    with trio.fail_after(240):
        async with (
            open_openai_embedder(f"http://127.0.0.1:{port}/v1", model=MODEL) as embedder,
            open_batcher(embedder, policy=policy) as batcher,
            trio.open_nursery() as nursery,
        ):
            crowd = Crowd(batcher, back)
            async with run_infinity(infinity_program, port):
                for first in range(CALLERS):
                    nursery.start_soon(crowd.caller, range(first + 1, ROWS + 1, CALLERS))
                await crowd.half_done.wait()
            await crowd.turned_away.wait()
            async with run_infinity(infinity_program, port):
                back.set()
                await crowd.done.wait()

    left = batcher.statistics()
    assert left.queued_rows == left.rows_in_flight == left.calls_in_flight == 0
    assert crowd.ends == {"right": ROWS - ROWS // BAD_ONE_IN, "refused": ROWS // BAD_ONE_IN}
