"""The grace: shields with a limit, and one hand on all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from stationmaster.grace import Grace

if TYPE_CHECKING:
    from trio.testing import MockClock


async def test_a_shield_holds_to_its_limit_against_every_other_cancellation(
    autojump_clock: MockClock,
) -> None:
    grace = Grace()
    with trio.move_on_after(1):
        with grace.shielded(until=3.0) as scope:
            await trio.sleep(100.0)
        assert scope.cancelled_caught
        assert trio.current_time() == 3.0
    assert not grace.begun.is_set()
    assert not grace.is_over


async def test_the_end_of_the_grace_ends_the_shields_there_are_and_those_to_come(
    autojump_clock: MockClock,
) -> None:
    grace = Grace()
    ended: list[tuple[float, float]] = []

    async def hold(until: float) -> None:
        with grace.shielded(until=until):
            await trio.sleep(100.0)
        ended.append((until, trio.current_time()))

    async with trio.open_nursery() as nursery:
        for until in (2.0, 9.0):
            nursery.start_soon(hold, until)
        await trio.sleep(1)
        grace.draw_in(5.0)
        grace.draw_in(7.0)  # the earliest counts
        assert grace.begun.is_set()
        nursery.start_soon(hold, 8.0)
        await trio.sleep(3.9)
        was_over = grace.is_over
    assert sorted(ended) == [(2.0, 2.0), (8.0, 5.0), (9.0, 5.0)]
    assert (was_over, grace.is_over) == (False, True)
    grace.draw_in(4.0)
    with grace.shielded() as scope:
        await trio.sleep(100.0)
    assert scope.deadline == 4.0


async def test_a_shield_that_ended_is_forgotten(autojump_clock: MockClock) -> None:
    grace = Grace()
    with grace.shielded():
        await trio.lowlevel.checkpoint()
        assert len(grace._shields) == 1
    assert not grace._shields
