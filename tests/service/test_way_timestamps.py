"""Batches by timestamp through real processes: four partitions of a broker meet in one upload."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.processes import committed, kafka_config, open_broker, open_part, open_receiver, produce

if TYPE_CHECKING:
    from pathlib import Path

TOPIC = "readings"
STATIONS = [f"S{number}" for number in range(4)]
TIMES = [f"2024-01-01T{hour:02}:00:00Z" for hour in range(10)]


async def test_stations_of_four_partitions_meet_in_one_batch_of_their_time(tmp_path: Path) -> None:
    values = [
        json.dumps({"timestamp": at, "stationData": [{"stationId": name, "x": 1}]}).encode()
        for at in TIMES
        for name in STATIONS  # round robin: each station has a partition of its own
    ]
    topic = f'[[topic]]\nname = "{TOPIC}"\nby = "timestamp"\nroster = {json.dumps(STATIONS)}\n'
    async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
        produce(broker, TOPIC, values)
        config = kafka_config(
            tmp_path,
            broker=broker,
            topic=TOPIC,
            receiver=receiver.url,
            handler="tests.service.handlers:brief",
            extra=topic + "[batch]\ndeadline_s = 60",
        )
        async with open_part("run", "--config", str(config)) as service:
            batches = await receiver.wait_batches(len(TIMES))
            service.process.terminate()
            assert await service.ends() == 0
        offsets = committed(broker, "test", TOPIC)

    assert offsets == dict.fromkeys(range(4), len(TIMES))
    for report in batches.values():
        assert report["closedBy"] == "complete"
        assert "followUp" not in report
        assert [span["partition"] for span in report["ranges"]] == [0, 1, 2, 3]
        assert {span["first"] for span in report["ranges"]} == {report["ranges"][0]["last"]}
        assert sorted(result["stationId"] for result in report["results"]) == STATIONS
