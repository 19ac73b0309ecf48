"""The whole service as real processes on a real broker."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

from tests.broker.groups import SESSION_S, Group, eventually
from tests.processes import kafka_config, open_part, open_receiver

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.broker.cluster import Broker
    from tests.processes import Part

BRIEF = "tests.service.handlers:brief"
MEMBERSHIP = f"""
session_timeout_s = {SESSION_S}
commit_interval_s = 0.1
options = {{ "heartbeat.interval.ms" = 300 }}
"""


def fill(group: Group, count: int) -> None:
    for partition in range(group.partitions):
        messages = [
            json.dumps({"stationData": [{"stationId": f"S{number % 20}", "x": number}]}).encode()
            for number in range(count)
        ]
        group.operator.produce(group.topic, messages, partition=partition)


def offsets(batches: dict[str, dict[str, Any]]) -> list[tuple[int, int]]:
    return sorted(
        (span["partition"], offset)
        for report in batches.values()
        for span in report["ranges"]
        for offset in range(span["first"], span["last"] + 1)
    )


async def test_a_process_that_slept_past_its_session_goes_on_and_every_record_is_uploaded_under_one_id(
    broker: Broker, tmp_path: Path
) -> None:
    group = Group(broker)
    fill(group, 20)
    async with open_receiver(tmp_path) as receiver:

        def service(name: str) -> AbstractAsyncContextManager[Part]:
            folder = tmp_path / name
            folder.mkdir()
            config = kafka_config(
                folder,
                broker=broker.bootstrap,
                topic=group.topic,
                receiver=receiver.url,
                handler=BRIEF,
                membership=MEMBERSHIP,
            )
            return open_part(
                "run", "--config", str(config), "--set", f"kafka.group_id={group.name}"
            )

        async with service("sleeper") as sleeper, service("other") as other:
            await eventually(lambda: share_out(broker, group) == [2, 2])
            fill(group, 100)
            await receiver.wait_batches(100)
            sleeper.process.send_signal(signal.SIGSTOP)
            await eventually(lambda: share_out(broker, group) == [4])
            fill(group, 20)
            sleeper.process.send_signal(signal.SIGCONT)
            await eventually(lambda: share_out(broker, group) == [2, 2])
            fill(group, 20)
            await group.until_committed(dict.fromkeys(range(4), 160))
            sleeper.process.terminate()
            other.process.terminate()
            assert (await sleeper.ends(), await other.ends()) == (0, 0)
        assert offsets(receiver.batches()) == [(p, n) for p in range(4) for n in range(160)]
        assert receiver.double_rows() == 0
    assert sleeper.events("partitions lost")


async def test_ten_thousand_dead_letters_in_a_row_are_kept_and_the_good_record_behind_them_is_uploaded(
    broker: Broker, tmp_path: Path
) -> None:
    group = Group(broker, partitions=1)
    poison = [b"poison %d" % number for number in range(10_000)]
    broker.produce(group.topic, [*poison, b'{"stationData": [{"stationId": "A"}]}'], partition=0)
    async with open_receiver(tmp_path) as receiver:
        config = kafka_config(
            tmp_path,
            broker=broker.bootstrap,
            topic=group.topic,
            receiver=receiver.url,
            handler=BRIEF,
            membership=MEMBERSHIP,
        )
        arguments = ("run", "--config", str(config), "--set", f"kafka.group_id={group.name}")
        async with open_part(*arguments) as service:
            batches = await receiver.wait_batches(1, seconds=60)
            await group.until_committed({0: 10_001})
            service.process.terminate()
            assert await service.ends() == 0
    assert offsets(batches) == [(0, 10_000)]
    assert len(service.events("dead letter")) < 10, "told once a minute for each reason"
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        kept = db.execute('SELECT "offset", value, reason FROM dead_letters ORDER BY seq')
        assert kept.fetchall() == [(n, value, "not-json") for n, value in enumerate(poison)]


def share_out(broker: Broker, group: Group) -> list[int]:
    """Return how many partitions each member has."""
    return sorted(len(held) for held in broker.members(group.name).values())
