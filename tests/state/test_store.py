# ruff: noqa: ASYNC230, ASYNC240 - small files on a local disk
from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import sqlite3
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.abc import TryAgain
from stationmaster.batch import DeadLetter, OffsetRange
from stationmaster.errors import ConfigError, StoreError
from stationmaster.events import StateMovedAside
from stationmaster.state import open_outbox, open_state, schema
from stationmaster.state.inspection import is_in_use
from stationmaster.testing import RecordingObserver
from tests.state.files import make_state_file
from tests.state.targets import Target
from tests.uploads import report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stationmaster.state import State


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


async def put(state: State, batch_id: str, *, size: int = 1000) -> None:
    await state.outbox.put(
        batch_id,
        topic="air",
        ranges=[OffsetRange(topic="air", partition=0, first=5, last=6)],
        body=b"x" * size,
        kept_at=time.time() - 100,
        reason="500",
    )


def letter(offset: int, **changes: Any) -> DeadLetter:
    plain: dict[str, Any] = {"reason": "not-json", "detail": "é" * 10, "value": b"x" * 100}
    return DeadLetter(topic="air", partition=0, offset=offset, **(plain | changes))


def query(path: Path, sql: str) -> list[Any]:
    """Do what another process does."""
    with closing(sqlite3.connect(path)) as db, db:
        return db.execute(sql).fetchall()


async def faults_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        async with open_state(path):
            pytest.fail("it opened")
    [fault] = caught.value.faults
    assert fault.startswith("outbox.path: ")
    assert str(path) in fault or str(path.parent) in fault
    return fault


# ------------------------------------------------------------------------------------------------------- what it keeps


async def test_what_was_kept_is_there_after_a_restart(path: Path) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
        await put(state, "b2", size=500)
        await state.outbox.postpone("b1", until=time.time() + 9, reason="503 \ud800 " + "y" * 9999)
        await state.dead_letters.keep([letter(1), letter(2, headers=(("k", b"v"),))])
        before = state.statistics()
    async with open_state(path) as state:
        after = state.statistics()
        assert (after.outbox.rows, after.outbox.bytes) == (2, 1500)
        assert (after.dead_letters.rows, after.dead_letters.bytes) == (
            before.dead_letters.rows,
            before.dead_letters.bytes,
        )
        assert state.outbox.holds("b1")
        assert 100 <= after.outbox.oldest_age_s < 200
        assert 0 <= after.dead_letters.oldest_age_s < 100
    [(words, attempts)] = query(
        path, "SELECT last_error, attempts FROM outbox WHERE batch_id = 'b1'"
    )
    assert words.startswith("503 \\ud800 yyy")
    assert (len(words), attempts) == (2048, 1)


async def test_an_empty_state_has_no_age(path: Path) -> None:
    async with open_state(path, outbox_max_bytes=7, dead_letters_max_bytes=8) as state:
        statistics = state.statistics()
        assert (statistics.outbox.rows, statistics.outbox.oldest_age_s) == (0, 0.0)
        assert (statistics.outbox.max_bytes, statistics.dead_letters.max_bytes) == (7, 8)
        await put(state, "b1")
        await state.outbox.delete("b1")
        assert state.statistics().outbox.oldest_age_s == 0.0


async def test_the_bytes_that_count_are_the_same_after_a_restart(path: Path) -> None:
    letters = [
        letter(1, value=None),
        letter(2, detail="z" * 5000, headers=(("é\ud800", None), ("k", b"\xff"))),
    ]
    async with open_state(path) as state:
        await state.dead_letters.keep(letters)
        before = state.statistics().dead_letters.bytes
    async with open_state(path) as state:
        assert state.statistics().dead_letters.bytes == before
    [(detail,)] = query(path, 'SELECT detail FROM dead_letters WHERE "offset" = 2')
    assert detail == "z" * 2048


async def test_cancellation_waits_for_work_that_began(path: Path) -> None:
    began, goes_on, done = trio.Event(), threading.Event(), []

    def work(connection: sqlite3.Connection) -> str:
        trio.from_thread.run_sync(began.set)
        assert goes_on.wait(10)
        return "done"

    async with open_state(path) as state:

        async def write() -> None:
            done.append(await state.outbox._database.run(work))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await began.wait()
            nursery.cancel_scope.cancel()
            goes_on.set()
    assert done == ["done"]


