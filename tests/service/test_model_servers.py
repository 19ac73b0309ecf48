"""The service with several model servers, which are real processes, and one of them dies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest

from stationmaster.errors import ConfigError
from stationmaster.service.config import (
    BatcherConfig,
    Config,
    EmbeddingsConfig,
    SourceConfig,
    UploadConfig,
)
from stationmaster.service.producer import read_packaged_messages
from stationmaster.service.translation import batch_policy
from tests.processes import (
    kafka_config,
    open_broker,
    open_model_server,
    open_part,
    open_receiver,
    produce,
)

if TYPE_CHECKING:
    from pathlib import Path

TOPIC = "readings"
CONFIG = Config(
    source=SourceConfig(kind="kafka"),
    upload=UploadConfig(url="http://host"),
    embeddings=EmbeddingsConfig(urls=("http://a", "http://b", "http://c"), model="m"),
)


async def test_a_model_server_dies_and_comes_back_and_no_station_fails(tmp_path: Path) -> None:
    values = read_packaged_messages()[:30]
    async with (
        open_broker(TOPIC) as (broker, _),
        open_receiver(tmp_path) as receiver,
        open_model_server() as steady,
        open_part("model-server") as fragile,
    ):
        line = await fragile.wait_line("listening on ")
        url = line.rpartition(" ")[2]
        config = kafka_config(
            tmp_path,
            broker=broker,
            topic=TOPIC,
            receiver=receiver.url,
            extra=f'[embeddings]\nurls = ["{steady}/v1", "{url}/v1"]\nmodel = "readings-128"\n'
            "breaker_probe_s = 0.1\n[batch]\ndeadline_s = 20.0\n[batcher]\nmax_batch_rows = 4\n",
        )
        async with open_part("run", "--config", str(config)) as service:
            produce(broker, TOPIC, values[:10])
            await receiver.wait_batches(10)
            fragile.process.kill()
            await fragile.ends()
            produce(broker, TOPIC, values[10:20])
            await receiver.wait_batches(20)
            await service.wait_line("model server down")
            async with open_model_server("--port", url.rpartition(":")[2]):
                produce(broker, TOPIC, values[20:])
                batches = await receiver.wait_batches(30)
                await service.wait_line("model server works again")
                service.process.terminate()
                assert await service.ends() == 0

    counts = [report["counts"] for report in batches.values()]
    assert all(one["succeeded"] == one["expected"] > 0 for one in counts)
    assert {line["endpoint"] for line in service.events("model server works again")} == {
        f"{url}/v1"
    }


def test_calls_at_the_same_time_are_for_each_model_server() -> None:
    assert batch_policy(CONFIG).max_in_flight == 12
    alone = attrs.evolve(CONFIG, embeddings=None)
    assert batch_policy(alone).max_in_flight == 4


@pytest.mark.parametrize(
    ("most", "rows"), [(None, (32, 4)), (64, (32, 4)), (8, (8, 4)), (2, (2, 2))]
)
def test_calls_are_no_larger_than_a_model_server_takes(
    most: int | None, rows: tuple[int, int]
) -> None:
    config = attrs.evolve(CONFIG, batcher=BatcherConfig(min_batch_rows=4))
    policy = batch_policy(config, max_rows=most)
    assert (policy.max_batch_rows, policy.min_batch_rows) == rows


@pytest.mark.parametrize(
    ("configured", "learned", "tokens"),
    [(None, None, None), (None, 500, None), (900, None, 900), (900, 500, 500), (900, 1000, 900)],
)
def test_what_a_model_server_computes_together_lowers_a_configured_bound(
    configured: int | None, learned: int | None, tokens: int | None
) -> None:
    config = attrs.evolve(CONFIG, batcher=BatcherConfig(max_batch_tokens=configured))
    assert batch_policy(config, max_tokens=learned).max_batch_tokens == tokens


def test_a_policy_that_makes_no_sense_is_a_fault_of_the_configuration() -> None:
    config = attrs.evolve(CONFIG, batcher=BatcherConfig(max_wait_s=9.0))
    with pytest.raises(ConfigError, match="max_wait_s"):
        batch_policy(config)
