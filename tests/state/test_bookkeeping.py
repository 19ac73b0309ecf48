# ruff: noqa: ASYNC240 - small files on a local disk
"""What the tables of the state file remember of it, and how the file is left."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batch import DeadLetter
from stationmaster.errors import ConfigError, StoreError
from stationmaster.state import open_state
from stationmaster.state.bounds import Tally

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


def letter(offset: int) -> DeadLetter:
    return DeadLetter(
        topic="air", partition=0, offset=offset, reason="not-json", detail="no", value=b"x"
    )


def query(path: Path, sql: str) -> list[Any]:
    """Do what another process does."""
    with closing(sqlite3.connect(path)) as db, db:
        return db.execute(sql).fetchall()


async def test_the_age_of_letters_is_that_of_the_oldest_in_this_life_and_the_next(
    path: Path,
) -> None:
    before = time.time()
    async with open_state(path) as state:
        await state.dead_letters.keep([])
        assert state.dead_letters.tally == Tally()
        await state.dead_letters.keep([letter(1)])
        first = state.dead_letters.tally.oldest_at or 0.0
        assert before <= first <= time.time()
        await state.dead_letters.keep([letter(2)])
        assert state.dead_letters.tally.oldest_at == first
    query(path, 'UPDATE dead_letters SET first_seen = first_seen - 100 WHERE "offset" = 1')
    async with open_state(path) as state:
        assert state.dead_letters.tally.oldest_at == pytest.approx(first - 100)
        assert state.statistics().dead_letters.oldest_age_s >= 100


async def test_a_full_store_says_which_it_is(path: Path) -> None:
    async with open_state(path, outbox_max_bytes=1, dead_letters_max_bytes=1) as state:
        put = partial(state.outbox.put, topic="air", ranges=[], kept_at=1.0, reason="500")
        await state.dead_letters.keep([letter(1)])
        with pytest.raises(StoreError, match=r"^the dead-letter store is full: 1 rows, "):
            await state.dead_letters.keep([letter(2)])
        await put("b1", body=b"xx")
        with pytest.raises(StoreError) as caught:
            await put("b2", body=b"yyy")
    assert str(caught.value) == "the outbox is full: 1 rows, 2 of 1 bytes, 3 more do not fit"
    assert caught.value.kind == "full"


async def test_a_service_that_is_cancelled_closes_its_file_all_the_same(path: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_state(path) as state:
            await state.dead_letters.keep([letter(1)])
            assert path.with_name("state.sqlite-wal").exists()
            scope.cancel()
            await trio.sleep_forever()
    # SQLite carries the log over and removes it when the last connection is closed.
    assert not path.with_name("state.sqlite-wal").exists()
    assert query(path, "SELECT count(*) FROM dead_letters") == [(1,)]


async def test_a_file_that_another_process_holds_for_a_moment_is_waited_for(path: Path) -> None:
    async with open_state(path):
        pass
    held, opening = threading.Event(), threading.Event()

    def hold() -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("DELETE FROM outbox")
            held.set()
            opening.wait(10)
            time.sleep(0.2)  # the one who opens has met the lock: SQLite has no word for that

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, hold)
        await trio.to_thread.run_sync(held.wait, 10)
        opening.set()
        async with open_state(path) as state:
            assert state.statistics().outbox.rows == 0


async def test_there_is_one_job_at_a_time(path: Path) -> None:
    second_began, order = threading.Event(), []

    def first(connection: sqlite3.Connection) -> None:
        order.append("first")
        assert not second_began.wait(0.1)  # no sign of it, as long as this one works
        order.append("first is done")

    def second(connection: sqlite3.Connection) -> None:
        second_began.set()
        order.append("second")

    async with open_state(path) as state, trio.open_nursery() as nursery:
        nursery.start_soon(state.outbox._database.run, first)
        await wait_all_tasks_blocked()
        nursery.start_soon(state.outbox._database.run, second)
    assert order == ["first", "first is done", "second"]


@pytest.mark.parametrize(
    ("content", "holder"), [(b"", "?"), (b"\xff\n", "\ufffd"), (b" 4711\n", "4711")]
)
async def test_whoever_holds_the_lock_is_named_as_far_as_it_tells(
    path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, holder: str
) -> None:
    monkeypatch.setattr("stationmaster.state.lock.time.sleep", lambda seconds: None)
    lock_path = path.with_name("state.sqlite.lock")
    lock_path.write_bytes(content)
    with lock_path.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError) as caught:
            async with open_state(path):
                pytest.fail("it opened")
    assert caught.value.faults == (
        f"outbox.path: {path} is in use by process {holder}; give every instance a file of its own",
    )
    assert lock_path.read_bytes() == content


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "pwrite"])
async def test_a_lock_that_cannot_be_written_names_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"stationmaster.state.lock.os.{call}", fail)
    with pytest.raises((ConfigError, StoreError)) as caught:
        async with open_state(path):
            pytest.fail("it opened")
    assert str(path) in str(caught.value)
    if isinstance(caught.value, StoreError):
        is_full = number in {errno.ENOSPC, errno.EDQUOT}
        assert caught.value.kind == ("disk-full" if is_full else "disk-error")
    else:
        assert number == errno.EACCES


async def test_no_letter_is_added_to_a_file_that_is_not_there_any_more(path: Path) -> None:
    async with open_state(path) as state:
        await state.dead_letters.keep([letter(1)])
        path.unlink()
        with pytest.raises(StoreError) as caught:
            await state.dead_letters.keep([letter(2)])
    assert str(caught.value) == (
        f"{path} was removed or replaced while it was in use: what is written to it would be lost. "
        "Restart the service"
    )
    assert caught.value.kind == "disk-error"


async def test_a_file_that_may_not_be_looked_at_is_a_fault_that_says_why(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, "not for you")

    monkeypatch.setattr("stationmaster.state.opening.Path.exists", fail)
    with pytest.raises(ConfigError, match=r"\(\[Errno 13\] not for you\)"):
        async with open_state(path):
            pytest.fail("it opened")


async def test_jobs_may_come_from_any_thread(path: Path) -> None:
    goes_on = threading.Event()
    async with open_state(path) as state, trio.open_nursery() as nursery:
        for offset in range(3):  # each time one more of the threads that worked here is taken
            await state.dead_letters.keep([letter(offset)])
            nursery.start_soon(trio.to_thread.run_sync, goes_on.wait, 10)
            await wait_all_tasks_blocked()
        assert state.statistics().dead_letters.rows == 3
        goes_on.set()


async def test_to_delete_what_is_gone_changes_no_count(path: Path) -> None:
    async with open_state(path) as state:
        await state.outbox.put("b1", topic="air", ranges=[], body=b"xyz", kept_at=1.0, reason="500")
        await state.outbox.delete("b2")
        assert state.outbox.tally == Tally(rows=1, bytes=3, oldest_at=1.0)
