"""Services of one group that are killed at random while records keep coming."""

from __future__ import annotations

import signal
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import attrs
import httpx
import pytest
import trio

from tests.broker.chaos import END_S, new_dice, open_scene, patience, tell, until
from tests.ledger import open_ledger
from tests.processes import READY_S

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.broker.chaos import Scene, Service
    from tests.broker.cluster import Broker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

PARTITIONS = 6
SERVICES = 3
COMMITS = "commit_interval_s = 0.2\n"  # often: a commit that comes too early is caught in the act


@attrs.frozen(kw_only=True)
class Kills:
    """How a group is mistreated."""

    membership: str
    """Lines of `[kafka]`."""
    count: int
    refusals: tuple[range, ...]
    """Of the kills, those between which the target refuses every upload: the outboxes fill, and are killed."""
    seconds: float


CLASSIC = Kills(
    membership=(
        'assignor = "cooperative-sticky"\nsession_timeout_s = 6.0\n'
        'options = { "heartbeat.interval.ms" = 1000 }'
    ),
    count=60,
    refusals=(range(15, 22), range(40, 46)),
    seconds=480,
)
KIP_848 = Kills(
    membership='group_protocol = "consumer"', count=20, refusals=(range(8, 13),), seconds=240
)


async def kill_at_random(scene: Scene, dice: random.Random, kills: Kills) -> None:
    """Send the signals; one in five strikes the service that was struck last, while it drains or starts."""
    victim = scene.services[0]
    for number in range(kills.count):
        if dice.random() < 0.2:
            await trio.sleep(dice.uniform(0.05, 1.5))
        else:
            await trio.sleep(dice.uniform(1, 5))
            victim = dice.choice(scene.services)
        for refusal in kills.refusals:
            if number in {refusal.start, refusal.stop}:
                await set_target(scene, status=503 if number == refusal.start else None)
        await until(partial(is_alive, victim), "the next process", seconds=END_S)
        victim.now.send(dice.choice([signal.SIGKILL, signal.SIGTERM]))


def is_alive(service: Service) -> bool:
    return service.now.process.returncode is None


async def set_target(scene: Scene, *, status: int | None) -> None:
    async with httpx.AsyncClient(timeout=READY_S) as client:
        answer = await client.post(f"{scene.receiver.url}/control", json={"status": status})
        answer.raise_for_status()


@pytest.mark.parametrize("kills", [CLASSIC, KIP_848], ids=["cooperative-sticky", "KIP-848"])
async def test_whatever_is_killed_whenever_nothing_is_lost_and_nothing_stands_there_twice(
    broker: Broker, tmp_path: Path, request: pytest.FixtureRequest, kills: Kills
) -> None:
    dice, seed = new_dice(11)
    topic = broker.create_topic(partitions=PARTITIONS)
    with (
        patience(kills.seconds),
        open_ledger(broker.bootstrap, topic, partitions=PARTITIONS, per_s=12, seed=seed) as ledger,
    ):
        async with (
            open_scene(
                broker, tmp_path / "scene", ledger, kafka=COMMITS + kills.membership
            ) as scene,
            trio.open_nursery() as nursery,
        ):
            for _ in range(SERVICES):
                nursery.start_soon(scene.make_service().keep_running)
            await scene.receiver.wait_batches(1)
            async with trio.open_nursery() as watch:
                watch.start_soon(scene.watch_commits)
                await kill_at_random(scene, dice, kills)
                watch.cancel_scope.cancel()
            began = trio.current_time()
            await scene.settle()
            settled_s = trio.current_time() - began
            for service in scene.services:
                service.retire()
            async with trio.open_nursery() as ends:
                for service in scene.services:
                    ends.start_soon(service.now.process.wait)
            runs = [run for service in scene.services for run in service.runs]
            blows = Counter(blow.name for run in runs for blow in run.signals)
            codes = Counter(run.process.returncode for run in runs)
            tell(
                request.config,
                f"kills, {request.node.callspec.id}, seed {seed}",
                {
                    "signals": dict(blows),
                    "processes": len(runs),
                    "exit codes": dict(codes),
                    "batches through outboxes": sum(
                        service.count("upload done from outbox") for service in scene.services
                    ),
                    "revokes": sum(
                        service.count("partitions revoked") for service in scene.services
                    ),
                    "losses": sum(service.count("partitions lost") for service in scene.services),
                    "settled after s": round(settled_s, 1),
                    **scene.figures(),
                },
            )
            assert blows.total() == kills.count + SERVICES  # and one for each at the end
            scene.check_balance()
