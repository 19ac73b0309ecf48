"""The committer against a client that is told what to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from stationmaster.events import OffsetsCommitted, SourceRecovered, SourceTrouble
from stationmaster.kafka.assignment import Assignment, Holding
from stationmaster.kafka.committing import Committer
from stationmaster.kafka.troubles import Kind, Troubles

if TYPE_CHECKING:
    from stationmaster.events import Event


@attrs.define(eq=False)
class Bench:
    """A committer and its one partition; the bench is the client as well."""

    refuses: KafkaException | None = None
    sent: list[tuple[int, bool]] = attrs.field(factory=list)
    """Offset, and whether asynchronously."""
    said: list[Event] = attrs.field(factory=list)
    assignment: Assignment = attrs.field(factory=Assignment)
    troubles: Troubles = attrs.field(init=False)
    committer: Committer = attrs.field(init=False)
    holding: Holding = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.troubles = Troubles(self.said.append)
        self.committer = Committer(self.troubles, self.said.append)
        self.holding = self.assignment.hold(("t", 0))
        self.holding.begin = 0
        for offset in range(10):
            self.holding.lease.hand_out(offset)

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> Any:
        self.sent += [(each.offset, asynchronous) for each in offsets]
        if self.refuses is not None:
            raise self.refuses
        return None if asynchronous else offsets

    def send(self) -> None:
        client: Any = self
        self.committer.send(client, self.assignment.holdings)

    def send_and_wait(self) -> bool:
        client: Any = self
        return self.committer.send_and_wait(client, self.assignment.holdings)

    def account_to(self, last: int) -> None:
        first = self.holding.lease.watermark or 0
        self.holding.lease.account(first, last)


def test_nothing_overtakes_a_commit_that_is_on_its_way() -> None:
    bench = Bench()
    bench.account_to(1)
    bench.send()
    bench.account_to(3)
    bench.send()
    assert bench.sent == [(2, True)]
    assert bench.committer.awaits_answer
    bench.committer.answered(None, [TopicPartition("t", 0, 2)])
    bench.send()
    assert bench.sent == [(2, True), (4, True)]


def test_at_a_revoke_what_is_on_its_way_is_sent_again_and_its_late_answer_changes_nothing() -> None:
    bench = Bench()
    bench.account_to(1)
    bench.send()
    assert bench.send_and_wait()
    assert bench.sent == [(2, True), (2, False)]
    assert bench.send_and_wait()  # nothing is left
    bench.committer.answered(None, [TopicPartition("t", 0, 2)])
    assert len(bench.said) == 1
    assert isinstance(bench.said[0], OffsetsCommitted)
    assert bench.holding.committed == 2


def test_a_refusal_is_counted_and_said_and_the_offset_stays_due() -> None:
    bench = Bench(KafkaException(KafkaError(KafkaError.REBALANCE_IN_PROGRESS)))
    bench.account_to(1)
    assert not bench.send_and_wait()
    assert (bench.committer.refused, bench.holding.committed) == (1, None)
    (trouble,) = bench.said
    assert isinstance(trouble, SourceTrouble)
    assert trouble.kind == "commit"
    bench.refuses = None
    assert bench.send_and_wait()
    assert bench.said[-1] == SourceRecovered()


def test_what_was_refused_and_has_left_is_no_trouble_any_more() -> None:
    bench = Bench(KafkaException(KafkaError(KafkaError.REBALANCE_IN_PROGRESS)))
    bench.account_to(1)
    assert not bench.send_and_wait()
    bench.assignment.forget([bench.holding])
    bench.send()
    assert bench.said[-1] == SourceRecovered()


def test_with_no_broker_nothing_is_sent_since_the_client_would_hang_on_it() -> None:
    bench = Bench()
    bench.account_to(1)
    bench.troubles.begin(Kind.NO_BROKER, "all are down")
    bench.send()
    assert not bench.send_and_wait()
    assert bench.sent == []
