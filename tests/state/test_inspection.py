"""The state file as operators' commands see it, alone and beside a process that writes."""

from __future__ import annotations

import fcntl
import sqlite3
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest

from stationmaster.errors import ConfigError, StoreError
from stationmaster.state import inspection
from stationmaster.state.inspection import is_in_use, one_at_a_time, open_state_file
from stationmaster.state.rows import Chosen, Move, Summary
from stationmaster.state.schema import migrate
from tests.state.files import add_batch, add_letter, connect, make_state_file, open_writer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_state_file(tmp_path / "state.db")


def rows_of(path: Path, query: str) -> list[tuple[Any, ...]]:
    with connect(path) as db:
        return db.execute(query).fetchall()


# ------------------------------------------------------------------------------------------------------------ opening


def test_a_missing_file_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.db cannot be opened \(No such file"):
        with open_state_file(tmp_path / "missing.db", writable=True):
            pass

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to look at" * 50])
def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"state\.db is no "):
        with open_state_file(path):
            pass

    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["state.db"]


def test_a_folder_is_no_state_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no state file"):
        with open_state_file(tmp_path):
            pass


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("PRAGMA user_version = 0", "is no state file"),
        ("PRAGMA user_version = 99", "has schema version 99, not 1; it is a newer"),
        ("PRAGMA user_version = -1", "has schema version -1, not 1; start the service once"),
        ("DROP TABLE dead_letters", "is no state file"),
    ],
)
def test_a_database_of_another_kind_or_version_is_refused(
    path: Path, statement: str, words: str
) -> None:
    with connect(path) as db:
        db.execute(statement)

    with pytest.raises(ConfigError, match=words):
        with open_state_file(path):
            pass


def test_a_damaged_file_is_said_to_be_damaged(path: Path) -> None:
    with connect(path) as db:
        for number in range(300):
            add_letter(db, offset=number, value=b"x" * 1000)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(40 * 4096)
        file.write(b"\xff" * 4096 * 8)

    with open_state_file(path) as state, pytest.raises(ConfigError, match="is damaged"):
        for _ in state.letters():
            pass


def test_what_is_opened_to_look_at_cannot_be_changed(path: Path) -> None:
    with open_state_file(path) as state, pytest.raises(ConfigError, match="needs write permission"):
        state.delete_letters([1])


def test_a_file_whose_log_cannot_be_opened_says_so(path: Path) -> None:
    (path.parent / "state.db-wal").mkdir()  # nobody can make a log there

    with pytest.raises((ConfigError, StoreError), match=r"state\.db"):
        with open_state_file(path, writable=True) as state:
            state.retry_all()


def test_the_lock_tells_whether_a_service_runs(path: Path) -> None:
    assert not is_in_use(path)
    with (path.parent / "state.db.lock").open("w") as lock:
        assert not is_in_use(path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_in_use(path)
    assert not is_in_use(path)


# ------------------------------------------------------------------------------------------------------------- outbox


def test_the_outbox_is_walked_oldest_first(path: Path) -> None:
    with connect(path) as db:
        add_batch(db, "b-1", body=b"{}", kept_at=10.0)
        add_batch(
            db, "b-2", body=b'{"a":1}', kept_at=5.0, attempts=3, next_try=99.0, last_error="503"
        )

    with open_state_file(path) as state:
        first, second = state.outbox()
        assert (first.batch_id, first.body_bytes, first.next_try) == ("b-1", 2, 0.0)
        assert (second.attempts, second.next_try, second.last_error) == (3, 99.0, "503")
        assert state.body(second.seq) == b'{"a":1}'
        assert state.summarize_outbox() == Summary(rows=2, body_bytes=9, oldest=5.0)


def test_a_body_that_was_delivered_meanwhile_is_a_key_error(path: Path) -> None:
    with open_state_file(path) as state, pytest.raises(KeyError):
        state.body(1)


def test_retry_makes_the_named_batches_due_and_says_which_it_found(path: Path) -> None:
    with connect(path) as db:
        for name in ("b-1", "b-2", "b-3"):
            add_batch(db, name, next_try=99.0)

    with open_state_file(path, writable=True) as state:
        assert state.retry(["b-1", "unknown", "b-3"]) == ["b-1", "b-3"]

    due = rows_of(path, "SELECT batch_id, next_try FROM outbox ORDER BY seq")
    assert due == [("b-1", 0.0), ("b-2", 99.0), ("b-3", 0.0)]


def test_retry_of_all_goes_page_by_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "PAGE_ROWS", 3)
    with connect(path) as db:
        for number in range(10):
            add_batch(db, f"b-{number}", next_try=99.0 if number != 4 else 0.0)

    with open_state_file(path, writable=True) as state:
        assert state.retry_all() == 10

    assert rows_of(path, "SELECT count(*) FROM outbox WHERE next_try <> 0") == [(0,)]


