"""A process that runs contenders in the environment of its interpreter: an order a line in, what it told a line out.

python worker.py MODULE [PACKAGE ...]
"""

import gc
import importlib
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version


def main():
    module, *packages = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some peers print
    side = importlib.import_module(module)
    _tell(answers, {"python": platform.python_version(), **_versions(packages)})
    seen = set()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if (order["contender"], order["loop"]) not in seen:
                seen.add((order["contender"], order["loop"]))
                side.run(order | {"warm_s": 0.0, "run_s": 0.15, "callers": 1})
                gc.collect()
                gc.freeze()  # big peers import much: that is not what a request costs
            told = side.run(order)
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"[:300]}
        _tell(answers, told)


def _versions(packages):
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _tell(answers, told):
    answers.write(json.dumps(told) + "\n")
    answers.flush()


main()
