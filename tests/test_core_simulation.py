"""A seeded simulation of the core: faults by dice on a virtual clock, invariants that nothing can swallow.

One seed makes one history. To replay one: `python -m pytest "tests/test_core_simulation.py" -k "seed-17"`.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from stationmaster.abc import Accepted, Rejected, TryAgain, UploadAnswer
from stationmaster.batch import Batch, BatchReport, ClosedBy, OffsetRange, Outcome, Record
from stationmaster.errors import UploadFailedError
from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    BatchOpened,
    BatchWithdrawn,
    EmptyBatch,
    MessageRefused,
    StationAnswered,
    UploadFailed,
)
from stationmaster.pipeline import Pipeline, open_pipeline
from stationmaster.settings import PipelineSettings
from stationmaster.testing import MemorySource
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stationmaster.abc import Withdrawn
    from stationmaster.batch import StationInput
    from stationmaster.events import Event

CLEAN_UP_S = 0.2
GRACE_S = 6.0


class BrokenError(BaseException):
    """An invariant does not hold. No Exception: no handler edge may take it for a station's failure."""


class CrashError(Exception):
    """The source breaks, on purpose."""


@contextmanager
def seeded_scheduler(seed: int) -> Iterator[None]:
    """Let trio run the tasks of a tick in an order that the seed decides.

    This is a private hook of trio (there is no public one); `test_one_seed_makes_one_history` notices if it moves.
    """
    scheduler = sys.modules["trio._core._run"]
    dice: random.Random = scheduler._r
    state = dice.getstate()
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[attr-defined]
    dice.seed(seed)
    try:
        yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = False  # type: ignore[attr-defined]
        dice.setstate(state)


