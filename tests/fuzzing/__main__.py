"""`python -m tests.fuzzing`: inputs that nobody foresaw, for as long as one likes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzzing.running import RUNNERS, replay, run_target, tell_at_once

_USAGE = """
The inputs follow from the seed: the same command makes the same inputs on every machine. What shows a bug is written
to a file, with the command that shows it again. The exit code is 0 without bugs, and if memory stayed flat.

    python -m tests.fuzzing --inputs 20000                          every target, some minutes
    python -m tests.fuzzing --inputs 1000000 --target messages      the parser at length
    python -m tests.fuzzing --inputs 1000000 --target pipeline      the same messages through the whole pipeline
    python -m tests.fuzzing --target answers --engine atheris --seconds 300
                                                                    guided by coverage; needs the group `fuzz`
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzzing",
        description=__doc__,
        epilog=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=20_000, help="of each target (20000)")
    parser.add_argument(
        "--target", action="append", choices=RUNNERS, help="one, or several; all if none is named"
    )
    parser.add_argument("--seed", type=int, default=1, help="other seeds, other inputs (1)")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--seconds", type=int, default=60, help="of a run of atheris (60)")
    parser.add_argument(
        "--file", type=Path, help="inputs that showed a bug of the one target named"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(".fuzzing"), help="for what shows a bug (.fuzzing)"
    )
    options = parser.parse_args()
    targets: list[str] = options.target or list(RUNNERS)
    if options.file is not None or options.engine == "atheris":
        if len(targets) != 1:
            parser.error("--file and --engine atheris are for exactly one --target")
        if options.file is not None:
            tell_at_once(f"no bug: {dict(replay(targets[0], options.file))}")
            return 0
        from tests.fuzzing.guided import run_guided

        return run_guided(
            targets[0], seconds=options.seconds, seed=options.seed, folder=options.folder
        )
    tallies = [
        run_target(
            target,
            inputs=options.inputs,
            seed=options.seed,
            folder=options.folder,
            tell=tell_at_once,
        )
        for target in targets
    ]
    bugs = sum(len(tally.bugs) for tally in tallies)
    total = sum(tally.inputs for tally in tallies)
    grew = any(tally.grew for tally in tallies)
    tell_at_once(f"{total} inputs, {bugs} bugs, memory {'GREW' if grew else 'flat'}")
    return 1 if bugs or grew else 0


if __name__ == "__main__":
    sys.exit(main())
