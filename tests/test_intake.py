"""The intake: slots, bytes, and who is woken when they change."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.intake import Intake


def test_a_slot_and_the_bytes_must_be_free() -> None:
    intake = Intake(slots=2, max_bytes=100)
    intake.enter(60)
    assert intake.has_room(40)
    assert not intake.has_room(41)
    intake.enter(40)
    assert not intake.has_room(0)
    intake.leave(60)
    assert intake.has_room(60)


def test_a_batch_beyond_the_bytes_is_taken_when_nothing_else_is_open() -> None:
    intake = Intake(slots=2, max_bytes=100)
    assert intake.has_room(10**9)
    intake.enter(10**9)
    assert not intake.has_room(0)
    intake.leave(10**9)
    assert (intake.in_flight, intake.in_flight_bytes) == (0, 0)


async def test_idle_is_when_the_last_batch_has_left() -> None:
    intake = Intake(slots=2, max_bytes=100)
    with trio.fail_after(1):
        await intake.wait_idle()
    intake.enter(1)
    intake.enter(1)
    idle = False

    async def wait() -> None:
        nonlocal idle
        await intake.wait_idle()
        idle = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        intake.leave(1)
        await wait_all_tasks_blocked()
        assert not idle
        intake.leave(1)
    assert idle


def test_a_batch_that_grows_takes_bytes_and_no_slot() -> None:
    intake = Intake(slots=1, max_bytes=100)
    intake.enter(60)
    assert intake.has_bytes(40)
    assert not intake.has_bytes(41)
    intake.grow(40)
    assert (intake.in_flight, intake.in_flight_bytes) == (1, 100)
    intake.leave(100)
    assert (intake.in_flight, intake.in_flight_bytes) == (0, 0)


async def test_a_block_until_a_change_ends_when_a_batch_leaves_or_it_is_worth_it_that_stations_are_eased() -> (
    None
):
    intake = Intake(slots=2, max_bytes=100)
    intake.enter(1)
    worth_it = False
    ends: list[str] = []

    async def wait() -> None:
        for reason in ("left", "eased"):
            with intake.until_change(lambda: worth_it):
                await trio.Event().wait()
            ends.append(reason)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        intake.leave(1)
        await wait_all_tasks_blocked()
        assert ends == ["left"]
        intake.ease()
        await wait_all_tasks_blocked()
        assert ends == ["left"]
        worth_it = True
        intake.ease()
    assert ends == ["left", "eased"]
    intake.ease()  # nobody waits any more


async def test_who_left_a_block_by_an_error_is_asked_no_more_whether_a_change_is_worth_it() -> None:
    intake = Intake(slots=2, max_bytes=100)
    asked: list[bool] = []
    with pytest.raises(ValueError, match="mine"), intake.until_change(lambda: asked.append(True)):
        raise ValueError("mine")
    intake.ease()
    assert not asked