class World:
    """One log of messages, consumed by one life of a pipeline after another."""

    def __init__(self, seed: int, *, messages: int = 60, stations: int = 16) -> None:
        self.dice = dice = random.Random(seed)
        self.seed = seed
        self.digest = hashlib.blake2b(digest_size=8)
        self.lives = self.jobs = 0
        self.broken = False
        self.end = self.crash_at = math.inf
        self.log = MemorySource(max_poll_messages=dice.choice((1, 3, 20)))
        names = [f"S{number:02}" for number in range(stations)]
        for _ in range(messages):
            value = message_bytes(*dice.sample(names, dice.randint(0, stations)))
            poison = dice.random() < 0.05
            self.log.put("air", dice.randrange(2), b"poison" if poison else value)
        self.log.end()
        self.partitions = list(self.log.committed) or [("air", 0), ("air", 1)]
        self.settings = PipelineSettings(
            by=dice.choice(("message", "message", "poll")),
            quorum=dice.choice((1.0, 1.0, 0.8)),
            max_in_flight=dice.choice((2, 8, 64)),
            max_live=dice.choice((stations // 2, 1_000)),
            idle_s=dice.choice((5.5, 600.0)),
            job_timeout_s=dice.choice((None, None, 2.0)),
            breaker_failures=dice.choice((0, 1, 3)),
            breaker_probe_s=dice.choice((1.0, 5.0)),
            upload_timeout_s=8.0,
            grace_s=GRACE_S,
        )

    # ------------------------------------------------------------------------------------------------ what is watched

    def check(self, condition: object, *facts: object) -> None:
        if (
            not condition and not self.broken
        ):  # the first one tells; what it breaks besides is noise
            self.broken = True
            raise BrokenError(f"seed {self.seed}, t = {trio.current_time():.6f}", *facts)

    def note(self, *facts: object) -> None:
        self.digest.update(repr((round(trio.current_time(), 9), facts)).encode())

    detailed = True

    def observe(self, event: Event, /) -> None:
        now = trio.current_time()
        if isinstance(event, BatchOpened):
            self.opened[event.batch] = len(self.opened)
            self.check(not self.has_left(event.batch), "opened after its partitions left")
            self.check(event.in_flight <= self.settings.max_in_flight, "slots")
        elif isinstance(event, StationAnswered):
            self.answered_at[event.batch_id] = now
        elif isinstance(event, BatchClosed):
            self.decided(event.report, now, event.lateness_s)
        elif isinstance(event, BatchDropped):
            self.check(now >= self.end, "dropped before the end of the grace")
            self.ended.add(event.batch)
        elif isinstance(event, BatchWithdrawn):
            self.check(self.has_left(event.batch), "withdrawn, and its partitions are here")
            self.ended.add(event.batch)
        elif isinstance(event, UploadFailed) and not self.crashed:
            # The pipeline ends: what is open has the grace, as in a drain.
            self.grace(GRACE_S)
        elif isinstance(event, EmptyBatch):
            self.may_be_accounted.update(event.batch.ranges)
        elif isinstance(event, MessageRefused):
            record = event.record
            self.may_be_accounted.add(
                OffsetRange(
                    topic=record.topic,
                    partition=record.partition,
                    first=record.offset,
                    last=record.offset,
                    generation=record.generation,
                )
            )
        self.note(type(event).__name__)

    def grace(self, seconds: float) -> None:
        self.end = min(self.end, trio.current_time() + seconds)

    def decided(self, report: BatchReport, now: float, lateness_s: float) -> None:
        batch = report.batch
        self.check(batch in self.opened, "closed without being opened")
        self.check(batch not in self.ended, "two reports of one batch", batch.batch_id)
        self.ended.add(batch)
        due = batch.deadline
        if report.closed_by is not ClosedBy.DEADLINE:
            due = self.answered_at[batch.batch_id]
        self.check(
            now - due < 1e-9 and lateness_s < 1e-9, "late decision", report.closed_by, now - due
        )
        self.check(
            [result.station_id for result in report.results] == list(batch.entries),
            "a station is lost, or out of its order",
        )
        for result in report.results:
            if result.outcome is Outcome.SUCCEEDED:
                self.check(
                    result.value == {"of": self.opened[batch], "by": result.station_id},
                    "foreign result",
                )
        if report.closed_by is ClosedBy.COMPLETE and self.settings.job_timeout_s is None:
            self.check(report.counts[Outcome.TIMED_OUT] == 0, "complete, and somebody timed out")

    # ------------------------------------------------------------------------------------------------ source and sink

    async def poll(self) -> list[Record]:
        await trio.sleep(self.dice.choice((0.0, 0.05, 0.3, 1.0, 12.0 * (self.dice.random() < 0.1))))
        if trio.current_time() >= self.crash_at:
            self.crashed = True
            raise CrashError
        return await self.log.poll()

    def account(self, offsets: OffsetRange, /) -> None:
        self.check(offsets in self.may_be_accounted, "accounted before it was delivered", offsets)
        self.may_be_accounted.discard(offsets)
        self.log.account(offsets)

    def watch_withdrawals(self, on_withdrawn: Callable[[Withdrawn], None], /) -> None:
        def withdrawn(gone: Withdrawn) -> None:
            self.gone.update(gone)
            on_withdrawn(gone)

        self.log.watch_withdrawals(withdrawn)

    def has_left(self, batch: Batch) -> bool:
        return self.gone.issuperset((r.topic, r.partition, r.generation) for r in batch.ranges)

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        self.check(report.batch in self.ended, "uploaded before its decision")
        x = self.dice.random()
        if x < 0.01:
            await trio.sleep_forever()
        await trio.sleep(self.dice.choice((0.0, 0.01, 2.0 * self.dice.random())))
        if x < 0.1:
            return TryAgain(reason="503")
        self.check(report.batch not in self.delivered, "delivered twice", report.batch.batch_id)
        self.delivered.add(report.batch)
        self.may_be_accounted.update(report.batch.ranges)
        self.note("delivered", report.batch.batch_id)
        return Rejected(status=422, answer="") if x < 0.13 else Accepted()

    # -------------------------------------------------------------------------------------------------------- handler

    async def handle(self, station: StationInput) -> Mapping[str, Any] | None:
        name, batch, now = station.station_id, station.batch, trio.current_time()
        number = self.opened[batch]
        self.check(name not in self.running, "two jobs of one station at once", name)
        self.check(self.last.get(name, -1) < number, "out of order", name, number)
        self.check(now < batch.deadline, "started after its deadline", name, now - batch.deadline)
        self.check(batch not in self.ended, "started after its batch was closed", name)
        ambient = trio.current_effective_deadline()
        falls = self.helper_fell.get(name) == now  # in this very tick: it takes the job along
        limit = min(batch.deadline, now + (self.settings.job_timeout_s or math.inf))
        self.check(falls or ambient == min(limit, self.end), "ambient deadline", ambient)
        self.running.add(name)
        self.last[name] = number
        self.jobs += 1
        try:
            answers = await self.behave(station)
        except trio.Cancelled:
            fell_s = trio.current_time() - self.helper_fell.get(name, -math.inf)
            excused = batch in self.ended or self.has_left(batch)
            excused = excused or trio.current_time() >= min(limit, self.end)
            self.check(excused or fell_s <= CLEAN_UP_S + 1e-9, "cancelled", name)
            raise
        finally:
            self.running.discard(name)
            self.note("ran", name, number)
        return {"of": number, "by": name} if answers else None

    async def behave(self, station: StationInput) -> bool:
        dice = self.dice
        x = dice.random()
        if x < 0.02:
            await trio.sleep_forever()
        elif x < 0.06:
            await trio.sleep(dice.uniform(0.5, 8))
        elif x < 0.09:
            await trio.sleep(dice.random() * 0.1)
            raise ValueError(station.station_id)
        elif x < 0.12:
            return False
        elif x < 0.15:  # its own nursery fails while it is cancelled
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                try:
                    await trio.sleep(dice.uniform(0.1, 8))
                finally:
                    raise ValueError("clean-up")
        elif x < 0.18:  # a slow clean-up under a shield
            try:
                await trio.sleep(dice.uniform(0.1, 8))
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(CLEAN_UP_S)
        elif x < 0.23:  # its answer comes in the very tick of the deadline
            await trio.sleep_until(station.deadline)
        elif x < 0.24:
            station.nursery.start_soon(self.fall, station.station_id)
            await trio.sleep(dice.random())
        else:
            await trio.sleep(dice.random() * 0.2)
        return True

    async def fall(self, name: str) -> None:
        """Fail, as a helper task of a station."""
        await trio.sleep(self.dice.random() * 2)
        self.helper_fell[name] = trio.current_time()
        raise RuntimeError("a helper fell")

    # ----------------------------------------------------------------------------------------------------------- lives

    async def life(self, ending: str) -> None:
        self.opened: dict[Batch, int] = {}
        self.gone: set[tuple[str, int, int]] = set()
        self.answered_at: dict[str, float] = {}
        self.ended: set[Batch] = set()
        self.delivered: set[Batch] = set()
        self.may_be_accounted: set[OffsetRange] = set()
        self.running: set[str] = set()
        self.last: dict[str, int] = {}
        self.helper_fell: dict[str, float] = {}
        self.end = self.crash_at = math.inf
        self.crashed = False
        self.lives += 1
        after_s = self.dice.uniform(0.1, 25)
        if ending == "crash":
            self.crash_at = trio.current_time() + after_s
        self.log.lose(self.partitions)
        self.log.assign(self.partitions)
        try:
            with trio.CancelScope() as around:
                async with open_pipeline(
                    self, handler=self.handle, sink=self, settings=self.settings, observer=self
                ) as pipeline:
                    pipeline._uploader._jitter = self.dice
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self.interfere, ending, after_s, pipeline, around)
                        await pipeline.wait_finished()
                        nursery.cancel_scope.cancel()
        except* (UploadFailedError, CrashError):
            pass  # on purpose; whatever else comes out is an error of the core
        self.check(not self.running, "still running", self.running)
        late = trio.current_time() - self.end
        self.check(late <= CLEAN_UP_S + 1e-9, "the end came late", late)
        self.check(self.ended >= self.opened.keys(), "a batch was neither closed nor dropped")
        self.note("end of life", ending)

    async def interfere(
        self, ending: str, after_s: float, pipeline: Pipeline, around: trio.CancelScope
    ) -> None:
        await trio.sleep(after_s / 2)
        if self.dice.random() < 0.3:  # a partition is lost and comes back
            self.log.lose(self.partitions[:1])
            self.log.assign(self.partitions[:1])
        await trio.sleep(after_s / 2)
        if ending == "cancel":
            self.grace(GRACE_S)
            around.cancel()
        elif ending in ("drain", "drain twice"):
            self.grace(GRACE_S)
            pipeline.drain(grace_s=GRACE_S)
            if ending == "drain twice":
                await trio.sleep(self.dice.random() * GRACE_S)
                self.grace(0)
                pipeline.drain(grace_s=0)

    async def main(self) -> None:
        endings = ["none", "drain", "drain twice", "cancel", "crash"]
        total = sum(len(records) for records in self.log._logs.values())
        while sum(self.log.committed.values()) < total:
            self.check(self.lives < 200, "does not come to an end")
            await self.life(self.dice.choice(endings) if self.lives < 8 else "none")

    def run(self) -> str:
        with seeded_scheduler(self.seed):
            trio.run(self.main, clock=MockClock(autojump_threshold=0))
        return self.digest.hexdigest()


@pytest.mark.parametrize("seed", range(30), ids=lambda seed: f"seed-{seed}")
def test_every_invariant_holds_whatever_the_dice_say(seed: int) -> None:
    World(seed).run()


def test_one_seed_makes_one_history() -> None:
    first, again, other = World(1), World(1), World(2)
    assert first.run() == again.run() != other.run()
    assert first.jobs == again.jobs > 100


def test_a_broken_invariant_cannot_be_swallowed() -> None:
    class Wrong(World):
        async def behave(self, station: StationInput) -> bool:  # type: ignore[explicit-override]
            self.check(self.jobs < 10, "on purpose")
            await trio.sleep(0.1)
            return True

    with pytest.raises(BrokenError, match="on purpose"):
        Wrong(1).run()
