"""A run guided by coverage: atheris looks for inputs that reach new lines of our readers. Needs the group `fuzz`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from types import FunctionType
from typing import TYPE_CHECKING, Final

from tests.fuzzing.running import (
    RUNNERS,
    make_inputs,
    tell_at_once,
    write_bug,
)
from tests.fuzzing.seeds import maker_of

if TYPE_CHECKING:
    from types import ModuleType

_INSTRUMENTED: Final = (
    "stationmaster.messages",
    "stationmaster.http_words",
    "stationmaster.sinks",
    "stationmaster.embeddings",
    "stationmaster.service.config",
    "stationmaster.service.tracing.spans",
    "stationmaster.state",
)
"""Modules, with all that begin like them: what reads. The rest would only make it slower."""
_FIRST_INPUTS: Final = 300
_LARGEST_INPUT: Final = 4_096


def run_guided(target: str, *, seconds: int, seed: int, folder: Path) -> int:
    """Run atheris on a target for so long, in a process of its own: it leaves by exiting.

    Returns:
        The exit code: 0 without a bug.
    """
    if importlib.util.find_spec("atheris") is None:
        tell_at_once("atheris is not installed: pip install --group fuzz (pip 25.1 or later)")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(make_inputs(target, seed, 0, _FIRST_INPUTS)):
            (Path(corpus) / f"seed-{number}").write_bytes(data[:_LARGEST_INPUT])
        command = [sys.executable, "-m", "tests.fuzzing.guided", target, str(folder), corpus]
        command += [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={_LARGEST_INPUT}"]
        command += ["-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"]
        command += [f"-artifact_prefix={folder}/"]
        return subprocess.run(command, check=False).returncode


def _instrument() -> None:
    """Instrument the functions of what reads; the modules are loaded, so their functions get new code."""
    import atheris

    functions = [
        function
        for name, module in list(sys.modules.items())
        if name.startswith(_INSTRUMENTED)
        for names in (vars(module), *(vars(each) for each in _classes_of(module)))
        for function in names.values()
        if isinstance(function, FunctionType) and function.__module__ == name
    ]
    for function in functions:
        atheris.instrument_func(function)
    tell_at_once(f"{len(functions)} functions instrumented")


def _classes_of(module: ModuleType) -> list[type]:
    return [
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__
    ]


def main() -> None:
    """Be the process that atheris runs in."""
    import atheris

    target, folder, *options = sys.argv[1:]
    run, _ = RUNNERS[target]
    maker = maker_of(target)

    def once(data: bytes) -> None:
        try:
            run([data])
        except Exception:
            write_bug(target, [data], folder=Path(folder), tell=tell_at_once)
            raise

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        """Change it by structure as often as by bytes."""
        rng = Random(seed)
        if rng.randrange(2):
            return atheris.Mutate(data, most)  # type: ignore[no-any-return]
        return maker.change(data, rng)[:most]

    _instrument()
    atheris.Setup([sys.argv[0], *options], once, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
