"""Commits: what is sent to the broker, and what it says to that. Runs in the pump's thread.

Rules:
1. One asynchronous commit at a time, so that none can overtake another.
2. Synchronously only while partitions are being revoked, because afterwards it is too late. At any other time it would
   hold the pump up for as long as the coordinator hangs.
3. None while no broker can be reached: the client would keep it for 45 s, and could not close meanwhile.
4. What is refused (a rebalance is under way, say) stays due and is sent again while the partition is ours; what is
   answered after its partition left counts for the generation that sent it, never for a later one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from confluent_kafka import KafkaException

from stationmaster.events import OffsetsCommitted
from stationmaster.kafka.assignment import Commit
from stationmaster.kafka.troubles import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from confluent_kafka import Consumer, KafkaError, TopicPartition

    from stationmaster.events import Event
    from stationmaster.kafka.assignment import Answer, Holding
    from stationmaster.kafka.troubles import Troubles


@attrs.define(eq=False)
class Committer:
    """Sends what is due and takes note of the answers."""

    _troubles: Troubles
    _say: Callable[[Event], None]
    refused: int = attrs.field(default=0, init=False)
    """Offsets that the broker did not take: one for each partition and try."""
    _in_flight: Commit | None = attrs.field(default=None, init=False)

    @property
    def awaits_answer(self) -> bool:
        """Whether a commit is on its way."""
        return self._in_flight is not None

    def send(self, consumer: Consumer, holdings: Iterable[Holding]) -> None:
        """Send what is due; the answer comes to `answered` in a later poll."""
        if self._in_flight is not None or self._troubles.is_cut_off:
            return
        self._in_flight = Commit.of(holdings)
        if self._in_flight is not None:
            consumer.commit(offsets=self._in_flight.offsets, asynchronous=True)
        else:
            self._troubles.end((Kind.COMMIT,))  # what was refused has left, and is its next owner's

    def answered(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        """Take the answer to what was sent (the client's `on_commit`)."""
        commit, self._in_flight = self._in_flight, None
        if commit is not None:
            self._report(commit.settle(offsets, error))

    def send_and_wait(self, consumer: Consumer, holdings: Iterable[Holding]) -> bool:
        """Send what is due or on its way, and wait for the answer; return whether nothing is left uncommitted."""
        commit = Commit.of(holdings, again=True)
        if commit is None:
            return True
        if self._troubles.is_cut_off:
            return False
        try:
            offsets = consumer.commit(offsets=commit.offsets, asynchronous=False)
        except KafkaException as error:
            answer = commit.settle([], error.args[0])
        else:
            answer = commit.settle(offsets)
        self._report(answer)
        return not answer.refused

    def _report(self, answer: Answer) -> None:
        if answer.taken:
            self._say(OffsetsCommitted(offsets=answer.taken))
        if answer.refused:
            self.refused += len(answer.refused)
            self._troubles.begin(Kind.COMMIT, "; ".join(answer.refused[:5]))
        else:
            self._troubles.end((Kind.COMMIT,))
