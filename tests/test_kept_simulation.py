"""A seeded simulation of what must not be lost: outages, failing disks, rejections, rebalances, ends of all kinds.

Rows, letters and commits outlive each life of the service, as a disk and a broker would. One seed makes one history. To
replay one: `python -m pytest "tests/test_kept_simulation.py" -k "seed-17"`.
"""

from __future__ import annotations

import random
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson
import pytest
import trio
from trio.testing import MockClock

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.batch_ring import BatchRing
from stationmaster.errors import StoreError
from stationmaster.events import BatchDropped
from stationmaster.pipeline import Pipeline, open_pipeline
from stationmaster.poller import Poller
from stationmaster.reports import encode_report
from stationmaster.settings import PipelineSettings
from stationmaster.state import Replay, open_outbox
from stationmaster.testing import MemoryDeadLetters, MemoryOutboxRows, MemorySource
from stationmaster.testing.state import Disk
from tests.telemetry import message_bytes
from tests.test_core_simulation import BrokenError, seeded_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stationmaster.abc import UploadAnswer
    from stationmaster.batch import BatchReport, KeptBatch, OffsetRange, StationInput
    from stationmaster.batch_ring import OpenBatch
    from stationmaster.events import Event

TROUBLE_S: Final = 400.0
"""Then disks and target are well again, but for what the target never bears."""
LIVES: Final = 40


class DiceDisk(Disk):
    """A disk that fails in phases, and now and then."""

    world: World

    async def write(self) -> None:  # type: ignore[explicit-override]
        await trio.sleep(self.world.dice.choice((0.0, 0.0, 0.01, 0.5)))
        self.world.fail_in_trouble(self.world.disk_fails)

    async def look(self) -> None:  # type: ignore[explicit-override]
        await trio.lowlevel.checkpoint()
        self.world.fail_in_trouble(0.3 * self.world.disk_fails)


class CheckedSource(MemorySource):
    """Offsets count only when their records have a home."""

    world: World

    def account(self, offsets: OffsetRange, /) -> None:  # type: ignore[explicit-override]
        homes = self.world.homes()
        key = offsets.topic, offsets.partition
        for record in self._logs[key]:
            if offsets.first <= record.offset <= offsets.last:
                name = (offsets.partition, record.offset)
                self.world.check(name in homes, "accounted without a home", name, offsets)
        super().account(offsets)