@pytest.mark.parametrize(("name", "bound"), [("PAGE_ROWS", 3), ("PAGE_BYTES", 300)])
def test_retry_of_all_writes_no_more_than_a_page_in_a_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bound: int
) -> None:
    with connect(path) as db:
        for number in range(8):
            add_batch(db, f"b-{number}", body=b"x" * 100, next_try=99.0)
    monkeypatch.setattr(inspection, name, bound)
    written: list[str] = []

    with open_state_file(path, writable=True) as state:
        state._connection.set_trace_callback(written.append)
        assert state.retry_all() == 8

    words = [text.split()[0] for text in written if not text.startswith("SELECT")]
    page = ["BEGIN", *["UPDATE"] * 3, "COMMIT"]
    assert words == [*page, *page, "BEGIN", *["UPDATE"] * 2, "COMMIT"]


# ------------------------------------------------------------------------------------------------------- dead letters


def test_dead_letters_are_chosen_by_reason_topic_kind_and_seq(path: Path) -> None:
    with connect(path) as db:
        add_letter(db, offset=1, reason="invalid-json", topic="t1")
        add_letter(db, offset=2, reason="empty-value", topic="t1", value=None)
        add_letter(db, offset=3, reason="invalid-json", topic="t2")
        add_letter(db, offset=4, reason="rejected-upload", topic="t2", batch_id="b", value=b"{}")

    def offsets(**conditions: Any) -> list[int]:
        with open_state_file(path) as state:
            return [row.offset for row in state.letters(Chosen(**conditions))]

    assert offsets() == [1, 2, 3, 4]
    assert offsets(reason="invalid-json") == [1, 3]
    assert offsets(topic="t2") == [3, 4]
    assert offsets(topic="t2", uploads=False) == [3]
    assert offsets(uploads=True) == [4]
    assert offsets(since=2, reason="invalid-json") == [3]
    with open_state_file(path) as state:
        found = state.summarize_letters(Chosen(topic="t1"))
        assert {key: summary.rows for key, summary in found.items()} == {
            ("invalid-json", "t1"): 1,
            ("empty-value", "t1"): 1,
        }
        assert [state.value(row.seq) for row in state.letters()] == [b"?", None, b"?", b"{}"]
        with pytest.raises(KeyError):
            state.value(99)


def test_pages_are_bounded_in_rows_and_in_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(path) as db:
        for number in range(20):
            add_letter(db, offset=number, detail="d" * 100)

    for name, bound in (("PAGE_ROWS", 3), ("PAGE_BYTES", 250)):
        with monkeypatch.context() as patch, open_state_file(path) as state:
            patch.setattr(inspection, name, bound)
            pages = state._pages(
                "SELECT seq, detail FROM dead_letters WHERE seq > ? ORDER BY seq LIMIT ?", ()
            )
            sizes = [len(page) for page in pages]
        assert sizes == [3] * 6 + [2]


def test_a_walk_ends_with_the_last_letter_there_was_when_it_began(path: Path) -> None:
    with connect(path) as db, open_state_file(path) as state:
        for number in range(3):
            add_letter(db, offset=number)
        seen = []
        for row in state.letters():
            seen.append(row.offset)
            add_letter(db, offset=100 + row.offset)  # what was requeued came back

    assert seen == [0, 1, 2]


def test_a_reader_that_stands_still_keeps_no_transaction_open(path: Path) -> None:
    with connect(path) as db, open_state_file(path) as state:
        for number in range(1000):
            add_letter(db, offset=number)
        walk = state.letters()
        next(walk)

        busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

        assert busy == 0
        assert len(list(walk)) == 999


def test_deleting_says_how_many_there_still_were(path: Path) -> None:
    with connect(path) as db:
        for number in range(3):
            add_letter(db, offset=number)

    with open_state_file(path, writable=True) as state:
        assert state.delete_letters([1, 3, 77]) == 2
        assert state.delete_letters([]) == 0
        assert [row.seq for row in state.letters()] == [2]


def test_a_rejected_upload_moves_into_the_outbox(path: Path) -> None:
    body = b'{"batchId":"b-1","ranges":[{"partition":3,"first":7,"last":9}]}'
    with connect(path) as db:
        add_letter(db, offset=7, reason="rejected-upload", detail="422", batch_id="b-1", value=body)

    with open_state_file(path, writable=True) as state:
        assert state.move_to_outbox(1, max_bytes=1000) is Move.DONE
        assert state.move_to_outbox(1, max_bytes=1000) is Move.GONE
        assert list(state.letters()) == []
        (row,) = state.outbox()
        assert (row.batch_id, row.ranges) == ("b-1", '[{"partition":3,"first":7,"last":9}]')
        assert (row.attempts, row.next_try, row.last_error) == (0, 0.0, "422")
        assert state.body(row.seq) == body


