"""The operator's commands for what could not be delivered: `stationmaster outbox ...` and `dead-letters ...`.

All of them work beside a running service. Exit codes: 0 fine, 64 usage, 75 not all of it now (what is left is where it
was: try again), 78 configuration, also a state file that is missing or none of ours.
"""

from __future__ import annotations

import time
from base64 import b64encode
from typing import TYPE_CHECKING, Final

import click
import orjson

from stationmaster.service.config_rules import printable
from stationmaster.service.requeue_cli import requeue
from stationmaster.service.shutdown import EXIT_CUT_SHORT, EXIT_OK
from stationmaster.service.state_edge import (
    CONFIG,
    REASON,
    SET,
    TOPIC,
    count,
    edge,
    iso,
    load,
    load_for_letters,
    tell_if_nobody_runs,
    tell_row,
    write_lines,
)
from stationmaster.state.inspection import open_state_file
from stationmaster.state.rows import Chosen

if TYPE_CHECKING:
    from pathlib import Path

    from stationmaster.state.rows import LetterRow, OutboxRow

_RANGES_SHOWN: Final = 3


# ------------------------------------------------------------------------------------------------------------- outbox


@click.group()
def outbox() -> None:
    """Batches that wait until the upload target takes them: look at them, hurry them."""


@outbox.command("list")
@CONFIG
@SET
@click.option("--json", "as_json", is_flag=True, help="JSON Lines instead of a table.")
@edge
def list_outbox(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Show every batch in the outbox, oldest first."""
    config = load(config_path, overrides)
    with open_state_file(config.outbox.path) as state:
        if as_json:
            write_lines(
                {**_outbox_facts(row), "bytes": row.body_bytes, "keptAt": iso(row.kept_at)}
                for row in state.outbox()
            )
            return EXIT_OK
        now = time.time()
        tell_row(
            _OUTBOX_WIDTHS,
            (
                "batch",
                "topic",
                "ranges",
                "bytes",
                "kept since",
                "attempts",
                "next try",
                "last error",
            ),
        )
        for row in state.outbox():
            cells = (
                row.batch_id,
                row.topic,
                _short_ranges(row.ranges),
                f"{row.body_bytes:,}",
                iso(row.kept_at),
                str(row.attempts),
                iso(row.next_try) if row.next_try > now else "now",
                row.last_error,
            )
            tell_row(_OUTBOX_WIDTHS, cells)
        total = state.summarize_outbox()
        since = f", the oldest since {iso(total.oldest)}" if total.oldest is not None else ""
        click.echo(f"{count(total.rows, 'batch', 'batches')}, {total.body_bytes:,} bytes{since}")
    return EXIT_OK


@outbox.command("retry")
@click.argument("batch_ids", metavar="[BATCH_ID]...", nargs=-1)
@CONFIG
@SET
@edge
def retry_outbox(batch_ids: tuple[str, ...], config_path: Path, overrides: tuple[str, ...]) -> int:
    """Make these batches due now, or all of them; the running service sends them within about a second."""
    config = load(config_path, overrides)
    with open_state_file(config.outbox.path, writable=True) as state:
        if batch_ids:
            found = state.retry(batch_ids)
            due = len(found)
            missing = [batch_id for batch_id in batch_ids if batch_id not in found]
        else:
            due, missing = state.retry_all(), []
    click.echo(f"{count(due, 'batch is', 'batches are')} due now")
    for batch_id in missing:
        click.echo(f"stationmaster: {printable(batch_id)} is not in the outbox", err=True)
    tell_if_nobody_runs(config)
    return EXIT_CUT_SHORT if missing else EXIT_OK


@outbox.command("export")
@CONFIG
@SET
@edge
def export_outbox(config_path: Path, overrides: tuple[str, ...]) -> int:
    """Print every batch in the outbox as JSON Lines.

    Keys: batchId, topic, ranges, attempts, nextTry (null: now), lastError, body (what is uploaded, as JSON).
    """
    config = load(config_path, overrides)
    with open_state_file(config.outbox.path) as state:
        for row in state.outbox():
            try:
                body = state.body(row.seq)
            except KeyError:  # delivered meanwhile
                continue
            write_lines([{**_outbox_facts(row), "body": orjson.Fragment(body)}])
    return EXIT_OK


_OUTBOX_WIDTHS: Final = (40, 16, 20, -12, 20, -8, 20, 0)


def _outbox_facts(row: OutboxRow) -> dict[str, object]:
    return {
        "batchId": row.batch_id,
        "topic": row.topic,
        "ranges": _read_ranges(row.ranges),
        "attempts": row.attempts,
        "nextTry": iso(row.next_try) if row.next_try else None,
        "lastError": row.last_error,
    }


def _read_ranges(ranges: str) -> list[dict[str, int]] | None:
    """Return what a row says it covers; None if that is not in our words."""
    try:
        read = [
            {name: one[name] for name in ("partition", "first", "last")}
            for one in orjson.loads(ranges)
        ]
    except (ValueError, TypeError, KeyError):
        return None
    whole = all(type(number) is int for one in read for number in one.values())
    return read if whole else None


def _short_ranges(ranges: str) -> str:
    read = _read_ranges(ranges)
    if read is None:
        return "?"
    each = [f"{one['partition']}:{one['first']}-{one['last']}" for one in read]
    more = len(each) - _RANGES_SHOWN
    return ",".join(each[:_RANGES_SHOWN]) + (f",+{more}" if more > 0 else "")


# ------------------------------------------------------------------------------------------------------- dead letters


@click.group("dead-letters")
def dead_letters() -> None:
    """Messages that could not be used, and uploads that were rejected: look at them, send them again."""


@dead_letters.command("list")
@CONFIG
@SET
@REASON
@TOPIC
@edge
def list_letters(
    config_path: Path, overrides: tuple[str, ...], reason: str | None, topic: str | None
) -> int:
    """Show the dead letters, oldest first."""
    config = load_for_letters(config_path, overrides)
    chosen = Chosen(reason=reason, topic=topic)
    with open_state_file(config.outbox.path) as state:
        tell_row(
            _LETTER_WIDTHS,
            ("reason", "topic", "partition", "offset", "bytes", "first seen", "detail"),
        )
        for row in state.letters(chosen):
            detail = f"{row.batch_id}: {row.detail}" if row.batch_id else row.detail
            cells = (
                row.reason,
                row.topic,
                str(row.partition),
                str(row.offset),
                f"{row.value_bytes:,}",
                iso(row.first_seen),
                detail,
            )
            tell_row(_LETTER_WIDTHS, cells)
        found = state.summarize_letters(chosen)
    rows = sum(summary.rows for summary in found.values())
    size = sum(summary.body_bytes for summary in found.values())
    oldest = min((each.oldest for each in found.values() if each.oldest is not None), default=None)
    since = f", the oldest since {iso(oldest)}" if oldest is not None else ""
    click.echo(f"{count(rows, 'dead letter', 'dead letters')}, {size:,} bytes{since}")
    return EXIT_OK


_LETTER_WIDTHS: Final = (20, 24, -9, -12, -12, 20, 0)


@dead_letters.command("export")
@CONFIG
@SET
@REASON
@TOPIC
@edge
def export_letters(
    config_path: Path, overrides: tuple[str, ...], reason: str | None, topic: str | None
) -> int:
    """Print the dead letters as JSON Lines.

    Keys: topic, partition, offset, timestamp (ms since the epoch), reason, detail, headers ([name, base64 or null]
    pairs), valueBase64 (null: a tombstone); of a rejected upload also batchId, and its value is the body.
    """
    config = load_for_letters(config_path, overrides)
    with open_state_file(config.outbox.path) as state:
        for row in state.letters(Chosen(reason=reason, topic=topic)):
            try:
                value = state.value(row.seq)
            except KeyError:  # requeued meanwhile
                continue
            write_lines([_letter_facts(row, value)])
    return EXIT_OK


def _letter_facts(row: LetterRow, value: bytes | None) -> dict[str, object]:
    return {
        "topic": row.topic,
        "partition": row.partition,
        "offset": row.offset,
        "timestamp": row.timestamp_ms,
        "reason": row.reason,
        "detail": row.detail,
        "headers": orjson.Fragment(row.headers),
        "valueBase64": None if value is None else b64encode(value).decode(),
        **({"batchId": row.batch_id} if row.batch_id else {}),
    }


dead_letters.add_command(requeue)