async def test_a_closed_state_says_so(path: Path) -> None:
    async with open_state(path) as state:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await put(state, "b1")


# ----------------------------------------------------------------------------------------------- the other process


async def test_what_another_process_changes_is_noticed(path: Path) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
        await state.outbox.postpone("b1", until=time.time() + 1000, reason="500")
        await state.dead_letters.keep([letter(1)])
        assert not await state.outbox.refresh()
        query(path, "UPDATE outbox SET next_try = 0")
        query(path, "DELETE FROM dead_letters")
        assert state.statistics().dead_letters.rows == 1
        assert await state.outbox.refresh()
        assert state.statistics().dead_letters.rows == 0
        assert not await state.outbox.refresh()
        [row] = await state.outbox.due(time.time(), latest=time.time() + 30, limit=9)
        assert row.batch_id == "b1"


async def test_a_batch_that_another_process_puts_back_is_held(path: Path) -> None:
    async with open_state(path) as state:
        query(
            path,
            "INSERT INTO outbox (batch_id, topic, ranges, body, kept_at)"
            " VALUES ('b9', 'air', '[]', x'00', 5.0)",
        )
        await put(state, "b9")
        assert await state.outbox.body("b9") == b"\x00"
        assert state.statistics().outbox.bytes == 1


async def test_a_retry_by_the_command_line_is_delivered_at_once(path: Path) -> None:
    target = Target()
    with trio.fail_after(20):
        async with (
            open_state(path) as state,
            open_outbox(
                state.outbox, send=target.send, dead_letters=state.dead_letters, failures=1
            ) as outbox,
        ):
            outbox.note(TryAgain(reason="503", retry_after_s=30.0))
            await outbox.put(report("b1"), reason="down")
            query(path, "UPDATE outbox SET next_try = 0")
            await target.accepted.wait_value(1)


HUGE = 2**63 - 1


@pytest.mark.parametrize(
    "ranges",
    [
        "",
        "{",
        "null",
        "7",
        "[[0, 5, 6]]",
        '["x"]',
        '[{"partition": null, "first": "5"}]',
        '[{"partition": 0}]',
        '[{"partition": 0, "first": 1e400}]',
        f'[{{"partition": 0, "first": {HUGE + 1}}}]',
        "[" * 2000,
    ],
)
async def test_a_row_whose_ranges_nobody_understands_is_sent_all_the_same(
    path: Path, ranges: str
) -> None:
    """The body is whole: what is lost is where it came from. It holds up no other, and does not end the service."""
    target = Target()
    async with open_state(path) as state:
        await put(state, "b1")
        await put(state, "b2")
        query(path, f"UPDATE outbox SET ranges = '{ranges}' WHERE batch_id = 'b1'")
        (first, second) = await state.outbox.due(time.time(), latest=2e9, limit=9)
        assert (first.partition, first.offset) == (-1, -1)
        assert (second.partition, second.offset) == (0, 5)
        async with open_outbox(state.outbox, send=target.send, dead_letters=state.dead_letters):
            with trio.fail_after(10):
                await target.accepted.wait_value(2)


async def test_a_row_that_claims_any_number_of_attempts_can_fail_again(path: Path) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
        query(path, f"UPDATE outbox SET attempts = {HUGE}")
        await state.outbox.postpone("b1", until=5.0, reason="500")
        (row,) = await state.outbox.due(time.time(), latest=2e9, limit=9)
        assert row.attempts > 1_000


async def test_a_writer_that_holds_the_file_for_too_long_is_an_error_and_passes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationmaster.state.opening._BUSY_S", 0.05)
    async with open_state(path) as state:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="locked") as caught:
                await put(state, "b1")
            assert caught.value.kind == "disk-error"
            other.execute("ROLLBACK")
        await put(state, "b1")


# ------------------------------------------------------------------------------------------------------------- opening


