"""A real model server of other people: infinity with its debug engine, whose vector is the text's length.

These tests run with `pytest tests/infinity` or `pytest -m infinity`, not in a plain `pytest`: the server is 200 MB of
packages, in an environment of its own (`.cache/infinity`, made by the first run). Where that cannot be made they skip,
saying why; with STATIONMASTER_REQUIRE_INFINITY=1 they fail instead.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.infinity.server import UnavailableError, install

_HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out unless it was asked for."""
    named = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    if "infinity" in config.option.markexpr or any(
        _HERE in (path, *path.parents) for path in named
    ):
        return None  # as usual
    return True


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test of this folder."""
    item.add_marker("infinity")


@pytest.fixture(scope="session")
def infinity_program() -> Path:
    """Give the program `infinity_emb`."""
    try:
        return install()
    except UnavailableError as error:
        if os.environ.get("STATIONMASTER_REQUIRE_INFINITY") == "1":
            raise
        pytest.skip(f"no infinity here: {error}")
