"""The service's own web server: from configuration to page, in its place among the rings. Real processes."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

from tests.http_requests import client_of
from tests.processes import (
    kafka_config,
    open_broker,
    open_part,
    open_receiver,
    produce,
)
from tests.service.test_way import BRIEF, TOPIC, message

if TYPE_CHECKING:
    from pathlib import Path

WEB = "[web]\nport = 0\n[batch]\ndeadline_s = 1.0\n"


async def test_the_page_of_a_running_service_shows_it_until_the_drain_is_over(
    tmp_path: Path,
) -> None:
    async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
        config = kafka_config(
            tmp_path, broker=broker, topic=TOPIC, receiver=receiver.url, handler=BRIEF, extra=WEB
        )
        async with open_part("run", "--config", str(config)) as service:
            url = json.loads(await service.wait_line('"web listens"'))["url"]
            async with client_of(url) as client:
                await service.wait_line('"partitions assigned"')
                metrics = (
                    await client.get("/metrics")
                ).text  # what is counted by topic begins at 0
                assert f'stationmaster_batches_opened_total{{topic="{TOPIC}"}} 0.0' in metrics
                produce(broker, TOPIC, [message(number) for number in range(4)])
                await receiver.wait_batches(4)

                async def is_ready() -> bool:
                    return (await client.get("/readyz")).status_code == 200

                while not await is_ready():
                    pass
                status = (await client.get("/api/status")).json()
                assert status["counters"]["opened"] == 4
                assert status["kafka"]["assigned"] == 4
                assert status["outbox"]["rows"] == 0
                metrics = (await client.get("/metrics")).text
                assert "stationmaster_build_info" in metrics
                assert (await client.get("/")).status_code == 200
                async with client.stream("GET", "/api/events") as events:
                    assert events.status_code == 200
                    service.process.terminate()
                    assert await service.ends() == 0  # an open stream holds nothing up


async def test_an_address_that_others_reach_is_refused_without_a_token(tmp_path: Path) -> None:
    config = kafka_config(
        tmp_path,
        broker="127.0.0.1:1",
        topic=TOPIC,
        receiver="http://127.0.0.1:1",
        handler=BRIEF,
        extra='[web]\nhost = "0.0.0.0"\nport = 0\n',
    )
    async with open_part("run", "--config", str(config)) as service:
        line = await service.wait_line("web.token_file")
        assert "web.host" in line
        assert await service.ends() == 78


async def test_a_taken_port_ends_the_service_with_a_plain_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = kafka_config(
            tmp_path,
            broker="127.0.0.1:1",
            topic=TOPIC,
            receiver="http://127.0.0.1:1",
            handler=BRIEF,
            extra=f"[web]\nport = {port}\n",
        )
        async with open_part("run", "--config", str(config)) as service:
            await service.wait_line(f"cannot listen on 127.0.0.1 port {port}")
            assert await service.ends() == 70
