from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kafka_broker import KafkaBroker


# No property is about time, and a busy machine stops everybody for a moment now and then.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def kafka_broker() -> Iterator[KafkaBroker]:
    """Give the broker that all tests share: use new names for topics and groups, and leave it running."""
    from tests.kafka_broker import run_kafka_broker

    with run_kafka_broker() as broker:
        yield broker
