"""The command: run histories by the thousand, or hunt mutants, and say what was seen."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from tests.simulation.dice import ALL, Fault
from tests.simulation.figures import Figures
from tests.simulation.mutants import MUTANTS, hunt
from tests.simulation.shrinking import shrink
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.world import History

_COMMAND: Final = "python -m tests.simulation"
_ABOUT: Final = "Run histories by the thousand, or hunt mutants, and say what was seen."


def main() -> int:
    """Return 0 if all is well, 1 if something broke, or a mutant was not found."""
    arguments = _arguments()
    if arguments.list_faults:
        print(*sorted(fault.value for fault in Fault), sep="\n")
        return 0
    if arguments.mutants:
        return _hunt(arguments.jobs)
    faults = ALL if arguments.faults is None else frozenset(map(Fault, arguments.faults))
    if arguments.digests:
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            print(seed, World(seed, faults=faults).run().digest)
        return 0
    return _run(arguments, faults)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=_COMMAND, description=_ABOUT)
    parser.add_argument("--seeds", type=_count, default=1, metavar="N", help="how many histories")
    parser.add_argument(
        "--from", type=int, default=0, dest="first", metavar="S", help="the first seed"
    )
    parser.add_argument(
        "--faults",
        type=lambda text: [name for name in text.split(",") if name],
        metavar="A,B",
        help="only these may strike; none: an empty text",
    )
    parser.add_argument(
        "--jobs",
        type=_count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; default: one per core",
    )
    parser.add_argument("--mutants", action="store_true", help="hunt the deliberate bugs instead")
    parser.add_argument("--digests", action="store_true", help="print each history's digest")
    parser.add_argument("--list-faults", action="store_true", help="print their names")
    arguments = parser.parse_args()
    known = {fault.value for fault in Fault}
    if unknown := [name for name in arguments.faults or () if name not in known]:
        parser.error(f"no such fault: {', '.join(unknown)}; --list-faults shows them")
    return arguments


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _live(seed: int, faults: frozenset[Fault]) -> History | str:
    """Let one history pass; return what it was, or how it broke."""
    try:
        return World(seed, faults=faults).run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - told, and counted as a failure
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return f"{type(error).__name__}: {', '.join(map(str, error.args))}"


def _task(task: tuple[int, frozenset[Fault]]) -> tuple[int, History | str]:
    seed, faults = task
    return seed, _live(seed, faults)


def _run(arguments: argparse.Namespace, faults: frozenset[Fault]) -> int:
    figures, broken = Figures(), {}
    began, told = time.monotonic(), time.monotonic()
    tasks = [(arguments.first + number, faults) for number in range(arguments.seeds)]
    with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(tasks))) as pool:
        for done, (seed, history) in enumerate(pool.imap_unordered(_task, tasks), 1):
            if isinstance(history, str):
                broken[seed] = history
                print(f"seed {seed} BROKEN: {history}", flush=True)
            else:
                figures.add(history)
            if time.monotonic() - told >= 10:
                told = time.monotonic()
                left_s = (told - began) * (len(tasks) - done) / done
                print(f"{done} of {len(tasks)} seeds, {left_s:.0f} s left", file=sys.stderr)
    print(*figures.lines(), sep="\n")
    print(f"{time.monotonic() - began:.0f} s on {arguments.jobs} processes")
    if not broken:
        print("no invariant was broken")
        return 0
    seed = min(broken)
    print(f"{len(broken)} of {len(tasks)} seeds broke; looking for what seed {seed} needs ...")
    needed = ",".join(sorted(fault.value for fault in shrink(seed)))
    print(f"to see it again:\n  {_COMMAND} --from {seed} --faults '{needed}'")
    return 1


def _hunt(jobs: int) -> int:
    lost = 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for verdict in pool.imap(hunt, MUTANTS):
            lost += not verdict.found
            seeds = f"{verdict.seeds} of {verdict.mutant.seeds}"
            print(
                f"{verdict.mutant.name:<38} {seeds:>10} seeds  {verdict.symptom or 'NOT FOUND'}",
                flush=True,
            )
    print(f"{len(MUTANTS) - lost} of {len(MUTANTS)} mutants found")
    return 1 if lost else 0
