"""What every part must do, as classes of tests: subclass one, give it your part, and pytest runs each of them.

They need pytest and no plugin: each test is a plain method that runs trio itself, on the real clock. What a test needs
beside its part (a folder, a broker) comes by a fixture of yours that is `autouse` and puts it on `self`; pytest makes a
new instance for each test. A test that takes longer than `patience_s` fails.
"""

from importlib.util import find_spec

if find_spec("pytest") is None:
    raise ImportError("stationmaster.testing.contracts needs pytest: install it beside your tests")

import pytest

pytest.register_assert_rewrite(  # before they are imported: so that failures show what was compared
    *(
        f"{__name__}.{name}"
        for name in ("dead_letters", "embedders", "outboxes", "sinks", "sources")
    )
)

# ruff: noqa: E402
from stationmaster.testing.contracts.dead_letters import (
    BoundedDeadLettersContract,
    DeadLettersContract,
)
from stationmaster.testing.contracts.embedders import EmbedderContract, RemoteEmbedderContract
from stationmaster.testing.contracts.outboxes import OutboxRowsContract
from stationmaster.testing.contracts.sinks import RemoteSinkContract, SinkContract
from stationmaster.testing.contracts.sources import (
    BoundedSourceContract,
    BrokerSourceContract,
    SourceContract,
)

__all__ = [
    "BoundedDeadLettersContract",
    "BoundedSourceContract",
    "BrokerSourceContract",
    "DeadLettersContract",
    "EmbedderContract",
    "OutboxRowsContract",
    "RemoteEmbedderContract",
    "RemoteSinkContract",
    "SinkContract",
    "SourceContract",
]
