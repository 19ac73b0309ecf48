"""The benchmarks run: one tiny round of each, without peers. What their figures say is no matter for a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kafka_broker import run_kafka_broker

pytestmark = [pytest.mark.slow, pytest.mark.once]

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def goals_told_by(name: str, *options: str) -> dict[str, str]:
    """Run a benchmark; return goal -> what it says of it, such as `yes`."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), "--rounds", "1", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "NOT RUN: " not in done.stdout, done.stdout
    table = done.stdout.partition("## goals")[2]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[-1] for row in rows[2:]}


def test_the_core_benchmark_measures_its_goals(tmp_path: Path) -> None:
    cases = ("--cases", "jobs,waiting,growth,law")  # "stuck" waits for real deadlines
    options = ("--alone", *cases, "--jobs", "400", "--slots", "1,5", "--growth", "10,20")
    told = goals_told_by("core", *options, "--plots", str(tmp_path))

    assert set(told) == {"C1", "C2", "C3"}
    assert "?" not in told.values()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in-flight.svg", "job-cost.svg"]


def test_the_deadline_benchmark_measures_its_goals() -> None:
    told = goals_told_by("deadline", "--seconds", "0.4", "--gc", "tuned", "--cases", "C5")

    assert set(told) == {"C5"}
    assert "?" not in told.values()


def test_the_memory_benchmark_measures_its_goals(tmp_path: Path) -> None:
    options = ("--stations", "400", "--messages", "400", "--early", "100")
    told = goals_told_by("memory", *options, "--plots", str(tmp_path))

    assert set(told) == {"C4", "K3"}
    assert "?" not in told.values()
    assert [path.name for path in tmp_path.iterdir()] == ["long-run.svg"]


@pytest.mark.parametrize(("case", "goal"), [("upload", "K1"), ("ingest", "K2")])
def test_the_pipeline_benchmark_reaches_its_last_message(case: str, goal: str) -> None:
    with run_kafka_broker() as broker:
        place = ("--bootstrap", broker.bootstrap_servers, "--topic", broker.create_topic())
        told = goals_told_by("pipeline", "--alone", "--cases", case, "--messages", "60", *place)

    assert set(told) == {goal}
    assert told["K1"] == "?" if goal == "K1" else told["K2"] != "?"
