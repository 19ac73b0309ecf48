"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from stationmaster.service.cli import command_line, run_command_line
from stationmaster.service.shutdown import EXIT_CONFIG, EXIT_INTERNAL, EXIT_OK, EXIT_USAGE

if TYPE_CHECKING:
    from pathlib import Path

SIX_FAULTS = """
[source]
kind = "kafak"
[batch]
deadline_s = -1
quorum = 2.0
[stations]
handler = "no_colon"
[upload]
url = "ftp://example.test/batches"
[shutdown]
grace = 15.0
"""


def run_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["stationmaster", *arguments])
    return run_command_line()


@pytest.mark.parametrize("command", [None, *sorted(command_line.commands)])
def test_every_command_explains_itself(
    command: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "--help"] if command else ["--help"]

    assert run_with(monkeypatch, *words) == EXIT_OK
    assert "Usage: stationmaster" in capsys.readouterr().out


def test_a_wrong_option_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, "run", "--konfig", "x") == EXIT_USAGE
    assert "No such option" in capsys.readouterr().err


def test_six_faults_are_six_lines_with_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(SIX_FAULTS)

    assert run_with(monkeypatch, "check-config", str(file)) == EXIT_CONFIG
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "source.kind",
        "batch.deadline_s",
        "batch.quorum",
        "stations.handler",
        "upload.url",
        "shutdown.grace",
    ]


def test_a_missing_file_is_a_fault_of_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.toml"

    assert run_with(monkeypatch, "run", "--config", str(missing)) == EXIT_CONFIG
    assert str(missing) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stationmaster.toml", "seed-compat.toml"])
def test_the_shipped_configurations_are_fine(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, "check-config", f"config/{name}") == EXIT_OK
    assert "fine" in capsys.readouterr().out


def test_the_effective_configuration_can_be_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--print", "--set", "batch.deadline_s=2.5")

    assert run_with(monkeypatch, "check-config", "config/stationmaster.toml", *arguments) == EXIT_OK
    assert "deadline_s = 2.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ("no.such.module:handle", "cannot be imported"),
        ("tests.service.handlers:missing", "has no 'missing'"),
        ("tests.service.handlers:NOT_A_HANDLER", "expected `async def handle(station)`"),
        ("tests.service.handlers:not_async", "not_async is a plain function; expected"),
        ("tests.service.handlers:open_number", "int is no function; expected"),
        ("tests.service.handlers:make_number", "expected an async context manager"),
        ("tests.service.broken_module:handle", "its module fails with ZeroDivisionError"),
    ],
)
def test_a_handler_that_is_none_is_a_fault_of_configuration(
    handler: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    file = tmp_path / "replay.toml"
    file.write_text(
        f'[source]\nkind = "file"\n[file]\npath = "{tmp_path}/empty.jsonl"\n'
        f'[stations]\nhandler = "{handler}"\n[upload]\nurl = "http://127.0.0.1:9/"\n'
        f'[outbox]\npath = "{tmp_path}/state.db"\n'
    )

    assert run_with(monkeypatch, "run", "--config", str(file)) == EXIT_CONFIG
    error = capsys.readouterr().err
    assert error.startswith("stations.handler: ")
    assert words in error


def test_a_file_that_cannot_be_read_ends_a_replay_with_one_plain_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing.jsonl")
    state = f"outbox.path={tmp_path}/state.db"
    arguments = ("replay", missing, "--config", "config/stationmaster.toml", "--set", state)

    assert run_with(monkeypatch, *arguments) == EXIT_INTERNAL
    error = capsys.readouterr().err
    assert missing in error
    assert "Traceback" not in error


def test_without_the_service_packages_the_command_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['click'] = None; from stationmaster.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 1
    assert "stationmaster[service]" in done.stderr
