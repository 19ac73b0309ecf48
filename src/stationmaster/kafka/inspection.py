"""What the pump asks the brokers about beside the records: topics, where the group stands, ends of logs.

Runs in the pump's thread, between two polls. Every question waits 0.5 s at most, and there is at most one of each kind
a second; none while no broker can be reached. (A broker answers behind the fetch that waits there: the answer to a
question about a log takes up to `fetch.wait.max.ms`, 0.1 s.)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import attrs
from confluent_kafka import OFFSET_END, KafkaError, KafkaException, TopicPartition

from stationmaster.kafka.troubles import ENDED_BY_ALL_TOPICS, ENDED_BY_AN_ANSWER, Kind, kind_of
from stationmaster.kafka.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from confluent_kafka import Consumer

    from stationmaster.kafka.assignment import Assignment, Holding
    from stationmaster.kafka.settings import KafkaSettings
    from stationmaster.kafka.troubles import Troubles

PROBE_FIRST_S: Final = 1.0
PROBE_EVERY_S: Final = 5.0
ANSWER_S: Final = 0.5
"""How long a question waits for its answer."""
_AGAIN_S: Final = 1.0
"""A broker that did not answer once may be busy: it is asked again so soon, before anybody hears of it."""
_NAMED: Final = 5
"""Stuck partitions that a trouble names."""


@attrs.define(eq=False)
class Inspector:
    """Asks, and keeps the pump's book and the troubles up to date with the answers."""

    _consumer: Consumer
    _settings: KafkaSettings
    _assignment: Assignment
    _troubles: Troubles
    _on_error: Callable[[KafkaError], None]
    _next_probe: float
    """On `time.monotonic`, as every `now` here."""
    watchdog: Watchdog = attrs.field(init=False)
    first_heard_at: float | None = attrs.field(default=None, init=False)
    heard_at: float | None = attrs.field(default=None, init=False)
    """When a broker last answered anything; the pump's thread writes both."""
    _missed: bool = attrs.field(default=False, init=False)
    """The last question to a silent broker had no answer."""
    _standing_unknown: list[Holding] = attrs.field(factory=list, init=False)
    _asks_singly: bool = attrs.field(default=False, init=False)
    """The last question for several ends at once had no answer."""

    def __attrs_post_init__(self) -> None:
        """Set the watchdog's limit."""
        self.watchdog = Watchdog(self._settings.progress_timeout_s)

    def heard(self) -> None:
        """Take note that a broker is there."""
        self.heard_at = time.monotonic()
        if self.first_heard_at is None:
            self.first_heard_at = self.heard_at

    def assigned(self, holdings: Iterable[Holding]) -> None:
        """Ask at the next turn where the group stands with these."""
        self._standing_unknown += holdings

    def look(self, now: float, *, heard: bool) -> None:
        """Look at every partition's end and progress; to be called about every second. `heard`: see `Watchdog`."""
        for holding in self._assignment.holdings:
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(*holding.key), cached=True
            )
            holding.saw_watermarks(low, high, skips_old=self._settings.start == "latest")
        self._watch(now, heard=heard and not self._troubles.is_cut_off)
        self._troubles.repeat()

    def ask_standing(self) -> None:
        """Ask once for the committed offsets of what was assigned; without an answer, the first records tell."""
        unknown, self._standing_unknown = self._standing_unknown, []
        if not unknown or self._troubles.is_cut_off:
            return
        try:
            found = self._consumer.committed(
                [TopicPartition(*holding.key) for holding in unknown], timeout=ANSWER_S
            )
        except KafkaException:
            return  # only statistics and the watchdog wanted to know
        self.heard()
        by_key = {holding.key: holding for holding in unknown}
        for each in found:
            if each.error is None:
                by_key[each.topic, each.partition].found_committed(each.offset)

    def probe_when_due(self, now: float) -> None:
        """Ask for the topics: tells what is wrong with them, and whether a broker answers at all.

        Needed because some errors come once and never again, with KIP-848 an unknown topic is no error at all, and the
        client takes a minute to find out that a broker hangs. While all is well only one that is silent is asked, for
        one topic.
        """
        if now < self._next_probe:
            return
        self._next_probe = now + PROBE_EVERY_S
        topics = self._settings.topics
        all_well = not self._troubles.any_last and self._assignment.topics.issuperset(topics)
        if all_well:
            if self.heard_at is not None and now - self.heard_at < PROBE_EVERY_S:
                return
            topics = topics[:1]
        well = True
        for topic in topics:
            try:
                found = self._consumer.list_topics(topic, timeout=ANSWER_S)
            except KafkaException as error:
                if all_well and not self._missed:
                    self._missed, self._next_probe = True, now + _AGAIN_S
                else:
                    self._on_error(error.args[0])
                return
            self.heard()
            self._missed = False
            problem = found.topics[topic].error
            if problem is not None:
                well = False
                self._troubles.begin(kind_of(problem.code()), f"topic {topic}: {problem.str()}")
        self._troubles.end(ENDED_BY_AN_ANSWER)
        if well and not all_well:
            self._troubles.end(ENDED_BY_ALL_TOPICS)

    def _watch(self, now: float, *, heard: bool) -> None:
        for holding, position in self.watchdog.look(self._assignment.holdings, now, heard=heard):
            try:
                self._consumer.seek(TopicPartition(*holding.key, position))
            except KafkaException:
                pass  # not possible just now: the watchdog comes back to it
        if stuck := self.watchdog.stuck:
            named = ", ".join(
                f"{holding.lease.topic} [{holding.lease.partition}] at offset {holding.next_offset}"
                for holding in stuck[:_NAMED]
            )
            self._troubles.begin(
                Kind.STALLED,
                f"{len(stuck)} partitions have records and deliver none, although they were read again: {named}",
            )
        else:
            self._troubles.end((Kind.STALLED,))
        if suspects := self.watchdog.suspects(now):
            self._ask_ends(suspects[:1] if self._asks_singly else suspects, now)

    def _ask_ends(self, suspects: list[Holding], now: float) -> None:
        asked = [TopicPartition(*holding.key, OFFSET_END) for holding in suspects]
        try:
            # Asked for the time "end": one round trip for all, where watermarks would take two for each.
            found = self._consumer.offsets_for_times(asked, timeout=ANSWER_S)
        except KafkaException:
            self._asks_singly = True  # one that has no leader must not hide the others
            for suspect in suspects:
                self.watchdog.answered(suspect, None, now)
            return
        self._asks_singly = False
        self.heard()
        by_key = {suspect.key: suspect for suspect in suspects}
        for each in found:
            suspect = by_key[each.topic, each.partition]
            known = each.error is None and each.offset >= 0
            if known:
                suspect.high = each.offset
            self.watchdog.answered(suspect, each.offset if known else None, now)
