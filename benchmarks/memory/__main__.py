"""Memory of idle stations, and a long run: does a batch cost the same after many messages as after 10,000?

    pip install .
    python benchmarks/memory [--rounds 5] [--cases idle,long] [--messages 30000] [--plots FOLDER]

idle (C4): 20,000 stations that worked once and wait, each with its task, nursery, channel and scope; the growth of
the process's resident memory by station, and of what Python allocated (tracemalloc, in runs of its own). Beside it the
classic design on asyncio: a bounded queue and a task each.

long (K3): `--messages` messages of 20 out of 1,000 stations through the whole pipeline between a source and a sink in
memory; CPU per batch and resident memory of the last windows against those after 10,000 messages. One run, whatever
`--rounds` says; `--messages 1000000` takes as long as its line "messages/s" tells.
"""

import argparse
import pathlib
import random
import sys

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))

from harness.contenders import Contender, machine, take_turns  # noqa: E402
from harness.figures import Verdict, tell_errors, tell_table, tell_verdicts  # noqa: E402
from harness.plots import Line, Plot  # noqa: E402

STATIONS = 20_000
LONG_S = 4 * 3600.0


def idle(arguments, shuffler):
    sides = {"stationmaster": "run.py", "asyncio": "asyncio_side.py"}
    part = [
        Contender(
            f"{name}, {'tracemalloc' if traced else 'RSS'}",
            HERE / script,
            {"what": "idle", "stations": arguments.stations, "traced": traced},
        )
        for name, script in sides.items()
        for traced in (False, True)
    ]
    rounds = take_turns(part, rounds=arguments.rounds, shuffler=shuffler, title="idle")
    print(f"\n## {arguments.stations:,} idle stations\n")
    rows = [
        [
            name,
            f"{rounds.median(name, 'bytes'):.0f}",
            f"{min(rounds.all(name, 'bytes')):.0f} to {max(rounds.all(name, 'bytes')):.0f}",
            f"{rounds.median(name, 'full_gc_ms'):.0f}",
        ]
        for name in sorted(rounds.names())
    ]
    tell_table(["what", "bytes a station", "min to max", "a full garbage collection, ms"], rows)
    tell_errors(rounds)
    seen = rounds.median("stationmaster, RSS", "bytes")
    what = "resident memory of an idle station, its own nursery included"
    yield Verdict("C4", what, "<=", 8.0, None if seen is None else seen / 1000, "", " kB")


def long_run(arguments, shuffler):
    early = arguments.early
    if arguments.messages < 2 * early:
        sys.exit(f"--messages: at least {2 * early}")
    order = {"what": "long", "messages": arguments.messages, "early": early}
    part = [Contender("stationmaster", HERE / "run.py", order, limit_s=LONG_S)]
    rounds = take_turns(part, rounds=1, shuffler=shuffler, title="long")
    print(f"\n## long run: {arguments.messages:,} messages of 20 stations\n")
    tell_errors(rounds)
    (told,) = rounds.all("stationmaster", "windows") or [[]]
    if told:
        speed = rounds.median("stationmaster", "messages_per_s")
        print(f"{speed:.0f} messages/s, so 1,000,000 take {1e6 / speed / 60:.0f} minutes here\n")
        shown = told[:: max(1, len(told) // 10)]
        rows = [[f"{seen:,}", f"{cpu:.0f}", f"{kept / 1e6:.1f}"] for seen, cpu, kept in shown]
        tell_table(["after messages", "CPU, us a batch", "resident, MB"], rows)
        if arguments.plots:
            cpu = Line("CPU of a batch, us", [(seen, cpu) for seen, cpu, _ in told])
            kept = Line("resident memory, 10 kB", [(seen, kept / 1e4) for seen, _, kept in told])
            Plot("A long run: cost and memory", "messages", "us, 10 kB", [cpu, kept]).write(
                arguments.plots / "long-run.svg"
            )
    for what, figure in (("CPU of a batch", "cpu_us"), ("resident memory", "bytes")):
        seen = rounds.ratio("stationmaster", "stationmaster", f"late_{figure}", f"early_{figure}")
        words = f"{what} after {arguments.messages:,} messages to after {early:,}"
        yield Verdict("K3", words, "<=", 1.1, seen)


CASES = {"idle": idle, "long": long_run}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--stations", type=int, default=STATIONS)
    parser.add_argument("--messages", type=int, default=30_000)
    parser.add_argument("--early", type=int, default=10_000, help="messages before the first look")
    parser.add_argument("--plots", type=pathlib.Path, help="folder for SVG files")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    wanted = arguments.cases.split(",")
    if unknown := set(wanted) - set(CASES):
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    print(machine("trio"))
    shuffler = random.Random(arguments.seed)
    tell_verdicts([each for name in wanted for each in CASES[name](arguments, shuffler)])


main()
