from __future__ import annotations

import attrs
import pytest
from confluent_kafka import KafkaError

from stationmaster.events import SourceRecovered, SourceTrouble
from stationmaster.kafka.troubles import EVERY_S, Kind, Troubles, kind_of


@attrs.define
class Listener:
    """What was said, and a clock that the test sets."""

    now: float = 1000.0
    said: list[str] = attrs.field(factory=list)
    troubles: Troubles = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.troubles = Troubles(self.hear, lambda: self.now)

    def hear(self, event: SourceTrouble | SourceRecovered) -> None:
        self.said.append(event.kind if isinstance(event, SourceTrouble) else "recovered")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError._ALL_BROKERS_DOWN, Kind.NO_BROKER),
        (KafkaError._TRANSPORT, Kind.CONNECTION),
        (KafkaError._AUTHENTICATION, Kind.AUTHENTICATION),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, Kind.AUTHORIZATION),
        (KafkaError.GROUP_AUTHORIZATION_FAILED, Kind.GROUP_AUTHORIZATION),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, Kind.UNKNOWN_TOPIC),
        (KafkaError._MAX_POLL_EXCEEDED, Kind.MAX_POLL),
        (KafkaError.LEADER_NOT_AVAILABLE, Kind.CLIENT),
    ],
)
def test_the_code_of_an_error_decides_its_kind(code: int, kind: Kind) -> None:
    assert kind_of(code) is kind


def test_a_trouble_is_said_at_once_and_then_once_a_minute_while_it_lasts() -> None:
    listener = Listener()
    for _ in range(3):
        listener.troubles.begin(Kind.CONNECTION, "refused")
        listener.troubles.repeat()
    assert listener.said == ["connection"]
    listener.now += EVERY_S - 1
    listener.troubles.repeat()
    assert listener.said == ["connection"]
    listener.now += 1
    listener.troubles.repeat()
    assert listener.said == ["connection", "connection"]


def test_recovery_is_said_once_when_the_last_trouble_is_over() -> None:
    listener = Listener()
    listener.troubles.begin(Kind.CONNECTION, "refused")
    listener.troubles.begin(Kind.COMMIT, "refused")
    listener.troubles.end([Kind.CONNECTION])
    assert listener.said == ["connection", "commit"]
    assert listener.troubles.any_last
    listener.troubles.end([Kind.COMMIT, Kind.CLIENT])
    listener.troubles.end([Kind.COMMIT])
    assert listener.said == ["connection", "commit", "recovered"]
    assert not listener.troubles.any_last


def test_one_that_comes_back_within_the_minute_is_said_when_the_minute_is_over() -> None:
    listener = Listener()
    listener.troubles.begin(Kind.CONNECTION, "refused")
    listener.troubles.end([Kind.CONNECTION])
    listener.troubles.begin(Kind.CONNECTION, "refused again")
    listener.troubles.repeat()
    assert listener.said == ["connection", "recovered"]
    assert listener.troubles.lasts(Kind.CONNECTION)
    listener.now += EVERY_S
    listener.troubles.repeat()
    assert listener.said == ["connection", "recovered", "connection"]


def test_one_that_comes_and_goes_within_the_minute_is_not_said_at_all() -> None:
    listener = Listener()
    for _ in range(5):
        listener.troubles.begin(Kind.CONNECTION, "refused")
        listener.troubles.end([Kind.CONNECTION])
    listener.now += EVERY_S
    listener.troubles.repeat()
    assert listener.said == ["connection", "recovered"]
    assert not listener.troubles.lasts(Kind.COMMIT)
