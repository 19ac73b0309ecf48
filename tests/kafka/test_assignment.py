from __future__ import annotations

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
