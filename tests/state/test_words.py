"""What an operator reads when the state file fails: which file, what is wrong with it, and what to do."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stationmaster.errors import ConfigError, StoreError
from stationmaster.state.database import store_errors
from stationmaster.state.inspection import StateFile, open_state_file
from stationmaster.state.lock import forbidden
from tests.state.files import connect, make_state_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

FILE = Path("/var/lib/stationmaster/state.sqlite")
RESTART = "Restart the service: it moves the file aside, whole, and begins a new one"


def sqlite_error(code: int, words: str = "words of SQLite") -> sqlite3.Error:
    error = sqlite3.OperationalError(words)
    error.sqlite_errorcode = code
    return error


# An extended code (SQLITE_BUSY_SNAPSHOT and the like) counts as its primary one.
EXTENDED = 2 << 8


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (
            sqlite3.SQLITE_FULL,
            "disk-full",
            f"{FILE}: the disk is full. Make room on it: 8 MiB besides what is to be kept",
        ),
        (
            sqlite3.SQLITE_IOERR_SHMSIZE,
            "disk-full",
            f"{FILE}: the disk is full. Make room on it: 8 MiB besides what is to be kept",
        ),
        *(
            (
                code,
                "disk-error",
                f"{FILE} is damaged (words of SQLite). {RESTART}",
            )
            for code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        ),
        *(
            (
                code,
                "disk-error",
                f"{FILE}: words of SQLite. Check the disk, and who else uses the file",
            )
            for code in (
                sqlite3.SQLITE_IOERR,
                sqlite3.SQLITE_BUSY,
                sqlite3.SQLITE_BUSY | EXTENDED,
                sqlite3.SQLITE_LOCKED,
                sqlite3.SQLITE_PROTOCOL,
                sqlite3.SQLITE_READONLY,
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_PERM,
                sqlite3.SQLITE_NOMEM,
            )
        ),
    ],
)
def test_the_service_says_what_failed_and_what_to_do(code: int, kind: str, words: str) -> None:
    error = sqlite_error(code)
    with pytest.raises(StoreError) as caught, store_errors(FILE):
        raise error
    assert (caught.value.kind, str(caught.value)) == (kind, words)
    assert caught.value.__cause__ is error


def test_an_error_of_our_own_sql_stays_what_it_is() -> None:
    for error in (
        sqlite_error(sqlite3.SQLITE_ERROR),
        sqlite_error(sqlite3.SQLITE_CONSTRAINT),
        sqlite3.ProgrammingError("the module's own complaint"),
    ):
        with pytest.raises(type(error)) as caught, store_errors(FILE):
            raise error
        assert caught.value is error


def test_an_error_of_the_reserve_names_the_file_too() -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(StoreError) as caught, store_errors(FILE):
        raise error
    assert str(caught.value) == f"{FILE}: {error}. Check the disk, and who else uses the file"
    assert caught.value.kind == "disk-error"


def test_who_may_not_write_is_told_where() -> None:
    [fault] = forbidden(FILE, OSError("not permitted")).faults
    assert fault == (
        f"outbox.path: {FILE} cannot be opened for writing (not permitted); "
        "this user needs write permission on it and on its folder"
    )


# ------------------------------------------------------------------------------------------------ operators' commands


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateFile]:
    path = make_state_file(tmp_path / "state.db")
    with open_state_file(path) as opened:
        assert opened.path == path
        yield opened


def words_of(state: StateFile) -> AbstractContextManager[None]:
    return state._words()


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (sqlite3.SQLITE_NOTADB, "is no SQLite database"),
        (sqlite3.SQLITE_CORRUPT, "is damaged (words of SQLite)"),
        (
            sqlite3.SQLITE_READONLY,
            "needs write permission, on it and on its folder (words of SQLite); use the service's user",
        ),
        (sqlite3.SQLITE_CANTOPEN, "cannot be opened (words of SQLite)"),
        (sqlite3.SQLITE_CANTOPEN | EXTENDED, "cannot be opened (words of SQLite)"),
    ],
)
def test_a_command_names_the_file_and_its_fault(state: StateFile, code: int, fault: str) -> None:
    with pytest.raises(ConfigError) as caught, words_of(state):
        raise sqlite_error(code)
    assert caught.value.faults == (f"outbox.path: {state.path} {fault}",)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (
            sqlite3.SQLITE_BUSY,
            "disk-error",
            "{} was busy for 5 s: another process writes; try again",
        ),
        (
            sqlite3.SQLITE_LOCKED,
            "disk-error",
            "{} was busy for 5 s: another process writes; try again",
        ),
        (
            sqlite3.SQLITE_FULL,
            "disk-full",
            "{}: words of SQLite; look at its disk, then try again",
        ),
        (
            sqlite3.SQLITE_IOERR,
            "disk-error",
            "{}: words of SQLite; look at its disk, then try again",
        ),
    ],
)
def test_a_command_says_what_may_pass(state: StateFile, code: int, kind: str, words: str) -> None:
    with pytest.raises(StoreError) as caught, words_of(state):
        raise sqlite_error(code)
    assert (caught.value.kind, str(caught.value)) == (kind, words.format(state.path))


def test_a_file_that_is_not_the_services_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    def fault(path: Path) -> str:
        with pytest.raises(ConfigError) as caught, open_state_file(path):
            pytest.fail("it opened")
        [words] = caught.value.faults
        assert words.startswith(f"outbox.path: {path} ")
        return words.removeprefix(f"outbox.path: {path} ")

    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.touch()
    assert fault(missing) == (
        "cannot be opened (No such file or directory); the service makes it when it starts"
    )
    assert fault(empty) == fault(tmp_path) == "is no state file of stationmaster"
    ours = make_state_file(tmp_path / "ours")
    for version, words in (
        (0, "is no state file of stationmaster"),
        (
            -1,
            "has schema version -1, not 1; start the service once: it brings the file up to date",
        ),
        (2, "has schema version 2, not 1; it is a newer stationmaster's: use that one's command"),
    ):
        with connect(ours) as db:
            db.execute(f"PRAGMA user_version = {version}")
        assert fault(ours) == words


def test_a_complaint_without_a_code_is_told_as_it_is(state: StateFile) -> None:
    with pytest.raises(StoreError) as caught, words_of(state):
        raise sqlite3.ProgrammingError("the module's own")
    assert str(caught.value) == f"{state.path}: the module's own; look at its disk, then try again"
