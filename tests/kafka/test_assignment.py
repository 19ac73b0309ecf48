from __future__ import annotations

import pytest
from confluent_kafka import KafkaError, TopicPartition

from stationmaster.batch import OffsetRange, Record
from stationmaster.kafka.assignment import Assignment, Commit, Drain, Holding

KEY = ("t", 0)


def reading(assignment: Assignment, *offsets: int) -> Holding:
    """Hold the partition and hand these offsets out."""
    holding = assignment.hold(KEY)
    holding.begin = offsets[0]
    for offset in offsets:
        holding.lease.hand_out(offset)
    return holding


def record(offset: int, generation: int) -> Record:
    return Record(
        topic="t", partition=0, offset=offset, timestamp_ms=0, value=b"", generation=generation
    )


def test_a_generation_counts_the_assignments_of_its_partition_alone() -> None:
    assignment = Assignment()
    first = assignment.hold(KEY)
    other = assignment.hold(("t", 1))
    assignment.forget([first])
    again = assignment.hold(KEY)
    assert [h.lease.generation for h in (first, other, again)] == [1, 1, 2]
    assert not assignment.holds(record(5, 1))
    assert assignment.holds(record(5, 2))
    assert assignment.turnover == 1


def test_what_is_not_held_is_not_found() -> None:
    assignment = Assignment()
    assignment.hold(KEY)
    assert assignment.find(("t", 1)) is None
    assert not assignment.holds(record(5, 0))
    assert len(assignment.find_all([TopicPartition("t", 0), TopicPartition("t", 1)])) == 1


def test_a_commit_carries_the_watermark_and_is_due_once() -> None:
    assignment = Assignment()
    holding = reading(assignment, 5, 6, 7)
    assert Commit.of(assignment.holdings) is None
    holding.lease.account(5, 6)
    commit = Commit.of(assignment.holdings)
    assert commit is not None
    assert [(each.partition, each.offset) for each in commit.offsets] == [(0, 7)]
    assert Commit.of(assignment.holdings) is None
    answer = commit.settle([TopicPartition("t", 0, 7)])
    assert answer.taken == (OffsetRange(topic="t", partition=0, first=5, last=6, generation=1),)
    holding.lease.account(7, 7)
    commit = Commit.of(assignment.holdings)
    assert commit is not None
    assert commit.settle([TopicPartition("t", 0, 8)]).taken == (
        OffsetRange(topic="t", partition=0, first=7, last=7, generation=1),
    )


def test_what_is_on_its_way_is_due_again_when_the_answer_would_come_too_late() -> None:
    assignment = Assignment()
    holding = reading(assignment, 5)
    holding.lease.account(5, 5)
    first = Commit.of(assignment.holdings)
    second = Commit.of(assignment.holdings, again=True)
    assert first is not None
    assert second is not None
    assert second.settle([TopicPartition("t", 0, 6)]).taken
    assert not first.settle([TopicPartition("t", 0, 6)]).taken
    assert Commit.of(assignment.holdings, again=True) is None


def refusal() -> TopicPartition:
    """Return an answer with an error: only the client can make one, so this one bears it by its own attribute."""

    class Refused(TopicPartition):
        error = KafkaError(KafkaError.ILLEGAL_GENERATION)

    return Refused("t", 0, 6)


def test_a_commit_that_was_refused_is_due_again() -> None:
    assignment = Assignment()
    holding = reading(assignment, 5)
    holding.lease.account(5, 5)
    of_all = KafkaError(KafkaError.ILLEGAL_GENERATION)
    for answered, error in ([refusal()], None), ([], of_all):
        commit = Commit.of(assignment.holdings)
        assert commit is not None
        answer = commit.settle(answered, error)
        assert not answer.taken
        assert "generation" in answer.refused[0]
    assert Commit.of(assignment.holdings) is not None


def test_a_drain_is_empty_when_nothing_handed_out_is_outstanding() -> None:
    assignment = Assignment()
    drain = Drain([reading(assignment, 5, 6)])
    assert not drain.is_empty
    drain.holdings[0].lease.account(5, 6)
    assert drain.is_empty


def test_an_answer_for_a_generation_that_left_says_nothing_about_the_one_that_came_back() -> None:
    assignment = Assignment()
    old = reading(assignment, 5)
    old.lease.account(5, 5)
    commit = Commit.of(assignment.holdings)
    assert commit is not None
    assignment.forget([old])
    new = reading(assignment, 5, 6)
    (taken,) = commit.settle([TopicPartition("t", 0, 6)]).taken
    assert (taken.generation, new.committed, new.sent) == (1, None, None)
    new.lease.account(5, 6)
    again = Commit.of(assignment.holdings)
    assert again is not None
    assert [each.offset for each in again.offsets] == [7]


def test_an_answer_about_something_that_was_not_sent_is_ignored() -> None:
    assignment = Assignment()
    reading(assignment, 5).lease.account(5, 5)
    commit = Commit.of(assignment.holdings)
    assert commit is not None
    answer = commit.settle([TopicPartition("t", 7, 6), TopicPartition("t", 0, 6)])
    assert [each.partition for each in answer.taken] == [0]


@pytest.mark.parametrize(
    ("stood", "begin", "skips_old", "start", "lag"),
    [
        (7, None, False, 7, 3),  # the group has committed
        (7, 8, False, 7, 3),  # and a first record came: the offset before it was compacted away
        (7, 7, True, 7, 3),
        (-1001, None, False, 2, 8),  # it has not: from the log's beginning
        (-1001, None, True, None, None),  # or its end, wherever that was
        (-1001, 9, True, 9, 1),
        (1, None, False, 2, 8),  # what it has committed is gone from the log
        (1000, 2, False, 2, 8),  # or was never in it
        (None, None, False, None, None),  # the coordinator did not say
        (None, 4, False, None, 6),
    ],
)
def test_lag_counts_from_where_the_group_stands(
    stood: int | None, begin: int | None, skips_old: bool, start: int | None, lag: int | None
) -> None:
    holding = Assignment().hold(KEY)
    assert holding.lag is None
    holding.begin = begin
    if stood is not None:
        holding.found_committed(stood)
    holding.saw_watermarks(-1001, -1001, skips_old=skips_old)
    assert (holding.high, holding.start) == (None, None)
    holding.saw_watermarks(2, 10, skips_old=skips_old)
    assert (holding.start, holding.lag) == (start, lag)
    holding.committed = 9
    assert holding.lag == 1


def test_what_a_fetch_told_before_does_not_hide_a_newer_answer() -> None:
    holding = Assignment().hold(KEY)
    holding.saw_watermarks(0, 10, skips_old=False)
    holding.high = 12
    holding.saw_watermarks(0, 10, skips_old=False)
    assert (holding.fetched, holding.high) == (10, 12)
    holding.saw_watermarks(0, 11, skips_old=False)
    assert (holding.fetched, holding.high) == (11, 11)
