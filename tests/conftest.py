from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kafka_broker import KafkaBroker


@pytest.fixture(scope="session")
def kafka_broker() -> Iterator[KafkaBroker]:
    """Give the broker that all tests share: use new names for topics and groups, and leave it running."""
    from tests.kafka_broker import run_kafka_broker

    with run_kafka_broker() as broker:
        yield broker
