"""`python -m tests.chaos`: the demo's processes in real time, with whatever can go wrong, and then the books."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import attrs
import click
import trio

from tests.chaos.machine import Disk, enter_namespace
from tests.chaos.plan import KINDS
from tests.chaos.run import Order, Outcome, prepare, run

_SHOWN = 40
_PLAIN_EVERY_S = 10.0


@click.command()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Time in which things go wrong; starting and settling come on top.",
)
@click.option("--seed", type=int, help="Of the dice; without it a new one, which is printed.")
@click.option("--faults", default=",".join(KINDS), show_default=True, help="Kinds of faults.")
@click.option(
    "--per-second",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Messages produced.",
)
@click.option("--keep", is_flag=True, help="Keep logs and databases even if all is well.")
def main(minutes: float, seed: int | None, faults: str, per_second: float, keep: bool) -> None:
    """Let things go wrong for a while, mend them, and balance the books.

    Broker (librdkafka's mock cluster), model server, target and two services of one group run as processes of their
    own, with relays between them. Faults: kill (SIGKILL, SIGTERM and a new start), stop (SIGSTOP for up to 20 s), slow
    (a link is slow, stalled or cut), disk (full), clock (the wall clock jumps by up to a year), answers (target and
    model answer 5xx, 429, nonsense or nothing), handles (no new files and sockets).

    Exit codes: 0 the books balance; 1 they do not, or a process misbehaved: everything is kept then, and it says where.
    What a kind of fault needs and is missing here (unshare, a C compiler) is said, and left out; with
    STATIONMASTER_REQUIRE_CHAOS=1 that is a failure.
    """
    kinds = tuple(kind.strip() for kind in faults.split(","))
    if unknown := set(kinds) - set(KINDS):
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}", param_hint="--faults")
    enter_namespace(sys.argv[1:])
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="stationmaster-chaos-"))
    missing = prepare(kinds, folder)
    for kind, why in missing.items():
        click.echo(f"left out: {kind}: {why}")
    if missing and os.environ.get("STATIONMASTER_REQUIRE_CHAOS") == "1":
        _forget(folder)
        sys.exit("STATIONMASTER_REQUIRE_CHAOS=1: nothing may be left out")
    terminal = Terminal()
    order = Order(
        seconds=minutes * 60,
        seed=seed,
        kinds=tuple(kind for kind in kinds if kind not in missing),
        per_s=per_second,
        folder=folder,
        say=terminal.say,
        show=terminal.show,
    )
    again = (
        f"python -m tests.chaos --minutes {minutes:g} --seed {seed} "
        f"--faults {','.join(kinds)} --per-second {per_second:g}"
    )
    click.echo(f"seed {seed}; logs in {folder}; again: {again}")
    good = False
    try:
        outcome = trio.run(_run_until_told, order)
        if outcome is None:
            click.echo("interrupted")
            sys.exit(130)
        good = not outcome.faults
        _tell(outcome, missing)
        click.echo(f"{'the books balance' if good else 'THE BOOKS DO NOT BALANCE'}; again: {again}")
    finally:
        if good and not keep:
            _forget(folder)
        else:
            _save(folder)
            click.echo(f"kept: {folder}")
    sys.exit(0 if good else 1)


async def _run_until_told(order: Order) -> Outcome | None:
    """Run it; None if a signal came."""
    outcome: Outcome | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope)
        outcome = await run(order)
        nursery.cancel_scope.cancel()
    return outcome


async def _cancel_on_signal(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


@attrs.define(eq=False)
class Terminal:
    """Lines that stay, and below them one about how far it is; where nobody sits, such a line now and then."""

    lively: bool = attrs.field(factory=sys.stdout.isatty)
    _shown: float = attrs.field(factory=time.monotonic)

    def say(self, line: str) -> None:
        """Write a line that stays."""
        click.echo(f"\r\x1b[K{line}" if self.lively else line)

    def show(self, line: str) -> None:
        """Write how far it is."""
        if self.lively:
            click.echo(f"\r\x1b[K{line}"[: shutil.get_terminal_size().columns], nl=False)
        elif time.monotonic() - self._shown >= _PLAIN_EVERY_S:
            self._shown = time.monotonic()
            click.echo(line)


def _tell(outcome: Outcome, missing: dict[str, str]) -> None:
    click.echo("\nthe books")
    for name, figure in outcome.books.balance().items():
        click.echo(f"    {name:<28} {figure:>8,}")
    click.echo("faults")
    for kind, times in outcome.struck.items():
        click.echo(f"    {kind:<28} {times:>8,}")
    for kind, why in missing.items():
        click.echo(f"    {kind:<28} left out: {why}")
    click.echo("besides")
    for name, noted in outcome.figures.items():
        click.echo(f"    {name:<28} {noted}")
    if outcome.faults:
        click.echo(f"wrong: {len(outcome.faults)}")
    for fault in outcome.faults[:_SHOWN]:
        click.echo(f"    {fault}")


def _save(folder: Path) -> None:
    """Copy the state files off their small disks, which go with the last process."""
    for disk in folder.iterdir():
        if disk.is_mount():
            shutil.copytree(
                disk, folder / f"{disk.name}-state", ignore=shutil.ignore_patterns("ballast-*")
            )


def _forget(folder: Path) -> None:
    for disk in folder.iterdir():
        if disk.is_mount():
            Disk(disk).unmount()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