async def test_a_missing_folder_is_a_fault(tmp_path: Path) -> None:
    assert "does not exist" in await faults_of(tmp_path / "nowhere" / "state.sqlite")


async def test_a_folder_in_the_place_of_the_file_is_a_fault(path: Path) -> None:
    path.mkdir()
    assert "is not a file" in await faults_of(path)


async def test_a_folder_in_the_place_of_the_lock_is_a_fault(path: Path) -> None:
    path.with_name("state.sqlite.lock").mkdir()
    assert "cannot be opened" in await faults_of(path)


async def test_a_second_one_in_this_process_is_a_fault(path: Path) -> None:
    async with open_state(path):
        assert f"in use by process {os.getpid()}" in await faults_of(path)
    async with open_state(path):
        pass


async def test_a_file_of_a_newer_version_is_a_fault_and_stays_as_it_is(path: Path) -> None:
    query(path, "CREATE TABLE future (x)")
    query(path, "PRAGMA user_version = 99")
    before = path.read_bytes()
    assert "newer stationmaster (state version 99" in await faults_of(path)
    assert path.read_bytes() == before


async def test_a_database_of_another_program_is_a_fault_and_stays_as_it_is(path: Path) -> None:
    query(path, "CREATE TABLE photographs (x)")
    before = path.read_bytes()
    assert "another program" in await faults_of(path)
    assert path.read_bytes() == before


async def test_an_older_file_is_brought_up_to_date_with_what_it_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
    more = (*schema.MIGRATIONS, "ALTER TABLE outbox ADD COLUMN colour TEXT NOT NULL DEFAULT 'red';")
    monkeypatch.setattr(schema, "MIGRATIONS", more)
    monkeypatch.setattr(schema, "VERSION", len(more))
    async with open_state(path) as state:
        assert state.outbox.holds("b1")
    assert query(path, "SELECT batch_id, colour FROM outbox") == [("b1", "red")]
    assert query(path, "PRAGMA user_version") == [(len(more),)]


async def test_a_migration_that_fails_half_way_leaves_the_older_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
    with monkeypatch.context() as patch:
        half = "ALTER TABLE outbox ADD COLUMN colour TEXT; INSERT INTO nowhere VALUES (1);"
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, half))
        patch.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            async with open_state(path):
                pytest.fail("it opened")
    assert query(path, "PRAGMA user_version") == [(schema.VERSION,)]
    async with open_state(path) as state:
        assert state.outbox.holds("b1")
        await put(state, "b2")


async def test_a_file_that_tells_dead_letters_apart_by_their_place_alone_goes_on_to(
    path: Path,
) -> None:
    constraint = 'value BLOB, UNIQUE (topic, partition, "offset", timestamp_ms, batch_id)'
    with closing(sqlite3.connect(path)) as db:
        older = re.sub(r"value BLOB +--[^\n]*", constraint, schema.MIGRATIONS[0])
        assert constraint in older
        db.executescript(f"{older} PRAGMA user_version = 1;")
    async with open_state(path) as state:
        await state.dead_letters.keep([letter(1, value=b"{old")])
        await state.dead_letters.keep([letter(1, value=b"{new"), letter(2, value=b"{new")])
        assert state.statistics().dead_letters.rows == 2
    assert query(path, 'SELECT "offset", value FROM dead_letters ORDER BY seq') == [
        (1, b"{old"),
        (2, b"{new"),
    ]


# -------------------------------------------------------------------------------------------------------------- damage


async def moved_aside(path: Path) -> StateMovedAside:
    observer = RecordingObserver()
    async with open_state(path, observer=observer) as state:
        assert len(state.outbox) == 0
        await put(state, "new")
    [moved] = observer.of(StateMovedAside)
    assert moved.path == str(path)
    assert moved.moved_to.startswith(f"{path}.corrupt-2")
    return moved


async def test_a_file_that_never_was_ours_is_a_fault_and_stays_as_it_is(path: Path) -> None:
    path.write_bytes(b"[source]\nkind = 'kafka'\n" * 100)
    before = path.read_bytes()
    assert "is no state file" in await faults_of(path)
    assert path.read_bytes() == before


