"""Each station's last outcome, in slots."""

from __future__ import annotations

from stationmaster.batch import Outcome, StationResult
from stationmaster.service.station_grid import CODES, OUTCOMES, StationGrid


def results(**outcomes: Outcome) -> list[StationResult]:
    return [StationResult(name, outcome) for name, outcome in outcomes.items()]


def test_every_outcome_has_a_letter_of_its_own() -> None:
    assert set(CODES) == set(Outcome)
    assert {CODES[Outcome(value)]: value for value in OUTCOMES.values()} == OUTCOMES
    assert len(OUTCOMES) == len(Outcome)


def test_a_station_keeps_its_slot_and_shows_its_last_outcome() -> None:
    grid = StationGrid()
    grid.take(results(A=Outcome.SUCCEEDED, B=Outcome.FAILED))
    grid.take(results(B=Outcome.SUCCEEDED, C=Outcome.MISSING))

    assert list(grid.rows()) == [("A", "s"), ("B", "s"), ("C", "m")]
    assert len(grid) == 3
    assert grid.counts() == {
        "succeeded": 2,
        "noOutput": 0,
        "failed": 0,
        "timedOut": 0,
        "missing": 1,
        "rejected": 0,
    }
    assert grid.piece(1, 5) == (["B", "C"], "sm")


def test_changes_are_told_once_and_only_if_something_changed() -> None:
    grid = StationGrid()
    grid.take(results(A=Outcome.SUCCEEDED, B=Outcome.SUCCEEDED))
    assert grid.take_changes() == [(0, "A", "s"), (1, "B", "s")]

    grid.take(results(A=Outcome.SUCCEEDED, B=Outcome.TIMED_OUT))
    grid.take(results(B=Outcome.REJECTED))
    assert grid.take_changes() == [(1, "B", "r")]
    assert grid.take_changes() == []


def test_a_full_grid_gives_new_stations_the_slots_of_others_in_turn() -> None:
    grid = StationGrid(slots=2)
    grid.take(results(A=Outcome.SUCCEEDED, B=Outcome.SUCCEEDED))
    grid.take_changes()
    grid.take(results(C=Outcome.FAILED))
    assert list(grid.rows()) == [("C", "f"), ("B", "s")]
    assert grid.take_changes() == [(0, "C", "f")]

    grid.take(results(A=Outcome.NO_OUTPUT, C=Outcome.SUCCEEDED, D=Outcome.SUCCEEDED))
    # D took C's slot in its turn, after A had taken B's.
    assert list(grid.rows()) == [("D", "s"), ("A", "n")]
    assert grid.displaced == 3
    assert grid.take_changes() == [(0, "D", "s"), (1, "A", "n")]


def test_a_hundred_thousand_unknown_stations_take_no_more_than_the_slots() -> None:
    grid = StationGrid(slots=100)
    for first in range(0, 100_000, 1_000):
        grid.take([StationResult(f"X{first + n}", Outcome.FAILED) for n in range(1_000)])

    assert len(grid) == 100
    assert len(grid.take_changes()) == 100
    assert grid.displaced == 99_900
    assert grid.counts()["failed"] == 100
