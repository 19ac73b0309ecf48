"""The real Kafka broker of the tests in this folder.

They run with `pytest tests/broker` or `pytest -m broker`, not in a plain `pytest`: starting Java in every run of every
Python would cost more than it tells. On a machine that cannot run Kafka they skip, saying why; with
STATIONMASTER_REQUIRE_BROKER=1 they fail instead.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stationmaster.kafka import inspection
from tests.broker.cluster import Broker, run_broker
from tests.broker.groups import PATIENCE_S
from tests.broker.jars import UnavailableError, fetch_jars

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out unless it was asked for."""
    named = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    if "broker" in config.option.markexpr or any(_HERE in (path, *path.parents) for path in named):
        return None  # as usual
    return True


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test of this folder."""
    item.add_marker("broker")


@contextmanager
def _running(folder: Path) -> Iterator[Broker]:
    try:
        fetch_jars()
    except UnavailableError as error:
        if os.environ.get("STATIONMASTER_REQUIRE_BROKER") == "1":
            raise
        pytest.skip(f"no Kafka broker here: {error}")
    with run_broker(folder) as broker:
        yield broker


@pytest.fixture(scope="session")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with _running(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture
def broker(shared_broker: Broker) -> Iterator[Broker]:
    """Give the broker that all tests share: use new names, and never stop or kill it (its relay is yours to cut)."""
    yield shared_broker
    shared_broker.relay.slow()
    shared_broker.relay.mend()


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """Give a broker to stop, kill and pause."""
    with _running(tmp_path / "kafka") as broker:
        yield broker


@pytest.fixture
def patient_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a member's question to the broker wait as long as the tests do: one that is busy is no trouble then.

    For tests that allow no trouble. Not for those of brokers that are away or hang: the member would stand still.
    """
    monkeypatch.setattr(inspection, "ANSWER_S", PATIENCE_S)
