"""The shipped units, as systemd's own tools judge them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "config" / "systemd"
_INSTALLED = "/opt/stationmaster/bin/stationmaster"
_MOST_EXPOSURE = 1.2


@pytest.fixture(scope="module")
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        if os.environ.get("STATIONMASTER_REQUIRE_SYSTEMD") == "1":
            pytest.fail("STATIONMASTER_REQUIRE_SYSTEMD=1, and there is no systemd-analyze")
        pytest.skip("no systemd-analyze; on Debian it comes with the package systemd")
    return found


@pytest.fixture
def instance(tmp_path: Path) -> Path:
    """Return a folder with the units of an instance whose program exists."""
    for unit in UNITS.glob("stationmaster@.*"):
        text = unit.read_text().replace(_INSTALLED, sys.executable)
        (tmp_path / unit.name.replace("@", "@air")).write_text(text)
    return tmp_path


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["service", "socket"])
def test_systemd_finds_nothing_wrong_with_a_unit(analyze: str, instance: Path, kind: str) -> None:
    unit = str(instance / f"stationmaster@air.{kind}")
    assert run(analyze, "verify", "--man=no", "--recursive-errors=no", unit) == (0, "")


def test_systemd_finds_what_is_wrong_with_a_unit(analyze: str, instance: Path) -> None:
    unit = instance / "stationmaster@air.service"
    unit.write_text(f"{unit.read_text()}\n[Service]\nWatchdogSec=often\n")
    assert "often" in run(analyze, "verify", "--man=no", str(unit))[1]


def test_the_service_is_as_little_exposed_as_is_told(analyze: str, instance: Path) -> None:
    unit = str(instance / "stationmaster@air.service")
    threshold = f"--threshold={round(_MOST_EXPOSURE * 10)}"
    code, said = run(analyze, "security", "--offline=true", threshold, unit)
    assert code == 0, said[-300:]


def test_the_exposure_is_judged_at_all(analyze: str, instance: Path) -> None:
    unit = str(instance / "stationmaster@air.service")
    assert run(analyze, "security", "--offline=true", "--threshold=5", unit)[0] != 0


def test_no_key_of_a_unit_is_given_twice_by_mistake() -> None:
    may_repeat = {"LoadCredential", "SystemCallFilter", "ExecReload"}
    for unit in UNITS.glob("stationmaster@.*"):
        keys = re.findall(r"^([A-Za-z]+)=", unit.read_text(), re.MULTILINE)
        assert not {key for key in keys if keys.count(key) > 1} - may_repeat
