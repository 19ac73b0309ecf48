from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.kafka.handover import Handover
from tests.kafka.clients import Group

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
