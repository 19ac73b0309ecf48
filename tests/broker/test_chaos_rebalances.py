"""A storm of joins and leaves, met with the drain and without it."""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from tests.broker.chaos import new_dice, open_scene, patience, tell, until
from tests.broker.operating import Operator
from tests.ledger import open_ledger

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from pathlib import Path

    from tests.broker.chaos import Run, Scene, Service
    from tests.broker.cluster import Broker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

PARTITIONS: Final = 6
GUESTS: Final = 3
STEPS: Final = 40
JOIN_S: Final = 40.0

MEMBERSHIP: Final = (
    'assignor = "cooperative-sticky"\nsession_timeout_s = 6.0\n'
    'options = { "heartbeat.interval.ms" = 300 }\n'
)


@attrs.frozen(kw_only=True)
class Step:
    """A guest that is not there joins, or one that is there leaves."""

    guest: int
    after_s: float


def draw_steps(dice: random.Random) -> list[Step]:
    """Beside the member that stays there are one to three guests, from the first step on."""
    steps: list[Step] = []
    present: set[int] = set()
    for _ in range(STEPS):
        absent = set(range(GUESTS)) - present
        joins = len(present) <= 1 or (absent and dice.random() < 0.5)
        guest = dice.choice(sorted(absent if joins else present))
        present ^= {guest}
        steps.append(Step(guest=guest, after_s=dice.uniform(0.1, 0.6)))
    return steps


async def weather(scene: Scene, steps: Sequence[Step]) -> None:
    """Let guests join and leave, then let it settle, and end all of them."""
    async with trio.open_nursery() as nursery:
        stays = scene.make_service()
        nursery.start_soon(stays.keep_running)
        await scene.receiver.wait_batches(1)
        guests = [scene.make_service() for _ in range(GUESTS)]
        present: set[int] = set()
        for step in steps:
            await trio.sleep(step.after_s)
            guest = guests[step.guest]
            if step.guest in present:
                guest.now.send(signal.SIGTERM)
            else:
                if guest.runs:
                    await guest.now.process.wait()
                run = await nursery.start(visit, guest)
                await until(partial(has_partitions, run), "a share", seconds=JOIN_S)
            present ^= {step.guest}
        await scene.settle()
        stays.retire()
        for number in present:
            guests[number].now.send(signal.SIGTERM)


async def visit(guest: Service, *, task_status: trio.TaskStatus[Run]) -> None:
    async with guest.open_run() as run:
        task_status.started(run)
        await run.ends()


def has_partitions(run: Run) -> bool:
    return any(event["partitions"] for event in run.events("partitions assigned"))


def figures(scene: Scene) -> dict[str, object]:
    revokes = [
        event
        for service in scene.services
        for run in service.runs
        for event in run.events("partitions revoked")
        if event["partitions"]
    ]
    return {
        "revokes": len(revokes),
        "revokes that waited or gave up": sum(
            event["drain_s"] > 0.05 or not event["drained"] for event in revokes
        ),
        "longest drain s": max((event["drain_s"] for event in revokes), default=0),
        "batches withdrawn": sum(service.count("batch withdrawn") for service in scene.services),
        "batches of partitions that were lost": len(scene.lost_batches()),
        **scene.figures(),
    }


async def test_a_drain_saves_a_rebalance_storm_from_doing_work_twice_and_nothing_is_lost_either_way(
    broker: Broker, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dice, seed = new_dice(37)
    steps = draw_steps(dice)
    scenes: dict[str, Scene] = {}

    async def run_storm(drain: str, kafka: str) -> None:
        operator = Operator(broker.bootstrap)  # one of its own: both storms ask at the same time
        topic = operator.create_topic(partitions=PARTITIONS)
        with open_ledger(
            operator.bootstrap, topic, partitions=PARTITIONS, per_s=8, seed=seed
        ) as ledger:
            async with open_scene(
                operator,
                tmp_path / drain,
                ledger,
                kafka=MEMBERSHIP + kafka,
                quickest_s=0.5,
                slowest_s=1.5,
            ) as scene:
                await weather(scene, steps)
                scenes[drain] = scene
                tell(request.config, f"rebalance storm, drain {drain}, seed {seed}", figures(scene))
                scene.check_balance()

    with patience(300):
        async with trio.open_nursery() as both:
            both.start_soon(run_storm, "on", "")
            both.start_soon(run_storm, "off", "drain_timeout_s = 0.001\n")

    assert scenes["off"].runs_again() > 0, "no revoke met an open batch: this proves nothing"
    # A member that is not let run for its whole session loses its partitions: that is no revoke, and no drain helps.
    drained, lost = scenes["on"], scenes["on"].lost_batches()
    assert (drained.sent_again(but_for=lost), drained.runs_again(but_for=lost)) == (0, 0)