async def test_a_file_of_ours_that_is_no_database_any_more_is_moved_aside_whole(
    path: Path,
) -> None:
    async with open_state(path):
        pass
    path.write_bytes(b"these are not the rows you are looking for " * 1000)
    before = path.read_bytes()
    moved = await moved_aside(path)
    assert "not a database" in moved.reason
    with open(moved.moved_to, "rb") as aside:
        assert aside.read() == before
    async with open_state(path) as state:
        assert state.outbox.holds("new")


async def test_a_damaged_page_is_found_when_opening_and_the_log_goes_with_its_file(
    path: Path,
) -> None:
    log = path.with_name("state.sqlite-wal")
    async with open_state(path) as state:
        for number in range(200):
            await put(state, f"b{number}")
        query(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        await put(state, "last")
        last = log.read_bytes()
        content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 30] = b"\xa5" * (4096 * 27)
    path.write_bytes(content)
    log.write_bytes(last)
    moved = await moved_aside(path)
    with open(moved.moved_to, "rb") as aside, open(moved.moved_to + "-wal", "rb") as aside_log:
        assert aside.read() == bytes(content)
        assert aside_log.read() == last


NO_TEXT = "CAST(x'62ff31' AS TEXT)"
"""A bit that flipped: SQLite's own check looks at its pages, not at what stands in them."""


@pytest.mark.parametrize("column", ["batch_id", "topic", "ranges", "last_error"])
async def test_text_of_the_outbox_that_is_none_is_damage_and_found_when_opening(
    path: Path, column: str
) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
    query(path, f"UPDATE outbox SET {column} = {NO_TEXT}")
    assert "UTF-8" in (await moved_aside(path)).reason


async def test_text_of_a_dead_letter_that_is_none_is_damage_and_found_when_opening(
    path: Path,
) -> None:
    async with open_state(path) as state:
        await state.dead_letters.keep([letter(1)])
    query(path, f"UPDATE dead_letters SET headers = {NO_TEXT}")
    assert "UTF-8" in (await moved_aside(path)).reason


async def test_text_that_is_none_is_an_error_of_the_disk_while_running(path: Path) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
        query(path, f"UPDATE outbox SET topic = {NO_TEXT}")
        with pytest.raises(StoreError, match="is damaged") as caught:
            await state.outbox.due(time.time(), latest=2e9, limit=9)
        assert caught.value.kind == "disk-error"


async def test_a_log_without_its_file_is_moved_aside_not_deleted(path: Path) -> None:
    log = path.with_name("state.sqlite-wal")
    log.write_bytes(b"rows that were committed")
    moved = await moved_aside(path)
    with open(moved.moved_to + "-wal", "rb") as aside:
        assert aside.read() == b"rows that were committed"


async def test_damage_that_is_met_while_running_is_an_error_and_sound_rows_can_still_be_read(
    path: Path,
) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
        await put(state, "b2", size=500_000)
    async with open_state(path) as state:
        with path.open("r+b") as file:
            file.seek(40_000)
            file.write(b"\xa5" * 4096 * 100)
        with pytest.raises(StoreError, match=r"is damaged .*\. Restart the service") as caught:
            await state.outbox.body("b2")
        assert caught.value.kind == "disk-error"
        assert await state.outbox.body("b1") == b"x" * 1000
        assert state.outbox.holds("b2")


async def test_a_log_that_was_not_carried_over_counts(path: Path) -> None:
    async with open_state(path) as state:
        await put(state, "b1")
        left = {side: path.with_name(path.name + side).read_bytes() for side in ("", "-wal")}
    for side, content in left.items():  # as a crash of the machine leaves them
        path.with_name(path.name + side).write_bytes(content)
    async with open_state(path) as state:
        assert state.outbox.holds("b1")


# ------------------------------------------------------------------------------------------------------ a failing disk


def failing(number: int) -> Any:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, "disk-error"), (errno.ENOSPC, "disk-full")]
)
@pytest.mark.parametrize("call", ["open", "pwrite"])
async def test_a_lock_that_the_disk_does_not_take_is_an_error_that_may_pass(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: str
) -> None:
    monkeypatch.setattr(f"stationmaster.state.lock.os.{call}", failing(number))
    with pytest.raises(StoreError) as caught:
        async with open_state(path):
            pytest.fail("it opened")
    assert caught.value.kind == kind


