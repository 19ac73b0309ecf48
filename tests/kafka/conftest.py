from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.kafka import inspection
from stationmaster.kafka.handover import Handover
from tests.kafka.clients import PATIENCE_S, Group

if TYPE_CHECKING:
    from tests.kafka_broker import KafkaBroker


@pytest.fixture
def group(kafka_broker: KafkaBroker) -> Group:
    return Group(kafka_broker)


@pytest.fixture
def revoke_begins(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Give an event that is set when a pump has asked for a drain."""
    begins = trio.Event()
    revoking = Handover.revoking

    def tell(handover: Handover, drain: Any) -> None:
        revoking(handover, drain)
        begins.set()

    monkeypatch.setattr(Handover, "revoking", tell)
    return begins


@pytest.fixture
def patient_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a question to the broker wait as long as the tests do: one that is busy is no trouble then.

    For tests that allow no trouble, or none beside theirs. Not for those of brokers that are away or hang: the pump
    would stand still for that long.
    """
    monkeypatch.setattr(inspection, "ANSWER_S", PATIENCE_S)
