"""The tables of the state file, and how an older file is brought up to date. Pure SQL, no threads, no policy.

Times are wall-clock seconds since the epoch. `PRAGMA user_version` is the number of migrations that were applied.

    outbox         one row per batch that the target has not taken; gone when it has
    dead_letters   one row per record or batch that cannot be used; gone when a person requeues it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import sqlite3

MIGRATIONS: Final = (
    """
    CREATE TABLE outbox (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        batch_id TEXT NOT NULL UNIQUE,
        topic TEXT NOT NULL,
        ranges TEXT NOT NULL,             -- JSON: [{"partition", "first", "last"}]
        kept_at REAL NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        next_try REAL NOT NULL DEFAULT 0,
        last_error TEXT NOT NULL DEFAULT '',
        body BLOB NOT NULL                -- last: the others are read without its pages
    ) STRICT;
    CREATE INDEX outbox_due ON outbox (next_try, seq);
    CREATE TABLE dead_letters (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        reason TEXT NOT NULL,
        detail TEXT NOT NULL,
        topic TEXT NOT NULL,
        partition INTEGER NOT NULL,
        "offset" INTEGER NOT NULL,
        timestamp_ms INTEGER NOT NULL,
        headers TEXT NOT NULL,            -- JSON: [[name, base64 or null]]
        batch_id TEXT NOT NULL,           -- '' for a record
        first_seen REAL NOT NULL,
        value BLOB                        -- NULL: a tombstone
    ) STRICT;
    CREATE INDEX dead_letters_place ON dead_letters (topic, partition, "offset", timestamp_ms, batch_id);
    """,
)
"""Each is applied once, in order, in one transaction with its `user_version`. Never edit one that was released."""

VERSION: Final = len(MIGRATIONS)


def read_version(connection: sqlite3.Connection) -> int:
    """Return how many migrations this file has seen; 0 for a new one."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def read_texts(connection: sqlite3.Connection) -> None:
    """Read all text of a file of this version, once: SQLite's own check does not look whether it is any.

    Raises:
        sqlite3.OperationalError: it is not.
    """
    for query in (
        "SELECT batch_id, topic, ranges, last_error FROM outbox",
        "SELECT reason, detail, topic, headers, batch_id FROM dead_letters",
    ):
        for _ in connection.execute(query):
            pass


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file up to date; each step is done whole or not at all.

    The connection must be in autocommit mode (`isolation_level=None`).
    """
    for version in range(read_version(connection), VERSION):
        connection.executescript(
            f"BEGIN IMMEDIATE; {MIGRATIONS[version]} PRAGMA user_version = {version + 1}; COMMIT;"
        )
