"""Every example runs alone, and the README says nothing that is not so."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from stationmaster.service.cli import command_line

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()


def run_example(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_alone(name: str) -> None:
    assert run_example(name).strip()


def test_a_stuck_station_is_named_and_its_batches_leave_on_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # On a clock of its own: a busy machine makes no other station late. (That it runs as it is, is tested above.)
    main = runpy.run_path(str(ROOT / "examples" / "embed_in_app.py"))["main"]
    trio.run(main, clock=MockClock(autojump_threshold=0))
    lines = capsys.readouterr().out.splitlines()

    assert len(lines) == 4
    # The first batch waits for it; the next ones too, or it is known by then to be hopeless.
    first, *rest = (line.partition(": closed by ")[2] for line in sorted(lines[:3]))
    assert re.fullmatch(r"deadline after 0\.5 s, without {'S003': 'timedOut'}", first)
    for line in rest:
        assert re.fullmatch(
            r"(deadline|complete) after [\d.]+ s, without {'S003': '(timedOut|rejected)'}", line
        )


def test_the_readme_program_names_things_that_exist() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    tree = ast.parse(program)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names = ", ".join(alias.name for alias in node.names)
            exec(f"from {node.module} import {names}", {})


def test_the_readme_names_commands_and_files_that_exist() -> None:
    commands = set(
        re.findall(r"stationmaster (demo|run|check-config|replay|[a-z-]+-[a-z]+) ", README)
    )

    assert {"check-config", "run"} <= commands <= set(command_line.commands)
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_ci_script_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()

    assert "<!-- test command -->\n```console\n$ python3 -m venv" in README
    assert "<!-- test command -->" in script
