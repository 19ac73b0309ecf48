"""`stationmaster dead-letters requeue`: what is about to be done, the doing, and what is said of it."""

from __future__ import annotations

from contextlib import AsyncExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click
import trio

from stationmaster.service.config_rules import printable
from stationmaster.service.requeue import LinesFile, Requeue, open_topics
from stationmaster.service.shutdown import EXIT_CUT_SHORT, EXIT_OK
from stationmaster.service.state_edge import (
    CONFIG,
    REASON,
    SET,
    TOPIC,
    count,
    edge,
    load_for_letters,
    tell_if_nobody_runs,
)
from stationmaster.service.translation import kafka_settings
from stationmaster.state.inspection import one_at_a_time, open_state_file
from stationmaster.state.rows import Chosen

if TYPE_CHECKING:
    from stationmaster.service.config import Config
    from stationmaster.service.requeue import Destination, Tally
    from stationmaster.state.inspection import StateFile
    from stationmaster.state.rows import Summary


@click.command("requeue")
@CONFIG
@SET
@REASON
@TOPIC
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, the oldest ones.")
@click.option("--all", "everything", is_flag=True, help="All that there are.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option(
    "--to",
    "lines_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.jsonl",
    help="Append them to this file instead of sending them: records for `stationmaster replay`.",
)
@edge
def requeue(  # noqa: PLR0917 - click calls it by name
    config_path: Path,
    overrides: tuple[str, ...],
    reason: str | None,
    topic: str | None,
    limit: int | None,
    everything: bool,
    dry_run: bool,
    lines_path: Path | None,
) -> int:
    """Send dead letters again: records to their topic, rejected uploads to the target.

    A record is produced with its value, headers and timestamp, without a key, to its own partition if that still
    exists; the header stationmaster-requeued-from says topic/partition/offset it had. A rejected upload goes back into
    the outbox, from where the service posts it. With --to both go into a file instead, a rejected upload as its body. A
    letter is deleted after its record was acknowledged or is on the disk; interrupted, the rest stays.
    """
    if not (everything or reason or topic or limit):
        raise click.UsageError("say which: --reason, --topic, --limit, or --all")
    produces = lines_path is None and not dry_run
    config = load_for_letters(config_path, overrides, read_secrets=produces)
    chosen = Chosen(reason=reason, topic=topic)
    path = config.outbox.path
    # Two at once would send the same records, twice.
    with (
        nullcontext() if dry_run else one_at_a_time(path),
        open_state_file(path, writable=not dry_run) as state,
    ):
        plan = _Plan(
            records=state.summarize_letters(attrs.evolve(chosen, uploads=False)),
            uploads=state.summarize_letters(attrs.evolve(chosen, uploads=True)),
            config=config,
            lines_path=lines_path,
        )
        if dry_run:
            plan.tell(limit)
            return EXIT_OK
        plan.check()
        if plan.uploads and lines_path is None:
            tell_if_nobody_runs(config)
        return trio.run(partial(_requeue, state, chosen, plan, limit))


@attrs.frozen(kw_only=True)
class _Plan:
    """What a requeue is about to do."""

    records: dict[tuple[str, str], Summary]
    """By (reason, topic)."""
    uploads: dict[tuple[str, str], Summary]
    config: Config
    lines_path: Path | None

    @property
    def total(self) -> int:
        """How many letters fit."""
        return sum(each.rows for each in (*self.records.values(), *self.uploads.values()))

    def check(self) -> None:
        """See that every record has somewhere to go.

        Raises:
            click.UsageError: it has not.
        """
        if self.lines_path is not None and self.records and self.uploads:
            raise click.UsageError(
                "messages and bodies of rejected uploads do not go into one file: "
                "move the bodies first, with --reason rejected-upload"
            )
        topics = sorted({topic for _, topic in self.records})
        if not topics:
            return
        if self.lines_path is None and self.config.kafka is None:
            raise click.UsageError(
                "records cannot be produced: the configuration has no table [kafka]; "
                "append them to a file with --to FILE.jsonl, which `stationmaster replay` reads"
            )
        if self.lines_path is not None and len(topics) > 1:
            raise click.UsageError(
                f"a replayed file has one topic, and these records have {len(topics)} "
                f"({', '.join(topics)}); choose with --topic"
            )
        if self.lines_path is not None and self.lines_path.suffix == ".gz":
            raise click.UsageError(f"{self.lines_path}: lines are appended to a plain file only")

    def tell(self, limit: int | None) -> None:
        """Say what would be done."""
        to_file = self.lines_path is not None
        way = f"to be appended to {self.lines_path}" if to_file else "to be produced to its topic"
        way_of_uploads = way if to_file else "to be put into the outbox"
        for summaries, what in ((self.records, way), (self.uploads, way_of_uploads)):
            for (reason, topic), summary in summaries.items():
                letters = count(summary.rows, "dead letter", "dead letters")
                size = f"{summary.body_bytes:,} bytes"
                click.echo(printable(f"{reason}, {topic}: {letters}, {size}, {what}"))
        most = "" if limit is None or limit >= self.total else f", the oldest {limit} of them"
        click.echo(f"{count(self.total, 'dead letter fits', 'dead letters fit')}{most}")


async def _requeue(state: StateFile, chosen: Chosen, plan: _Plan, limit: int | None) -> int:
    total = plan.total if limit is None else min(limit, plan.total)
    async with AsyncExitStack() as opened:
        destination: Destination | None = None
        if plan.lines_path is not None:
            destination = LinesFile(plan.lines_path)
        elif plan.records:
            assert plan.config.kafka is not None  # noqa: S101 - check() saw to it
            topics = open_topics(kafka_settings(plan.config.kafka))
            destination = await opened.enter_async_context(topics)
        run = Requeue(
            state=state,
            destination=destination,
            outbox_max_bytes=plan.config.outbox.max_bytes,
            tell=lambda tally: click.echo(f"stationmaster: {tally.moved} of {total}", err=True),
        )
        try:
            await run.run(chosen, limit=limit)
        finally:
            _tell_tally(run.tally, plan)
    return EXIT_CUT_SHORT if run.tally.interrupted or run.tally.stayed else EXIT_OK


def _tell_tally(tally: Tally, plan: _Plan) -> None:
    where = "produced to their topics" if plan.lines_path is None else f"in {plan.lines_path}"
    click.echo(
        f"{count(tally.records, 'record', 'records')} {where}, "
        f"{count(tally.uploads, 'upload', 'uploads')} in the outbox"
    )
    for why, number in tally.stayed.most_common():
        click.echo(f"stationmaster: {number} stay: {why}", err=True)
    if tally.interrupted:
        click.echo("stationmaster: interrupted; the rest stays", err=True)
