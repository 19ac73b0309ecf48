"""Mutation testing of core, poller, uploader and state: which changes to single operators do the tests notice?

    python -m pip install -e '.[service]' --group mutation      in an environment of its own, pip >= 25.1
    python .ci/mutation.py run --max-children 2                 hours; again: it goes on where it stopped
    python .ci/mutation.py run 'stationmaster.poller.*'         one file
    python .ci/mutation.py table                                the figures so far, file by file
    python .ci/mutation.py results                              the survivors; `show NAME` prints one

This is mutmut (`[tool.mutmut]` in pyproject.toml) with three changes:

1. It passes decorated functions over. Here context managers, properties and their like are mutated too.
2. The order is random, by a seed: whatever is done when time is up is a fair sample of every file.
3. Each test has a minute. A mutant that hangs (most do so on a virtual clock, where nothing ever comes) is counted as
   a time-out, apart from those that a test saw.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIMIT_S = 60
_TIMED_OUT = 36  # mutmut's code
_ON_TOP = {"asynccontextmanager", "contextmanager", "property"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Give a test its minute; this file is a plugin of the pytest runs as well."""
    if os.environ.get("MUTANT_UNDER_TEST") in {None, "", "stats", "fail"}:
        return (yield)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(_TIMED_OUT))
    signal.alarm(_LIMIT_S)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def _mutate_decorated_functions() -> None:
    """Put mutmut's trampoline under the decorators."""
    import libcst as cst  # noqa: PLC0415 - where only pytest wants this file there may be none
    from mutmut.mutation import file_mutation  # noqa: PLC0415

    skips = file_mutation.MutationVisitor._skip_node_and_children  # noqa: SLF001
    arrange = file_mutation.function_trampoline_arrangement

    def is_known(node: Any) -> bool:  # noqa: ANN401
        return (
            isinstance(node, cst.FunctionDef)
            and bool(node.decorators)
            and all(
                isinstance(item.decorator, cst.Name) and item.decorator.value in _ON_TOP
                for item in node.decorators
            )
        )

    def skip(visitor: Any, node: Any) -> bool:  # noqa: ANN401
        return not is_known(node) and skips(visitor, node)

    def arranged(function: Any, mutants: Any, class_name: str | None) -> Any:  # noqa: ANN401
        if not is_known(function):
            return arrange(function, mutants, class_name)
        bare = function.with_changes(decorators=[])
        empty, nodes, table, names = arrange(bare, mutants, class_name)
        door = nodes[0].with_changes(decorators=[*function.decorators, *nodes[0].decorators])
        return empty, [door, *nodes[1:]], table, names

    file_mutation.MutationVisitor._skip_node_and_children = skip  # noqa: SLF001
    file_mutation.function_trampoline_arrangement = arranged


def _print_table() -> None:
    """Print the figures file by file. The score is of those that were tried; time-outs count as killed."""
    from mutmut.stats import status_by_exit_code  # noqa: PLC0415

    kinds = ("killed", "timeout", "survived", "no tests", "not checked")
    print(f"{'':28}{'mutants':>9}" + "".join(f"{kind:>13}" for kind in kinds) + f"{'score':>9}")
    total: Counter[str] = Counter()
    found = {
        meta.relative_to("mutants/src/stationmaster"): Counter(
            status_by_exit_code[code]
            for code in json.loads(meta.read_text())["exit_code_by_key"].values()
        )
        for meta in sorted(Path("mutants/src").rglob("*.meta"))
    }
    for counts in found.values():
        total += counts
    for name, counts in [*found.items(), ("all", total)]:
        tried = counts.total() - counts["not checked"]
        if tried:
            seen = tried - counts["survived"] - counts["no tests"]
            numbers = "".join(f"{counts[kind]:13}" for kind in kinds)
            print(
                f"{str(name).removesuffix('.meta'):28}{counts.total():9}{numbers}{seen / tried:9.1%}"
            )


def main() -> None:
    """Run mutmut's command line, or print the table."""
    if sys.argv[1:] == ["table"]:
        _print_table()
        return
    import mutmut.__main__ as command  # noqa: PLC0415

    _mutate_decorated_functions()
    command.estimated_worst_case_time = lambda name: hashlib.sha256(name.encode()).hexdigest()
    command.cli()


if __name__ == "__main__":
    main()
