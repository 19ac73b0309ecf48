"""The watchdog alone: a partition's silence against what the broker and the client know of its log."""

from __future__ import annotations

import attrs
import pytest

from stationmaster.kafka.assignment import Assignment, Holding
from stationmaster.kafka.watchdog import HOPELESS, Watchdog

LIMIT_S = 30.0
MOMENT_S = 5.0


@attrs.define(eq=False)
class Watched:
    """Partitions under a watchdog, a clock that goes in seconds, and a broker that answers at once."""

    dog: Watchdog = attrs.field(factory=lambda: Watchdog(LIMIT_S))
    assignment: Assignment = attrs.field(factory=Assignment)
    ends: dict[Holding, int | None] = attrs.field(factory=dict)
    now: float = 1000.0
    asked: int = 0

    def read_to(self, position: int, *, end: int | None, fetched: int | None) -> Holding:
        """Hold one more partition that was read so far."""
        holding = self.assignment.hold(("t", len(self.ends)))
        holding.position = position
        holding.fetched = fetched
        self.ends[holding] = end
        return holding

    def spend(self, seconds: float, *, heard: bool = True) -> list[tuple[Holding, int]]:
        """Look every second; return what stalled."""
        stalled = []
        for _ in range(int(seconds)):
            self.now += 1
            stalled += self.dog.look(self.assignment.holdings, self.now, heard=heard)
            for suspect in self.dog.suspects(self.now):
                self.asked += 1
                self.dog.answered(suspect, self.ends[suspect], self.now)
        return stalled


def test_a_partition_that_was_read_to_its_end_is_asked_about_once_per_limit_and_is_well() -> None:
    watched = Watched()
    watched.read_to(10, end=10, fetched=10)
    assert watched.spend(LIMIT_S) == []
    assert watched.asked == 0
    assert watched.spend(3 * LIMIT_S) == []
    assert watched.asked == 3


def test_more_that_the_client_does_not_fetch_is_a_stall_and_read_again_from_the_position() -> None:
    watched = Watched()
    holding = watched.read_to(10, end=12, fetched=10)
    assert watched.spend(LIMIT_S + MOMENT_S) == []
    assert watched.spend(1) == [(holding, 10)]
    assert (watched.dog.stalls, watched.dog.stuck) == (1, [])


@pytest.mark.parametrize("fetched", [None, 10])
def test_what_stalls_again_without_a_record_is_stuck_until_one_comes(fetched: int | None) -> None:
    watched = Watched()
    holding = watched.read_to(10, end=12, fetched=fetched)
    assert len(watched.spend(2 * (LIMIT_S + MOMENT_S) + 1)) == 2
    assert watched.dog.stuck == [holding]
    holding.position = 11
    watched.spend(1)
    assert watched.dog.stuck == []
    assert watched.dog.stalls == 2


def test_what_stalls_eight_times_in_a_row_is_hopeless_until_a_record_comes() -> None:
    watched = Watched()
    holding = watched.read_to(10, end=12, fetched=10)
    while watched.dog.stalls < HOPELESS - 1:
        watched.spend(1)
    told = [watched.dog.is_hopeless]
    watched.spend(LIMIT_S + MOMENT_S + 1)
    told.append(watched.dog.is_hopeless)
    holding.position = 11
    watched.spend(1)
    told.append(watched.dog.is_hopeless)
    assert told == [False, True, False]


def test_stalls_that_reading_again_has_cured_are_not_in_a_row() -> None:
    watched = Watched()
    holding = watched.read_to(10, end=12, fetched=10)
    for _ in range(HOPELESS + 1):
        holding.fetched = 10
        assert any(watched.spend(1) for _ in range(100))
        holding.fetched = 12  # read again it fetched what nobody gets: markers of transactions
        watched.spend(2 * LIMIT_S)
        assert watched.dog.stuck == []
    assert not watched.dog.is_hopeless
    assert watched.dog.stalls == HOPELESS + 1


def test_a_partition_that_leaves_is_not_stuck_any_more() -> None:
    watched = Watched()
    holding = watched.read_to(10, end=12, fetched=10)
    watched.spend(2 * (LIMIT_S + MOMENT_S) + 1)
    watched.assignment.forget([holding])
    watched.spend(1)
    assert watched.dog.stuck == []


def test_markers_of_transactions_at_the_end_are_no_stall_however_many_come() -> None:
    watched = Watched()
    holding = watched.read_to(10, end=11, fetched=11)
    for end in range(11, 30):
        watched.ends[holding] = holding.fetched = end
        assert watched.spend(LIMIT_S) == []
    assert watched.dog.stalls == 0


def test_what_came_just_before_the_question_has_a_moment_to_be_fetched() -> None:
    watched = Watched()
    holding = watched.read_to(10, end=11, fetched=10)
    assert watched.spend(LIMIT_S + MOMENT_S) == []
    holding.fetched = 11
    assert watched.spend(LIMIT_S) == []
    assert watched.dog.stalls == 0


def test_a_record_within_that_moment_ends_the_silence() -> None:
    watched = Watched()
    holding = watched.read_to(10, end=12, fetched=10)
    watched.spend(LIMIT_S + 1)
    holding.position = 11
    assert watched.spend(LIMIT_S) == []


def test_silence_while_nobody_listens_does_not_count() -> None:
    watched = Watched()
    watched.read_to(10, end=12, fetched=10)
    watched.spend(LIMIT_S)
    watched.spend(10 * LIMIT_S, heard=False)
    assert watched.spend(LIMIT_S - 1) == []
    assert watched.asked == 0
    watched.spend(1)
    assert watched.asked == 1
    watched.spend(1, heard=False)  # within the moment: the question is void
    assert watched.spend(LIMIT_S - 1) == []


def test_without_an_answer_the_question_is_put_again_after_the_limit() -> None:
    watched = Watched()
    holding = watched.read_to(10, end=None, fetched=10)
    watched.spend(3 * LIMIT_S + 1)
    assert watched.asked == 3
    watched.ends[holding] = 12
    assert watched.spend(LIMIT_S + MOMENT_S) == [(holding, 10)]


def test_a_partition_without_a_record_is_watched_from_where_the_group_stood_if_that_is_known() -> (
    None
):
    watched = Watched()
    unknown = watched.read_to(-1, end=12, fetched=None)
    known = watched.read_to(-1, end=12, fetched=None)
    known.start = 4
    assert watched.spend(LIMIT_S + MOMENT_S + 1) == [(known, 4)]
    unknown.start = 5
    assert watched.spend(1) == []


def test_the_longest_silent_one_is_the_first_suspect() -> None:
    watched = Watched()
    first = watched.read_to(10, end=10, fetched=10)
    watched.now += 1
    watched.dog.look(watched.assignment.holdings, watched.now, heard=True)
    second = watched.read_to(10, end=10, fetched=10)
    watched.dog.look(watched.assignment.holdings, watched.now + 1, heard=True)
    assert watched.dog.suspects(watched.now + LIMIT_S) == [first]
    assert watched.dog.suspects(watched.now + LIMIT_S + 1) == [first, second]