@pytest.mark.parametrize(
    "body", [b"no JSON", b"[]", b"{}", b'{"ranges":%b}' % (b"[" * 300 + b"]" * 300)]
)
def test_a_body_without_ranges_keeps_what_its_letter_knows(path: Path, body: bytes) -> None:
    with connect(path) as db:
        add_letter(db, offset=7, partition=2, batch_id="b-1", value=body)

    with open_state_file(path, writable=True) as state:
        assert state.move_to_outbox(1, max_bytes=1000) is Move.DONE
        (row,) = state.outbox()
        assert row.ranges == '[{"partition":2,"first":7,"last":7}]'


def test_a_letter_stays_while_the_outbox_still_holds_its_batch(path: Path) -> None:
    """The service keeps the letter before it deletes the row: what moved in between would be deleted with it."""
    with connect(path) as db:
        add_batch(db, "b-1", body=b"first", next_try=5.0)
        add_letter(db, offset=7, batch_id="b-1", value=b"second")

    with open_state_file(path, writable=True) as state:
        assert state.move_to_outbox(1, max_bytes=1000) is Move.HELD
        (row,) = state.outbox()
        assert (state.body(row.seq), row.next_try) == (b"first", 5.0)
        assert len(list(state.letters())) == 1


def test_a_record_is_not_moved_into_the_outbox(path: Path) -> None:
    with connect(path) as db:
        add_letter(db, offset=7)

    with open_state_file(path, writable=True) as state:
        assert state.move_to_outbox(1, max_bytes=1000) is Move.GONE
        assert len(list(state.letters())) == 1


def test_an_upload_without_a_body_counts_as_gone(path: Path) -> None:
    with connect(path) as db:
        add_letter(db, offset=1, reason="rejected-upload", batch_id="b-1", value=None)

    with open_state_file(path, writable=True) as state:
        assert state.move_to_outbox(1, max_bytes=10**9) is Move.GONE
        assert [row.seq for row in state.letters()] == [1]
        assert not list(state.outbox())


def test_a_full_outbox_leaves_the_letter_where_it_is(path: Path) -> None:
    with connect(path) as db:
        add_batch(db, "b-0", body=b"x" * 90)
        add_letter(db, offset=7, batch_id="b-1", value=b"y" * 20)

    with open_state_file(path, writable=True) as state:
        with pytest.raises(StoreError, match="full") as caught:
            state.move_to_outbox(1, max_bytes=100)
        assert caught.value.kind == "full"
        assert len(list(state.letters())) == 1
        assert state.summarize_outbox().rows == 1


# ------------------------------------------------------------------------------------------------------------ company


def test_a_lock_that_is_held_too_long_is_said_to_be_busy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "BUSY_S", 0.01)
    with connect(path) as db, open_state_file(path, writable=True) as state:
        add_letter(db, offset=1)
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"was busy for 0\.01 s"):
            state.delete_letters([1])
        db.execute("ROLLBACK")

        assert state.delete_letters([1]) == 1


def test_a_full_disk_is_said_to_be_full(path: Path) -> None:
    with connect(path) as db:
        add_letter(db, offset=7, batch_id="b-1", value=b"y" * 200_000)

    with open_state_file(path, writable=True) as state:
        (pages,) = state._connection.execute("PRAGMA page_count").fetchone()
        state._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError) as caught:
            state.move_to_outbox(1, max_bytes=10**9)
        assert caught.value.kind == "disk-full"
        assert len(list(state.letters())) == 1


def test_everything_works_beside_a_process_that_writes(path: Path) -> None:
    with connect(path) as db:
        for number in range(50):
            add_letter(db, offset=number)
            add_letter(db, offset=number, batch_id=f"b-{number}", value=b"{}")

    with open_writer(path), open_state_file(path, writable=True) as state:
        records = [row.seq for row in islice(state.letters(Chosen(uploads=False)), 50)]
        assert state.delete_letters(records) == 50
        uploads = [row.seq for row in state.letters(Chosen(uploads=True))]
        moves = {state.move_to_outbox(seq, max_bytes=10**9) for seq in uploads}
        assert moves == {Move.DONE}
        assert len(uploads) == 50
        assert state.retry_all() > 50
        for row in state.outbox():
            assert len(state.body(row.seq)) == row.body_bytes

    left = rows_of(path, 'SELECT count(*) FROM dead_letters WHERE "offset" < 1000000')
    assert left == [(0,)]
    moved = rows_of(path, "SELECT count(*) FROM outbox WHERE batch_id LIKE 'b-%'")
    assert moved == [(50,)]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        migrate(db)  # nothing to do: it is as the service left it


def test_a_second_one_is_kept_out_until_the_first_is_done(path: Path, tmp_path: Path) -> None:
    with one_at_a_time(path):
        with pytest.raises(StoreError) as caught, one_at_a_time(path):
            pytest.fail("it came in")
        assert caught.value.kind == "disk-error"
        assert str(caught.value) == (
            f"{path} is being requeued from by another process; try again when it is done"
        )
    with one_at_a_time(path), one_at_a_time(tmp_path / "missing"):
        pass
