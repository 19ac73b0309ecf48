"""How late batches are decided after their deadline: 1,000 stations, 50 batches in flight, in each a stuck station.

    pip install .
    python benchmarks/deadline [--rounds 5] [--seconds 8] [--cpu 0.75]

A batch of 100 stations every 20 ms, a deadline of 1 s, and in every batch one station whose handler hangs: all run into
their deadline. The handlers of the others sleep 5 to 25 ms and then use the CPU for as long as makes `--cpu` of one
processor altogether: a run without that work is the measure for it. C6 is the same while a batch of 10,000 stations
lands every two seconds; counted are the batches that are decided while it is open.

Lateness is what the pipeline tells its observer: from the deadline to the decision to upload, on trio's clock. That
clock is one of our own here (CPU time used + time asked to sleep), so that other load on the machine does not count; in
further runs it is trio's, and the wall time stands beside it. All runs take turns in a shuffled order.

The garbage collector: "as it is"; "tuned" is frozen once the stations live, and called more rarely from then on
(`gc.freeze()`, `gc.set_threshold(5_000, 20, 1000)`); "off" shows what is left without it.
"""

import argparse
import itertools
import pathlib
import random
import sys

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))

from harness.contenders import Contender, machine, take_turns  # noqa: E402
from harness.figures import Verdict, percentile, tell_errors, tell_table, tell_verdicts  # noqa: E402

BARE_S = 4.0  # two large batches
COLLECTORS = ("as it is", "tuned", "off")
CLOCKS = ("core", "wall")
GOALS_MS = {"C5": 3.0, "C6": 5.0}
BIG = {"C5": False, "C6": True}
COUNTED = {"C5": "lateness_s", "C6": "beside_big_s"}
WHAT = {
    "C5": "p99 of deadline -> upload decision",
    "C6": "the same while a batch of 10,000 stations is open",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    parser.add_argument("--cpu", type=float, default=0.75, help="share of one processor")
    parser.add_argument("--cases", default="C5,C6")
    parser.add_argument("--gc", default=",".join(COLLECTORS), help="ways of the garbage collector")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    wanted = arguments.cases.split(",")
    if unknown := set(wanted) - set(GOALS_MS):
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    collectors = arguments.gc.split(",")
    if unknown := set(collectors) - set(COLLECTORS):
        sys.exit(f"no such way of the garbage collector: {', '.join(sorted(unknown))}")
    print(machine("trio"))
    part = []
    for case in wanted:
        order = {"big": BIG[case], "seed": arguments.seed}
        bare = order | {"clock": "core", "seconds": min(BARE_S, arguments.seconds)}
        spin_s = work_for(arguments.cpu, bare)
        for clock, collector in itertools.product(CLOCKS, collectors):
            told = order | {"seconds": arguments.seconds, "spin_s": spin_s}
            told |= {"clock": clock, "gc": collector}
            part.append(Contender(f"{case}, {clock}, gc {collector}", HERE / "run.py", told))
    shuffler = random.Random(arguments.seed)
    rounds = take_turns(part, rounds=arguments.rounds, shuffler=shuffler, title="deadline")
    tell(rounds, wanted)
    tell_verdicts(judge(rounds, wanted, collectors))


def work_for(cpu, order):
    """Return the seconds of CPU that each job must use besides, to come to this share of a processor."""
    bare = Contender("bare", HERE / "run.py", order | {"spin_s": 0.0, "gc": "as it is"}).run()
    if "error" in bare:
        sys.exit(f"the bare run failed: {bare['error']}")
    # No more than there is to share: a bare run that is hotter already stays as it is.
    return max(0.0, cpu - bare["cpu"]) * bare["seconds"] / bare["jobs"]


def tell(rounds, wanted):
    print("\n## deadline -> decision, ms; all rounds together\n")
    rows = []
    for name in sorted(rounds.names()):
        case = name.partition(",")[0]
        late = _lateness_ms(rounds, name, COUNTED[case])
        if case in wanted and late:
            row = [
                name,
                len(late),
                *(f"{percentile(late, share):.2f}" for share in (0.5, 0.9, 0.99, 1)),
            ]
            row.append(f"{rounds.median(name, 'cpu'):.0%}")
            row.append(f"{rounds.median(name, 'succeeded'):.2%}")
            row.append(f"{rounds.median(name, 'longest_gc_s') * 1000:.1f}")
            rows.append(row)
    headings = ["case, clock, gc", "batches", "p50", "p90", "p99", "max", "CPU"]
    tell_table([*headings, "healthy stations that succeeded", "longest GC, ms"], rows)
    tell_errors(rounds)


def judge(rounds, wanted, collectors):
    for case in wanted:
        for collector in collectors:
            late = _lateness_ms(rounds, f"{case}, core, gc {collector}", COUNTED[case])
            wall = _lateness_ms(rounds, f"{case}, wall, gc {collector}", COUNTED[case])
            beside = f"{percentile(wall, 0.99):.2f} ms by the wall" if wall else ""
            seen = percentile(late, 0.99) if late else None
            what = f"{WHAT[case]}, gc {collector}"
            yield Verdict(case, what, "<=", GOALS_MS[case], seen, beside, " ms")


def _lateness_ms(rounds, name, figure):
    return [late * 1000 for run in rounds.all(name, figure) for late in run]


main()
