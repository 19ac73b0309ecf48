"""Handlers of all kinds in a real service, named in its configuration."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.processes import kafka_config, open_part, open_receiver

if TYPE_CHECKING:
    from pathlib import Path

HERE = "tests.service.handlers"


def write_messages(file: Path, count: int) -> None:
    entries = [{"stationId": f"S{number}", "x": number} for number in range(3)]
    line = json.dumps({"stationData": entries})
    file.write_text(f"{line}\n" * count)


async def test_a_batch_handler_and_a_result_hook_by_configuration(tmp_path: Path) -> None:
    file, output = tmp_path / "hours.jsonl", tmp_path / "output"
    write_messages(file, 4)
    async with open_receiver(tmp_path) as receiver:
        config = kafka_config(
            tmp_path,
            broker="127.0.0.1:1",
            topic="readings",
            receiver=receiver.url,
            handler=f"{HERE}:whole",
        )
        told = (
            f"stations.options={{ file = '{output}' }}",
            f"stations.on_result='{HERE}:open_hook'",
            "stations.ordered=false",
        )
        settings = [word for setting in told for word in ("--set", setting)]
        async with open_part("replay", str(file), "--config", str(config), *settings) as service:
            assert await service.ends() == 0
        batches = receiver.batches()
    values = [row["stations"] for body in batches.values() for row in body["results"]]
    assert values == [3] * 12
    lines = output.read_text().splitlines()
    assert sorted(lines) == sorted([f"S{number} succeeded" for number in range(3)] * 4)


async def test_the_service_ends_although_a_plain_function_hangs_in_its_thread(
    tmp_path: Path,
) -> None:
    file = tmp_path / "hours.jsonl"
    write_messages(file, 1)
    async with open_receiver(tmp_path) as receiver:
        config = kafka_config(
            tmp_path,
            broker="127.0.0.1:1",
            topic="readings",
            receiver=receiver.url,
            handler=f"{HERE}:hanging_thread",
            # The two others decide when it is given up, however long the machine lets their threads wait.
            extra="[batch]\ndeadline_s = 60\nquorum = 0.6",
        )
        async with open_part("replay", str(file), "--config", str(config)) as service:
            await service.wait_line('"thread goes on after its job was given up"')
            assert await service.ends() == 0
        batches = receiver.batches()
    (body,) = batches.values()
    assert body["counts"]["timedOut"] == 1
    assert body["counts"]["succeeded"] == 2


@pytest.mark.parametrize(("freeze", "closed_by"), [("true", "complete"), ("false", "deadline")])
async def test_what_exists_at_the_start_is_taken_out_of_garbage_collection_if_wanted(
    tmp_path: Path, freeze: str, closed_by: str
) -> None:
    file = tmp_path / "hours.jsonl"
    write_messages(file, 1)
    async with open_receiver(tmp_path) as receiver:
        config = kafka_config(
            tmp_path,
            broker="127.0.0.1:1",
            topic="readings",
            receiver=receiver.url,
            handler=f"{HERE}:once_frozen",
            # Only where nobody ever answers is there a deadline to wait for.
            extra=f"[batch]\ndeadline_s = {60 if freeze == 'true' else 2}",
        )
        settings = ["--set", f"stations.gc_freeze={freeze}"]
        async with open_part("replay", str(file), "--config", str(config), *settings) as service:
            assert await service.ends() == 0
        (body,) = receiver.batches().values()
    assert body["closedBy"] == closed_by