async def test_a_reserve_that_the_disk_does_not_take_is_an_error_that_may_pass(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("stationmaster.state.reserve.os.posix_fallocate", failing(errno.ENOSPC))
        async with open_state(path) as state:
            patch.setattr("stationmaster.state.reserve.os.posix_fallocate", failing(errno.EIO))
            with pytest.raises(StoreError) as caught:
                await put(state, "b1")
            assert caught.value.kind == "disk-error"
            patch.undo()
            await put(state, "b1")


async def test_a_file_that_may_not_be_read_is_a_fault(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationmaster.state.opening.Path.exists", failing(errno.EACCES))
    assert "cannot be opened" in await faults_of(path)


async def test_a_file_that_may_only_be_read_is_a_fault(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA query_only = 1")
        connection.execute("CREATE TABLE t (x)")

    monkeypatch.setattr(schema, "migrate", refuse)
    assert "write permission" in await faults_of(path)


@contextmanager
def handles(left: int) -> Iterator[None]:
    """Let this process open only so many more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(left + 1)]
        for each in opened:
            stack.callback(os.close, each)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[left], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("left", [0, 1, 2, 3])
async def test_a_lack_of_file_handles_is_named_and_not_taken_for_one_of_permissions(
    path: Path, left: int
) -> None:
    await trio.to_thread.run_sync(
        time.monotonic
    )  # its thread is there, and needs no handle any more
    with handles(left):
        faults = await faults_of(path)
    assert "raise LimitNOFILE" in faults
    assert "permission" not in faults


async def test_a_file_that_another_process_holds_for_itself_is_an_error_that_may_pass(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationmaster.state.opening._BUSY_S", 0.05)
    async with open_state(path):
        pass
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("DELETE FROM outbox")
        with pytest.raises(StoreError, match="locked"):
            async with open_state(path):
                pytest.fail("it opened")
    async with open_state(path):
        pass


async def test_a_commit_that_came_through_although_it_failed_counts(path: Path) -> None:
    def commit_and_fail(connection: sqlite3.Connection) -> None:
        connection.execute(
            "INSERT INTO outbox (batch_id, topic, ranges, body, kept_at)"
            " VALUES ('b1', 'air', '[]', x'00', 5.0)"
        )
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        raise error

    async with open_state(path) as state:
        with pytest.raises(StoreError):
            await state.outbox._database.run(commit_and_fail)
        await put(state, "b1")
        assert await state.outbox.body("b1") == b"\x00"
        assert (state.statistics().outbox.rows, state.statistics().outbox.bytes) == (1, 1)
        assert not await state.outbox.refresh(), "nobody else wrote"


async def test_somebody_who_asks_whether_a_service_runs_does_not_keep_one_from_starting(
    path: Path,
) -> None:
    make_state_file(path)
    with path.with_name(f"{path.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        timer = threading.Timer(0.1, lock.close)
        timer.start()
        async with open_state(path):
            assert is_in_use(path)
        timer.join()
    assert not is_in_use(path)


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
async def test_nothing_is_added_to_a_file_that_is_not_there_any_more(
    path: Path, replaced: bool
) -> None:
    async with open_state(path) as state:
        await put(state, "before")
        aside = path.rename(path.with_name("aside"))
        if replaced:
            make_state_file(path)
        with pytest.raises(StoreError, match="removed or replaced") as caught:
            await put(state, "after")
        assert caught.value.kind == "disk-error"
        if not replaced:
            aside.rename(path)
            await put(state, "back")
            assert state.statistics().outbox.rows == 2


async def test_the_state_file_is_its_owners_alone(path: Path) -> None:
    async with open_state(path) as state:
        await put(state, "a batch")
        names = ["", "-wal", "-shm", ".lock", ".reserve"]
        modes = {name: Path(f"{path}{name}").stat().st_mode & 0o777 for name in names}
    assert modes == dict.fromkeys(names, 0o600)
