"""What the settings of the mutation testing name is there: a renamed file would not be mutated, or not tested."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_file_that_the_settings_name_is_there() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    named = settings["only_mutate"] + settings["pytest_add_cli_args_test_selection"]
    assert len(named) > 50
    assert [name for name in named if not list(ROOT.glob(name))] == []
