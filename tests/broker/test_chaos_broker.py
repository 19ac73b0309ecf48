"""One service whose broker dies and comes back, and whose network is cut, while records keep coming."""

from __future__ import annotations

import signal
import sqlite3
import statistics
import time
from contextlib import closing
from typing import TYPE_CHECKING, Final, Literal

import attrs
import pytest
import trio

from tests.broker.chaos import new_dice, open_scene, patience, tell, until
from tests.ledger import open_ledger

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.broker.chaos import Scene
    from tests.broker.cluster import Broker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

PARTITIONS: Final = 6
RECOVERY_S: Final = 60.0


@attrs.frozen(kw_only=True)
class Fault:
    """Something that comes between the service and its broker."""

    kind: Literal["kill", "stall", "drop"]
    lasts_s: float
    """A killed broker stays down as long, and then needs some seconds to start."""
    after_s: float
    """How long all is well before it."""

    async def begin(self, broker: Broker) -> None:
        if self.kind == "kill":
            await trio.to_thread.run_sync(broker.kill)
        else:
            broker.relay.cut(self.kind)

    async def end(self, broker: Broker) -> None:
        """Returns when the broker is there again."""
        if self.kind == "kill":
            await trio.to_thread.run_sync(broker.start)
        else:
            broker.relay.mend()


def draw_faults(dice: random.Random) -> list[Fault]:
    """Ten kills and ten cuts; the cuts last 2.5 minutes together at most."""
    faults = [
        Fault(kind="kill", lasts_s=dice.uniform(1, 5), after_s=dice.uniform(0, 3))
        for _ in range(10)
    ]
    cuts_s = [dice.uniform(5, 30) for _ in range(10)]
    squeeze = min(1.0, 100 / sum(seconds - 5 for seconds in cuts_s))  # the 5 s are for each of them
    faults += [
        Fault(
            kind="stall" if number % 2 else "drop",
            lasts_s=5 + (seconds - 5) * squeeze,
            after_s=dice.uniform(0, 3),
        )
        for number, seconds in enumerate(cuts_s)
    ]
    dice.shuffle(faults)
    return faults


async def strike(scene: Scene, broker: Broker, fault: Fault) -> float:
    """Let it happen; return the seconds from the broker's return to the first batch of a newer record."""
    await trio.sleep(fault.after_s)
    await fault.begin(broker)
    known = len(scene.ledger.entries)
    await trio.sleep(fault.lasts_s)
    ending = time.time()  # the receiver's clock
    await fault.end(broker)
    returned = time.time()
    first: list[float] = []

    def is_back() -> bool:
        news = {
            f"{scene.ledger.topic}_{partition}_{offset}"
            for partition, offset in list(scene.ledger.entries)[known:]
        }
        with closing(sqlite3.connect(scene.receiver.database)) as db:
            query = "SELECT batch_id, received_at FROM batches WHERE received_at > ?"
            first[:] = [
                received_at
                for batch_id, received_at in db.execute(query, (ending,))
                if batch_id.rpartition("_")[0] in news
            ]
        return bool(first)

    await until(is_back, f"a new batch after {fault}", seconds=RECOVERY_S)
    return max(0.0, min(first) - returned)


def summary(recoveries: list[float]) -> str:
    return f"median {statistics.median(recoveries):.2f} s, worst {max(recoveries):.2f} s"


async def test_one_process_outlives_ten_deaths_of_its_broker_and_ten_cuts_and_loses_nothing(
    own_broker: Broker, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dice, seed = new_dice(23)
    topic = own_broker.create_topic(partitions=PARTITIONS)
    recoveries: dict[str, list[float]] = {"kill": [], "stall": [], "drop": []}
    with (
        patience(600),
        open_ledger(
            own_broker.bootstrap, topic, partitions=PARTITIONS, per_s=12, seed=seed
        ) as ledger,
    ):
        async with (
            open_scene(
                own_broker, tmp_path / "scene", ledger, bootstrap=own_broker.relayed
            ) as scene,
            scene.make_service().open_run() as run,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(run.ends)  # which complains when it does so by itself
            await scene.receiver.wait_batches(1)
            for fault in draw_faults(dice):
                recoveries[fault.kind].append(await strike(scene, own_broker, fault))
            await scene.settle()
            run.send(signal.SIGTERM)
            await run.process.wait()
            tell(
                request.config,
                f"broker killed and cut off, seed {seed}",
                {
                    **{
                        f"recovery after {kind} ({len(each)})": summary(each)
                        for kind, each in recoveries.items()
                    },
                    "recovery": summary([each for some in recoveries.values() for each in some]),
                    "exit code": run.process.returncode,
                    "partitions lost": len(run.events("partitions lost")),
                    **scene.figures(),
                },
            )
            assert run.process.returncode == 0
            scene.check_balance()
