"""The contract suites run in a project of somebody else, whatever its settings."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.testing import contracts

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

A_PROJECT = """
from contextlib import asynccontextmanager

import trio

from stationmaster.abc import Accepted
from stationmaster.testing import RecordingSink
from stationmaster.testing.contracts import SinkContract


class TestSink(SinkContract):
    @asynccontextmanager
    async def open(self):
        self.sink = RecordingSink()
        yield self.sink

    async def kept(self):
        return list(self.sink.reports)


class TestForgetfulSink(TestSink):
    async def kept(self):
        return []
"""


def run_project(folder: Path, *options: str) -> str:
    (folder / "test_sink.py").write_text(A_PROJECT)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=60
    ).stdout


@pytest.mark.parametrize(
    "options",
    [("-p", "no:trio"), (), ("-o", "trio_mode=true")],
    ids=["without pytest-trio", "with it", "in its mode"],
)
def test_a_suite_runs_in_a_project_with_any_settings_and_shows_what_it_compared(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    told = run_project(tmp_path, "-W", "error", *options)

    assert "4 failed, 6 passed" in told, told
    assert "TestSink::" not in told
    assert "TestForgetfulSink::test_an_accepted_batch_stands_in_the_target" in told
    assert "assert [] == ['b1']" in told  # the assertions of an installed package are explained too
    assert "ExceptionGroup" not in told


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_without_pytest_the_suites_say_what_they_need_and_the_fakes_need_nothing() -> None:
    absent = ["pytest", "pytest_trio", "hypercorn", "confluent_kafka", "starlette", "structlog"]
    block = f"import sys; sys.modules.update(dict.fromkeys({absent})); "

    fakes = run_python(block + "import stationmaster.testing, stationmaster.testing.server")
    suites = run_python(block + "import stationmaster.testing.contracts")

    assert fakes.returncode == 0, fakes.stderr
    assert "ImportError: stationmaster.testing.contracts needs pytest" in suites.stderr


@pytest.mark.parametrize("suite", contracts.__all__)
def test_what_a_suite_was_not_given_is_named(suite: str) -> None:
    """Those methods that are not there for pytest, and do nothing by themselves."""
    made = getattr(contracts, suite)()
    given: dict[str, tuple[Any, ...]] = {
        name: ()
        for name in ("open", "kept", "will", "put", "clear", "committed", "rival")
        if hasattr(made, name)
    }
    given |= {"reached": (1,)} if hasattr(made, "reached") else {}
    for name, arguments in given.items():
        with pytest.raises(NotImplementedError):
            getattr(made, name)(*arguments).send(None)


async def test_an_embedder_without_a_breaker_may_be_asked_again_at_once(
    autojump_clock: MockClock,
) -> None:
    await contracts.RemoteEmbedderContract().rested()
    assert trio.current_time() == 0
