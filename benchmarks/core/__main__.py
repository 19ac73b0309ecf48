"""What a station job costs: the project's whole pipeline against the classic design on asyncio and uvloop.

    pip install .
    python benchmarks/core [--rounds 7] [--cases jobs,waiting,growth,law,stuck] [--plots FOLDER]

Between a source and a sink in memory, so that nothing but the core is measured. Both sides parse, hand each station of
a batch its job, run a handler that lets the scheduler pass once, encode the result, upload once per batch and account
for the offset after it. The project does it with all limits on. The asyncio sides run in an environment of their own
under .cache/peers (uvloop, orjson). Every run is a process of its own; the order is shuffled each round; what is told
are medians of the ratios within a round.
"""

import argparse
import pathlib
import random
import sys

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))

from cases import CASES  # noqa: E402
from harness.contenders import machine  # noqa: E402
from harness.figures import tell_verdicts  # noqa: E402
from harness.peers import environments, tell_peers  # noqa: E402

GROWTH = (10, 30, 100, 300, 1000)
SLOTS = (1, 2, 5, 10, 20, 50, 100, 200)
REQUIREMENTS = {"uvloop": ["uvloop==0.23.0", "orjson==3.13.0"]}


def numbers(words):
    return tuple(map(int, words.split(",")))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--jobs", type=int, default=20_000, help="station jobs of one run")
    parser.add_argument("--growth", type=numbers, default=GROWTH, help="stations, for growth")
    parser.add_argument("--slots", type=numbers, default=SLOTS, help="batches in flight, for law")
    parser.add_argument("--plots", type=pathlib.Path, help="folder for SVG files")
    parser.add_argument("--alone", action="store_true", help="install nothing: no uvloop")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    wanted = arguments.cases.split(",")
    if unknown := set(wanted) - set(CASES):
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    peers = {} if arguments.alone else environments(REQUIREMENTS)
    print(machine("trio", "orjson"))
    tell_peers(REQUIREMENTS, peers)
    shuffler = random.Random(arguments.seed)
    verdicts = []
    for name in wanted:
        verdicts += CASES[name](peers, arguments, shuffler)
    tell_verdicts(verdicts)


main()
