"""The page of the library's interface (docs/api.md) names whatever is public."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
LISTED = ("batcher", "embeddings", "kafka", "state", "testing", "testing.contracts")
WHOLE = ("abc", "batch", "errors", "events", "testing")


@pytest.mark.parametrize(
    "package", ["stationmaster", *(f"stationmaster.{name}" for name in LISTED)]
)
def test_every_public_name_of_a_package_has_its_entry(package: str) -> None:
    module = importlib.import_module(package)
    told = PAGE.read_text()
    whole = tuple(f"stationmaster.{name}" for name in WHOLE)
    missing = [
        name
        for name in module.__all__
        if not getattr(module, name).__module__.startswith(whole)
        and not re.search(rf"(members:|::).*\b{name}\b", told)
    ]
    assert not missing


@pytest.mark.parametrize("module", WHOLE)
def test_modules_that_are_public_as_a_whole_are_shown_as_a_whole(module: str) -> None:
    entry = rf"\.\. automodule:: stationmaster\.{module}\n   :members:\n"
    assert re.search(entry, PAGE.read_text())
