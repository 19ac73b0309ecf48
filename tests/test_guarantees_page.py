"""The page of guarantees names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda part: part)
def test_a_test_that_a_promise_names_is_there(path: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("promise", range(1, 9))
def test_each_promise_is_backed_by_two_tests_at_least(promise: int) -> None:
    section = PAGE.split(f"\n## {promise}. ")[1].split("\n## ")[0]
    assert len(re.findall(r"::\w+`", section)) >= 2


def test_every_file_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+(?:\.py|/))`", PAGE)
    assert named
    assert all((ROOT / path).exists() for path in named)
