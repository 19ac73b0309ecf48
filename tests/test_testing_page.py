"""Every block of docs/testing.md is a file of tests that passes as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from stationmaster.testing import contracts

PAGE = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_blocks_of_the_page_pass_in_the_project_that_it_describes(tmp_path: Path) -> None:
    [settings] = blocks("toml")
    (tmp_path / "pyproject.toml").write_text(settings)
    for number, block in enumerate(blocks("python")):
        (tmp_path / f"test_block_{number}.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "-v"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
    for number in range(len(blocks("python"))):
        assert f"test_block_{number}.py::" in done.stdout, "a block without a test shows nothing"


COMMANDS = sorted(
    set(re.findall(r"^\$ python -m (tests\.\w+) (.*?)(?: +#.*)?$", PAGE, re.MULTILINE))
)


@pytest.mark.parametrize(("module", "options"), COMMANDS, ids=lambda part: part)
def test_a_command_of_the_page_has_the_options_that_it_is_shown_with(
    module: str, options: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert all(option in done.stdout for option in re.findall(r"--[\w-]+", options))


def test_there_is_no_block_that_is_not_run() -> None:
    known = len(blocks("python")) + len(blocks("console")) + 1
    assert len(re.findall(r"^```\w+$", PAGE, re.MULTILINE)) == known
    told = "".join(blocks("console")).splitlines()
    assert {line.split()[1] for line in told} == {"python", "pip"}
    assert {module for module, _ in COMMANDS} == {"tests.simulation", "tests.fuzzing"}


def test_the_page_names_every_contract_suite() -> None:
    assert all(f"| `{name}` |" in PAGE for name in contracts.__all__)