class World:
    """A log, a disk and a target, and one life of the service after another."""

    def __init__(self, seed: int, *, messages: int = 50) -> None:
        self.seed = seed
        self.dice = dice = random.Random(seed)
        self.broken = False
        self.disk_fails = 0.0
        self.target_fails = 0.0
        self.jump_s = 0.0
        self.accepted: dict[str, int] = {}
        """Batch id -> the last life in which it was accepted."""
        self.at_home: set[tuple[int, int]] = set()
        """(partition, offset) of records that were accepted, or that an operator took out of the letters."""
        self.lost_in: set[int] = set()
        """Lives in which partitions left: what comes again may be accepted again."""
        self.from_before: set[str] = set()
        """Batches that lay in the outbox when this life began: their records may have come again, at the same time."""
        self.lives = 0
        self.dropped = 0
        disks = [DiceDisk(), DiceDisk()]
        for disk in disks:
            disk.world = self
        self.rows = MemoryOutboxRows(max_bytes=dice.choice((600, 3_000, 10**6)), disk=disks[0])
        self.letters = MemoryDeadLetters(max_bytes=dice.choice((400, 10**6)), disk=disks[1])
        self.log = CheckedSource(max_poll_messages=dice.choice((1, 4, 20)), drain_timeout_s=3.0)
        self.log.world = self
        for _ in range(messages):
            partition = dice.randrange(2)
            offset = len(self.log._logs.get(("air", partition), ()))
            # A few records of each partition have one time.
            good = message_bytes(f"{partition}-{offset}", timestamp=offset // 3 * 60_000)
            self.log.put("air", partition, b"poison" if dice.random() < 0.25 else good)
        self.log.end()
        self.partitions = list(self.log._logs)
        self.settings = PipelineSettings(
            by=dice.choice(("message", "poll", "timestamp")),
            roster=["9-9"],  # never comes: a batch by timestamp is open to its deadline
            max_in_flight=dice.choice((1, 4, 64)),
            upload_timeout_s=dice.choice((1.0, 8.0)),
        )

    # ------------------------------------------------------------------------------------------------ what is watched

    def check(self, condition: object, *facts: object) -> None:
        if not condition and not self.broken:
            self.broken = True
            raise BrokenError(f"seed {self.seed}, t = {trio.current_time():.3f}", *facts)

    def homes(self) -> set[tuple[int, int]]:
        homes = self.at_home.copy()
        for row in self.rows._rows.values():
            homes |= records_of(row.body)
        return homes | self.in_letters()

    def in_letters(self) -> set[tuple[int, int]]:
        found: set[tuple[int, int]] = set()
        for letter in self.letters.letters:
            assert letter.value is not None
            found |= (
                records_of(letter.value) if letter.batch_id else {(letter.partition, letter.offset)}
            )
        return found

    detailed = False

    def observe(self, event: Event, /) -> None:
        self.dropped += isinstance(event, BatchDropped)

    # ------------------------------------------------------------------------------------------------ what surrounds it

    @property
    def in_trouble(self) -> bool:
        return trio.current_time() < TROUBLE_S

    def fail_in_trouble(self, rate: float) -> None:
        if self.in_trouble and self.dice.random() < rate:
            raise StoreError("the disk fails", kind="disk-error")

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        return await self.send(report.batch.batch_id, encode_report(report))

    async def send(self, batch_id: str, body: bytes, /) -> UploadAnswer:
        dice = self.dice
        await trio.sleep(dice.choice((0.0, 0.01, 0.3, 3.0)))
        if self.in_trouble and dice.random() < self.target_fails:
            if dice.random() < 0.02:
                await trio.sleep_forever()
            return dice.choice((TryAgain(reason="503"), Unavailable(reason="401")))
        fate = random.Random(f"{self.seed} {batch_id}").random()  # the same each time
        if fate < 0.1:
            return Rejected(status=422, answer="no")
        if fate < 0.2 and self.in_trouble:
            return TryAgain(reason="500: this one only")
        again = self.accepted.get(batch_id) == self.lives
        excused = self.lives in self.lost_in or batch_id in self.from_before
        self.check(not again or excused, "accepted twice in one life", batch_id)
        if batch_id not in self.accepted:  # else the target has it, with the body that came first
            self.at_home |= records_of(body)
        self.accepted[batch_id] = self.lives
        return Accepted()

    async def handle(self, station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(self.dice.choice((0.0, 0.1, 1.0, 20.0)))
        return {}

    async def turn_the_dice(self) -> None:
        """Let phases of trouble come and go."""
        dice = self.dice
        while True:
            self.disk_fails = dice.choice((0.0, 0.0, 0.3, 1.0))
            self.target_fails = dice.choice((0.0, 0.3, 1.0))
            self.jump_s += dice.choice((0.0, 0.0, -3600.0, 3600.0))
            await trio.sleep(dice.uniform(1, 40))
            if dice.random() < 0.3 or not self.in_trouble:  # an operator looks after the letters
                self.at_home |= self.in_letters()
                self.letters.clear()

    # ----------------------------------------------------------------------------------------------------------- lives

    async def life(self, ending: str) -> None:
        self.lives += 1
        self.from_before = set(self.rows.ids())
        self.log.lose([key for key in self.partitions if key in self.log._held])
        self.log.assign(self.partitions)
        ends_by: list[float] = []
        with trio.CancelScope() as around:
            async with (
                open_outbox(
                    self.rows,
                    send=self.send,
                    dead_letters=self.letters,
                    observer=self,
                    clock=lambda: 1e9 + trio.current_time() + self.jump_s,
                    jitter=self.dice,
                ) as outbox,
                open_pipeline(
                    self.log,
                    handler=self.handle,
                    sink=self,
                    outbox=outbox,
                    dead_letters=self.letters,
                    settings=self.settings,
                    observer=self,
                ) as pipeline,
                trio.open_nursery() as nursery,
            ):
                pipeline._uploader._jitter = self.dice
                nursery.start_soon(self.interfere, ending, pipeline, around, ends_by)
                await pipeline.wait_finished()
                if ends_by:
                    late_s = trio.current_time() - ends_by[-1]
                    self.check(late_s <= 1.0, "the end came late", late_s)  # one write of the disk
                if ending == "none":
                    with trio.move_on_after(300):
                        while len(self.rows):
                            await outbox.wait_change()
                nursery.cancel_scope.cancel()

    async def interfere(
        self, ending: str, pipeline: Pipeline, around: trio.CancelScope, ends_by: list[float]
    ) -> None:
        dice = self.dice
        for _ in range(dice.randrange(3)):
            await trio.sleep(dice.uniform(0, 15))
            self.lost_in.add(self.lives)
            if dice.random() < 0.5:
                self.log.lose(self.partitions[:1])
            else:
                await self.log.revoke(self.partitions[:1])
            self.log.assign(self.partitions[:1])
        await trio.sleep(dice.uniform(0, 60))
        if ending == "none":
            return
        grace_s = dice.choice((0.0, 3.0, 15.0))
        if ending == "cancel":
            grace_s = self.settings.grace_s
            around.cancel()
        else:
            pipeline.drain(grace_s=grace_s)
        ends_by.append(trio.current_time() + grace_s)

    async def main(self) -> None:
        everything = {
            (partition, record.offset)
            for (_, partition), log in self.log._logs.items()
            for record in log
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.turn_the_dice)
            while sum(self.log.committed.values()) < len(everything) or len(self.rows):
                self.check(self.lives < LIVES, "does not come to an end")
                well = not self.in_trouble or self.lives > 12
                await self.life("none" if well else self.dice.choice(("cancel", "drain", "none")))
            nursery.cancel_scope.cancel()
        missing = everything - self.at_home - self.in_letters()
        self.check(not missing, "lost", missing)

    def run(self) -> None:
        with seeded_scheduler(self.seed):
            trio.run(self.main, clock=MockClock(autojump_threshold=0))


def records_of(body: bytes) -> set[tuple[int, int]]:
    """Return (partition, offset) of the records whose stations stand in an upload, done or not."""
    form = orjson.loads(body)
    names = [
        each["stationId"]
        for each in (*form["results"], *form["unsuccessful"])
        if each.get("outcome") != "missing"
    ]
    return {(int(one), int(two)) for one, two in (name.split("-") for name in names)}


SEEDS: Final = range(14)


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"seed-{seed}") for seed in SEEDS])
def test_no_record_counts_without_a_home_and_none_is_lost(seed: int) -> None:
    World(seed).run()


