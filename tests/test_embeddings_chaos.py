"""Endpoints under random failures, pauses and cancellations, on a virtual clock: what must hold at every step."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from stationmaster.embeddings import Endpoints
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.testing import ScriptedEmbedder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio.testing import MockClock

    from stationmaster.abc import Vector

MAX_IN_FLIGHT = 3
PROBE_S = 1.0


@attrs.define(eq=False)
class Moody:
    """An embedder with a mood for each call, which checks that nobody comes when it is to be left alone."""

    dice: Random
    honest: ScriptedEmbedder
    is_well: bool = False
    silent_until: float = -1.0
    in_flight: int = 0
    most_in_flight: int = 0

    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        assert trio.current_time() >= self.silent_until, "asked during its pause"
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await trio.sleep(self.dice.choice((0.0, 0.01, 0.1, 1.0)))
            mood = self.dice.random()
            if self.is_well or mood < 0.5:
                return await self.honest.embed(texts)
            if mood < 0.55:
                await trio.sleep_forever()
            raise self.fault()
        finally:
            self.in_flight -= 1

    def fault(self) -> Exception:
        match self.dice.randrange(7):
            case 0:
                pause_s = self.dice.choice((0.0, 0.05, 2.0))
                self.silent_until = max(self.silent_until, trio.current_time() + pause_s)
                return EmbedderBusyError("wait", retry_after_s=pause_s)
            case 1:
                return EmbedderBusyError("wait")
            case 2:
                return EmbedderRefusedError("no key")
            case 3:
                return ProtocolError("odd")
            case 4:
                return RowRejectedError("bad")
            case 5:
                return TypeError("a bug")
            case _:
                return EmbedderUnavailableError("down")


@pytest.mark.parametrize("seed", range(40))
async def test_every_call_ends_and_nothing_is_left_behind(
    seed: int, autojump_clock: MockClock
) -> None:
    dice = Random(seed)
    honest = ScriptedEmbedder(dimensions=3)
    moody = [Moody(dice, honest) for _ in range(dice.randint(1, 4))]
    endpoints = Endpoints(
        {str(number): one for number, one in enumerate(moody)},
        max_in_flight=MAX_IN_FLIGHT,
        failures=dice.randint(1, 3),
        probe_s=PROBE_S,
        jitter=dice,
    )
    ends: list[str] = []
    waits: list[float] = []

    async def call(number: int) -> None:
        await trio.sleep(dice.uniform(0, 20))
        texts = [f"{number} {row}" for row in range(dice.randint(1, 3))]
        with trio.move_on_after(dice.choice((0.0, 0.05, 0.5, 5.0))) as scope:
            try:
                vectors = await endpoints.embed(texts)
            except EmbedderBusyError as error:
                waits.append(error.retry_after_s or 0.0)
                ends.append("busy")
            except (EmbedderError, TypeError) as error:
                ends.append(type(error).__name__)
            else:
                assert list(vectors) == [honest.vector(text) for text in texts]
                ends.append("answered")
        if scope.cancelled_caught:
            ends.append("cancelled")

    async with trio.open_nursery() as nursery:
        for number in range(150):
            nursery.start_soon(partial(call, number))

    assert len(ends) == 150
    assert {"answered", "cancelled"} <= set(ends)
    assert all(0 <= wait_s <= 30.0 for wait_s in waits)
    assert all(one.in_flight == 0 and one.most_in_flight <= MAX_IN_FLIGHT for one in moody)
    await trio.sleep(60.0)
    for look in endpoints.statistics():
        assert (look.in_flight, look.abandoned) == (0, 0)
        assert look.paused_s == look.open_s == 0.0
    for one in moody:
        one.is_well = True
    assert await endpoints.embed(["a"]) == [honest.vector("a")]
