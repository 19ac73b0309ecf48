"""A disk that is really full: a small file system in memory."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import trio

from stationmaster.batch import DeadLetter
from stationmaster.errors import StoreError
from stationmaster.events import StoreBlocked
from stationmaster.state import open_outbox, open_state
from stationmaster.state.reserve import RESERVE_BYTES
from stationmaster.testing import RecordingObserver
from tests.state.targets import Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stationmaster.state import State

DISK_BYTES = 16 * 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(tmp_path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
        words = done.stderr
    except FileNotFoundError as error:
        words = str(error)
    if words:
        if os.environ.get("STATIONMASTER_REQUIRE_BROKER") == "1":
            pytest.fail(f"a small file system cannot be mounted: {words}")
        pytest.skip(f"a small file system cannot be mounted: {words}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], timeout=20, check=True)


async def put(state: State, batch_id: str, *, size: int) -> None:
    await state.outbox.put(
        batch_id,
        topic="air",
        ranges=[],
        body=os.urandom(16) * (size // 16),
        kept_at=time.time(),
        reason="500",
    )


async def put_until_full(state: State, *, size: int, prefix: str = "b") -> list[str]:
    """Put rows until the disk is full, and return those that were taken."""
    taken: list[str] = []
    with pytest.raises(StoreError) as caught:  # noqa: PT012 - the last one raises
        while True:
            batch_id = f"{prefix}{len(taken)}"
            await put(state, batch_id, size=size)
            taken.append(batch_id)
    assert caught.value.kind == "disk-full"
    assert "Make room" in str(caught.value)
    return taken


def fill(disk: Path) -> Path:
    """Let somebody else use up the rest of the disk."""
    junk = disk / "junk"
    descriptor = os.open(junk, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(descriptor, b"j" * 4096)
    except OSError:
        os.close(descriptor)
    return junk


def sound(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as db:
        return bool(db.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


@pytest.mark.parametrize("size", [2_000, 100_000, 1_500_000])
async def test_a_full_disk_refuses_rows_and_keeps_those_it_took(disk: Path, size: int) -> None:
    path = disk / "state.sqlite"
    async with open_state(path) as state:
        taken = await put_until_full(state, size=size)
        assert len(state.outbox) == len(taken) >= 3
        # But for the reserve it uses the disk up: the log gives back what it does not need.
        assert len(taken) * size >= 0.9 * (DISK_BYTES - RESERVE_BYTES) - size
        junk = fill(disk)
        for attempt in range(3):
            with pytest.raises(StoreError):
                await put(state, f"more{attempt}", size=size)
        junk.unlink()
    async with open_state(path) as state:
        assert all(state.outbox.holds(batch_id) for batch_id in taken)
        assert len(state.outbox) == len(taken)
    assert sound(path)


@pytest.mark.parametrize("size", [2_000, 100_000, 1_500_000])
async def test_an_outbox_that_filled_the_disk_can_be_emptied_and_used_again(
    disk: Path, size: int
) -> None:
    path = disk / "state.sqlite"
    async with open_state(path) as state:
        taken = await put_until_full(state, size=size)
        fill(disk)
        for batch_id in taken:
            await state.outbox.postpone(batch_id, until=1.0, reason="503")
        for batch_id in taken:
            await state.outbox.delete(batch_id)
        assert len(state.outbox) == 0
        again = await put_until_full(state, size=size, prefix="again")
        assert len(again) >= len(taken) * 0.9
    assert sound(path)


async def test_a_full_disk_can_be_drained_after_a_restart(disk: Path) -> None:
    path = disk / "state.sqlite"
    async with open_state(path) as state:
        taken = await put_until_full(state, size=100_000)
    fill(disk)
    target = Target()
    with trio.fail_after(30):
        async with (
            open_state(path) as state,
            open_outbox(state.outbox, send=target.send, dead_letters=state.dead_letters) as outbox,
        ):
            await target.accepted.wait_value(len(taken))
            while len(state.outbox):
                await outbox.wait_change()
    assert sound(path)


async def test_no_letter_of_a_group_is_kept_on_a_disk_without_room_for_all(disk: Path) -> None:
    path = disk / "state.sqlite"
    letters = [
        DeadLetter(reason="r", detail="", topic="air", partition=0, offset=n, value=b"x" * 10**6)
        for n in range(20)
    ]
    async with open_state(path) as state:
        await state.dead_letters.keep(letters[:1])
        with pytest.raises(StoreError) as caught:
            await state.dead_letters.keep(letters[1:])
        assert caught.value.kind == "disk-full"
        assert state.statistics().dead_letters.rows == 1
        await state.dead_letters.keep(letters[1:2])
    with closing(sqlite3.connect(path)) as db:
        assert db.execute('SELECT "offset" FROM dead_letters').fetchall() == [(0,), (1,)]
    assert sound(path)


async def test_a_new_file_on_a_full_disk_is_an_error_and_leaves_nothing_half(disk: Path) -> None:
    path = disk / "state.sqlite"
    junk = fill(disk)
    with pytest.raises(StoreError) as caught:
        async with open_state(path):
            pytest.fail("it opened")
    assert caught.value.kind == "disk-full"
    junk.unlink()
    async with open_state(path) as state:
        await put(state, "b1", size=1000)
    assert sound(path)


async def test_nothing_is_added_before_the_reserve_is_back(disk: Path) -> None:
    path = disk / "state.sqlite"
    observer = RecordingObserver()
    junk = disk / "large"
    junk.write_bytes(b"j" * (DISK_BYTES - 4 * 1024 * 1024))
    async with open_state(path, observer=observer) as state:
        with pytest.raises(StoreError):
            await put(state, "b1", size=1000)
        junk.unlink()
        await put(state, "b1", size=1000)
    assert not observer.of(StoreBlocked), "that is said by those who wait"
