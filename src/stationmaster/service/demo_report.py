"""What the demo shows while it runs, and the books it balances at its end."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter, deque
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs
import click
import trio
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

SLACK_S: Final = 0.25  # a batch decided later than this after its deadline counts as late
_PLAIN_LINE_EVERY_S: Final = 2.0


@attrs.define(eq=False, kw_only=True)
class Progress:
    """What the parts said so far."""

    messages: int
    deadline_s: float
    state: Path
    started: float = attrs.field(factory=time.monotonic)
    produced: int = 0
    produced_by_partition: dict[int, int] = attrs.field(factory=dict)
    opened: int = 0
    uploaded: int = 0
    held: int = 0
    """Batches in the receiver's database."""
    closed_by: Counter[str] = attrs.field(factory=Counter)
    recent: deque[Mapping[str, Any]] = attrs.field(factory=lambda: deque(maxlen=10))
    """The last batches that were closed, as log lines."""
    page: str = ""
    """Where the service's status page is."""
    notes: deque[str] = attrs.field(factory=lambda: deque(maxlen=5))
    all_held: trio.Event = attrs.field(factory=trio.Event)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        """Remember something that people should see."""
        self.notes.append(f"{self.seconds:5.1f} s  {text}")

    def hold(self, batches: int) -> None:
        """Take note of how many batches the receiver holds."""
        self.held = batches
        if self.produced_by_partition and batches >= self.messages:
            self.all_held.set()

    def take_producer_line(self, line: str) -> None:
        """Take a line of the producer."""
        said = _json(line)
        self.produced = said.get("produced", self.produced)
        for partition, count in said.get("partitions", {}).items():
            self.produced_by_partition[int(partition)] = count

    def take_log_line(self, line: str) -> None:
        """Take a log line of the service."""
        said = _json(line)
        event = said.get("event", "")
        if event == "batch created":
            self.opened += 1
        elif event in ("batch complete", "batch quorum", "batch deadline"):
            self.closed_by[event.removeprefix("batch ")] += 1
            self.recent.append(said)
        elif event in ("upload done", "upload done from outbox"):
            self.uploaded += 1
        elif said.get("level") in ("warning", "error", "critical"):
            self.note(f"service: {event} {said.get('reason') or said.get('detail') or ''}".rstrip())


def _json(line: str) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


# ------------------------------------------------------------------------------------------------------------- screen


@contextmanager
def open_screen(progress: Progress, *, live: bool) -> Iterator[Callable[[], None]]:
    """Show the progress; gives a function that shows it anew."""
    click.echo(f"state folder (logs, database, demo.json): {progress.state}")
    if live:
        with Live(_table(progress), refresh_per_second=4) as screen:
            yield lambda: screen.update(_table(progress))
            screen.update(_table(progress))
        return
    told = 0.0
    shown: list[str] = []

    def print_line() -> None:
        nonlocal told
        for note in progress.notes:
            if note not in shown:
                click.echo(f"  {note}")
        shown[:] = progress.notes
        if progress.seconds - told >= _PLAIN_LINE_EVERY_S:
            told = progress.seconds
            click.echo(_line(progress))

    yield print_line
    click.echo(_line(progress))


def _line(progress: Progress) -> str:
    closed = ", ".join(f"{count} by {rule}" for rule, count in sorted(progress.closed_by.items()))
    return (
        f"{progress.seconds:5.1f} s  produced {progress.produced}/{progress.messages}  "
        f"opened {progress.opened}  closed {closed or 0}  uploaded {progress.uploaded}  held {progress.held}"
    )


def _table(progress: Progress) -> Group:
    table = Table(title=_line(progress), title_justify="left", expand=True)
    for name in ("batch", "closed by", "against its deadline", "answered", "late or failed"):
        table.add_column(name, no_wrap=True)
    for said in reversed(progress.recent):
        seconds = float(said.get("seconds", 0.0))
        rule = str(said.get("event", "")).removeprefix("batch ")
        late = said.get("late") or ()
        table.add_row(
            Text(str(said.get("batch_id", ""))),
            Text(rule, style="yellow" if rule == "deadline" else "green"),
            ProgressBar(total=progress.deadline_s, completed=seconds, width=30),
            Text(str(said.get("done", ""))),
            Text(", ".join(map(str, late))),
        )
    page = Text(f"status page: {progress.page}", style="bold")
    return Group(table, page, *(Text(note, style="yellow") for note in progress.notes))


