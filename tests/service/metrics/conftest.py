"""promtool comes with Debian's package `prometheus`. Without it the tests that want it skip; with
STATIONMASTER_REQUIRE_PROMTOOL=1 they fail instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    """Give a function that runs promtool, and returns what it said; a complaint fails the test."""
    program = shutil.which("promtool")
    if program is None:
        why = "no promtool here: apt-get install --no-install-recommends prometheus"
        if os.environ.get("STATIONMASTER_REQUIRE_PROMTOOL") == "1":
            pytest.fail(why)
        pytest.skip(why)

    def run(*arguments: str, stdin: bytes = b"") -> str:
        done = subprocess.run(
            [program, *arguments],
            input=stdin,
            capture_output=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == 0, said
        return said

    return run