# ------------------------------------------------------------------------------------- bugs that it must be able to see


def enclose_refused_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Poller, "_follow", lambda self, record: None)


def count_what_the_outbox_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put = Replay.put

    async def careless(self: Replay, report: BatchReport, /, *, reason: str) -> None:
        with suppress(StoreError):
            await put(self, report, reason=reason)

    monkeypatch.setattr(Replay, "put", careless)


def count_what_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = BatchRing._drop

    def careless(self: BatchRing, opened: OpenBatch) -> None:
        self._account(opened.draft)
        drop(self, opened)

    monkeypatch.setattr(BatchRing, "_drop", careless)


def delete_rejected_rows_without_a_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    async def careless(self: Replay, row: KeptBatch, body: bytes, answer: Rejected) -> None:
        await self._settle(row.batch_id, partial(self._rows.delete, row.batch_id))

    monkeypatch.setattr(Replay, "_rejected", careless)


@pytest.mark.parametrize(
    "mutate",
    [
        enclose_refused_records,
        count_what_the_outbox_refused,
        count_what_was_dropped,
        delete_rejected_rows_without_a_letter,
    ],
)
def test_it_sees_a_bug(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    assert any(breaks(seed) for seed in SEEDS)


def breaks(seed: int) -> bool:
    """Tell whether an invariant does not hold; what else goes wrong is raised."""
    try:
        World(seed).run()
    except* BrokenError:
        broken = True
    else:
        broken = False
    return broken