# -------------------------------------------------------------------------------------------------------------- books


@attrs.frozen(kw_only=True)
class Books:
    """What the receiver holds, against what was produced."""

    produced: int
    uploaded: int
    results: int
    lost: int
    """Produced messages that no batch covers."""
    doubled: int
    """Results that stand there twice for one record and station."""
    deliveries: int
    by_deadline: int
    latest_s: float
    """The longest time from opening to closing."""
    outcomes: Mapping[tuple[str, str], int]
    """(station id, outcome) -> reports that name it."""

    def late(self, deadline_s: float) -> bool:
        """Whether a batch was decided too late."""
        return self.latest_s > deadline_s + SLACK_S

    def good(
        self, at_least: int, *, slow: str, failing: str, deadline_s: float, faults_due: bool = True
    ) -> bool:
        """Whether the demo showed what it promises; `faults_due`: whether it was long enough to show its faults."""
        faults_seen = (
            self.outcomes.get((slow, "timedOut"), 0) > 0
            and self.outcomes.get((failing, "failed"), 0) > 0
        )
        return (
            self.uploaded >= at_least
            and not self.lost
            and not self.doubled
            and not self.late(deadline_s)
            and (faults_seen or not faults_due)
        )

    def summary(self, *, slow: str, failing: str, deadline_s: float) -> str:
        """Say it in lines."""
        slow_times = self.outcomes.get((slow, "timedOut"), 0)
        failing_times = self.outcomes.get((failing, "failed"), 0)
        return (
            f"{self.produced} messages produced, {self.uploaded} batches uploaded with {self.results} results "
            f"({self.deliveries} deliveries), {self.by_deadline} closed by deadline\n"
            f"slow station {slow} timed out {slow_times} times, station {failing} failed {failing_times} times\n"
            f"lost {self.lost}, duplicated {self.doubled}, "
            f"longest batch {self.latest_s:.3f} s (deadline {deadline_s:g} s, late beyond {SLACK_S:g} s more: "
            f"{'YES' if self.late(deadline_s) else 'none'}); counted in the receiver's database"
        )


def read_only(database: Path) -> str:
    """Return the URI that opens an SQLite file for reading only."""
    return f"{database.resolve().as_uri()}?mode=ro"


def balance(database: Path, produced_by_partition: Mapping[int, int]) -> Books:
    """Read the receiver's database and compare it with what was produced."""
    covered: set[tuple[int, int]] = set()
    outcomes: Counter[tuple[str, str]] = Counter()
    latest_s = 0.0
    by_deadline = uploaded = deliveries = 0
    with closing(sqlite3.connect(read_only(database), uri=True)) as db:
        for body, times in db.execute("SELECT body, deliveries FROM batches"):
            report = json.loads(body)
            uploaded += 1
            deliveries += times
            latest_s = max(latest_s, report["durationSeconds"])
            by_deadline += report["closedBy"] == "deadline"
            for span in report["ranges"]:
                covered.update(
                    (span["partition"], offset) for offset in range(span["first"], span["last"] + 1)
                )
            outcomes.update(
                (entry["stationId"], entry["outcome"]) for entry in report["unsuccessful"]
            )
        ((results,),) = db.execute("SELECT count(*) FROM results")
        ((distinct,),) = db.execute(
            "SELECT count(*) FROM (SELECT DISTINCT topic, partition, first_offset, station_id FROM results)"
        )
    produced = {
        (partition, offset)
        for partition, count in produced_by_partition.items()
        for offset in range(count)
    }
    return Books(
        produced=len(produced),
        uploaded=uploaded,
        results=results,
        lost=len(produced - covered),
        doubled=results - distinct,
        deliveries=deliveries,
        by_deadline=by_deadline,
        latest_s=latest_s,
        outcomes=outcomes,
    )
