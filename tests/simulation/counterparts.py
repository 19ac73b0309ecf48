"""What surrounds a process and outlives it: broker, disks, target; and the model server."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import TYPE_CHECKING, Final

import attrs
import trio

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderUnavailableError,
    RowRejectedError,
    SourceError,
    StoreError,
)
from stationmaster.reports import encode_report
from stationmaster.testing import MemorySource, ScriptedEmbedder
from stationmaster.testing.state import Disk
from tests.simulation.dice import Dice, Fault
from tests.simulation.telemetry import records_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stationmaster.abc import UploadAnswer, Vector, Withdrawn
    from stationmaster.batch import BatchReport, OffsetRange, Record
    from stationmaster.batcher import BatchPolicy
    from tests.simulation.telemetry import Name
    from tests.simulation.watch import Watch

BAD_TEXT: Final = "refuse me"
DISK_S: Final = 0.5
"""The slowest write."""


class Broker(MemorySource):
    """A log, and offsets that may only move over records that have a home."""

    def surround(self, dice: Dice, homes: Callable[[], set[Name]]) -> None:
        """Tell it what it needs of its world."""
        self.dice, self.homes = dice, homes
        self.watch: Watch
        """Of the process that reads it now."""
        self.burst = 0
        """Polls without a pause that are still to come."""

    async def poll(self) -> list[Record]:  # type: ignore[explicit-override]
        """Be quick, slow, or break."""
        dice = self.dice
        in_time = trio.current_time() <= self.watch.drained_at
        self.watch.check(in_time, "polled although polling was to stop")
        if dice.strikes(Fault.BURST, 0.05):
            self.burst = 10
        if self.burst:
            self.burst -= 1
        else:
            await trio.sleep(dice.choose((0.0, 0.05, 0.3, 1.0)))
        if dice.strikes(Fault.BROKER_SLOW, 0.05):
            await trio.sleep(dice.of(Fault.BROKER_SLOW).uniform(3, 30))
        if dice.strikes(Fault.BROKER_BREAKS, 0.01):
            self.watch.broke = True
            raise SourceError("the broker is gone, on purpose")
        return await super().poll()

    def watch_withdrawals(  # type: ignore[explicit-override]
        self,
        on_withdrawn: Callable[[Withdrawn], None],
        /,
        *,
        on_leaving: Callable[[Withdrawn], Sequence[OffsetRange]] | None = None,
    ) -> None:
        """Let the watch know first."""

        def withdrawn(gone: Withdrawn) -> None:
            self.watch.gone.update(gone)
            on_withdrawn(gone)

        super().watch_withdrawals(withdrawn, on_leaving=on_leaving)

    def account(self, offsets: OffsetRange, /) -> None:  # type: ignore[explicit-override]
        """Check what counts, and what is committed because of it."""
        key = offsets.topic, offsets.partition
        homes = self.homes()
        for name in self.names(key, offsets.first, offsets.last + 1):
            self.watch.check(name in homes, "accounted without a home", name, offsets)
        before = self.committed.get(key, 0)
        super().account(offsets)
        after = self.committed.get(key, 0)
        self.watch.check(after >= before, "a commit went back", key, before, after)
        for name in self.names(key, before, after):
            self.watch.check(name in homes, "committed beyond what is accounted for", name)

    def names(self, key: tuple[str, int], first: int, beyond: int) -> list[Name]:
        """Return the records of a partition that have these offsets."""
        return [
            (*key, record.offset) for record in self._logs[key] if first <= record.offset < beyond
        ]

    @property
    def everything(self) -> set[Name]:
        """All records."""
        return {(*key, record.offset) for key, log in self._logs.items() for record in log}

    @property
    def is_read(self) -> bool:
        """Whether everything is committed."""
        return all(
            self.committed.get(key, 0) == log[-1].offset + 1 for key, log in self._logs.items()
        )

    @property
    def partitions(self) -> list[tuple[str, int]]:
        """All of them."""
        return list(self._logs)

    def forget_commits(self) -> None:
        """Lose what a client had not sent when it died."""
        for key, commits in self.commits.items():
            if commits and self.dice.strikes(Fault.COMMITS_FORGOTTEN, 0.5):
                back = self.dice.of(Fault.COMMITS_FORGOTTEN).randrange(1, 6)
                kept = commits[:-back]
                del commits[len(kept) :]
                self.committed[key] = kept[-1] if kept else 0


@attrs.define(eq=False)
class Weather:
    """What fails at present, in phases; and the wall clock."""

    dice: Dice
    trouble_s: float
    """How long there is trouble; afterwards target and disks are well."""
    target_down: bool = False
    refuses_us: bool = False
    target_fails: float = 0.0
    disk_full: bool = False
    disk_fails: float = 0.0
    jump_s: float = 0.0

    @property
    def is_fair(self) -> bool:
        """Whether all trouble is over."""
        return trio.current_time() >= self.trouble_s

    def wall_clock(self) -> float:
        """Return seconds since the epoch, more or less."""
        return 1.7e9 + trio.current_time() + self.jump_s

    async def change(self) -> None:
        """Let phases of trouble come and go; then it is fair."""
        dice, plain = self.dice, self.dice.plain
        while not self.is_fair:
            self.target_down = dice.strikes(Fault.TARGET_DOWN, 0.25)
            self.refuses_us = dice.strikes(Fault.TARGET_REFUSES_US, 0.05)
            fails = dice.strikes(Fault.TARGET_FAILS, 0.3)
            self.target_fails = plain.choice((0.1, 0.5)) if fails else 0.0
            self.disk_full = dice.strikes(Fault.DISK_FULL, 0.15)
            fails = dice.strikes(Fault.DISK_FAILS, 0.25)
            self.disk_fails = plain.choice((0.1, 0.5)) if fails else 0.0
            if dice.strikes(Fault.CLOCK_JUMPS, 0.2):
                self.jump_s += dice.of(Fault.CLOCK_JUMPS).choice((-86400.0, -3600.0, 60.0, 3600.0))
            longest = self.trouble_s if self.target_down else 60.0
            lasts_s = plain.uniform(1, longest)
            await trio.sleep_until(min(trio.current_time() + lasts_s, self.trouble_s))
        self.target_down = self.refuses_us = self.disk_full = False
        self.target_fails = self.disk_fails = 0.0
        await trio.sleep_forever()


class DiceDisk(Disk):
    """A disk that is full for a while, fails now and then, and is slow."""

    weather: Weather

    async def write(self) -> None:  # type: ignore[explicit-override]
        """Write, or raise."""
        weather, dice = self.weather, self.weather.dice
        slow = dice.strikes(Fault.DISK_SLOW, 0.2)
        await trio.sleep(DISK_S if slow else dice.choose((0.0, 0.0, 0.01)))
        if weather.disk_full:
            raise StoreError("no space left on device", kind="disk-full")
        self._fail(weather.disk_fails)

    async def look(self) -> None:  # type: ignore[explicit-override]
        """Read, or raise."""
        await trio.lowlevel.checkpoint()
        self._fail(0.3 * self.weather.disk_fails)

    def _fail(self, rate: float) -> None:
        if rate and self.weather.dice.plain.random() < rate:
            raise StoreError("the disk fails", kind="disk-error")


@attrs.define(eq=False)
class Target:
    """Keeps what it accepts: the first body of every batch id."""

    seed: int
    weather: Weather
    check: Callable[..., None]
    bodies: dict[str, frozenset[Name]] = attrs.field(factory=dict, init=False)
    """Batch id -> the records of the body that came first."""
    homes: set[Name] = attrs.field(factory=set, init=False)
    deliveries: Counter[str] = attrs.field(factory=Counter, init=False)

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        """Be the sink."""
        return await self.send(report.batch.batch_id, encode_report(report))

    async def send(self, batch_id: str, body: bytes, /) -> UploadAnswer:
        """Take a body, or not."""
        weather, dice = self.weather, self.weather.dice
        await trio.sleep(dice.choose((0.0, 0.01, 0.1, 0.3)))
        if dice.strikes(Fault.TARGET_SLOW, 0.1):
            await trio.sleep(dice.of(Fault.TARGET_SLOW).uniform(1, 10))
        fair = weather.is_fair
        if not fair and dice.strikes(Fault.TARGET_HANGS, 0.02):
            await trio.sleep_forever()
        if weather.target_down:
            return TryAgain(reason="no connection")
        if weather.refuses_us:
            return Unavailable(reason="401", status=401)
        if weather.target_fails and dice.plain.random() < weather.target_fails:
            after_s = dice.choose((None, None, 0.0, 2.0, 120.0))
            return TryAgain(reason="503", status=503, retry_after_s=after_s)
        fate = Random(f"{self.seed} {batch_id}").random()  # the same each time
        if fate < 0.08 and Fault.TARGET_REJECTS in dice.faults:
            dice.struck[Fault.TARGET_REJECTS] += 1
            return Rejected(status=422, answer="no")
        if fate > 0.94 and not fair and Fault.TARGET_FAILS in dice.faults:
            return TryAgain(reason="500: this one only", status=500)
        records = records_in(body)
        known = self.bodies.setdefault(batch_id, records)
        self.check(known == records, "one id for two batches", batch_id, known ^ records)
        self.homes |= records
        self.deliveries[batch_id] += 1
        if not fair and dice.strikes(Fault.TARGET_ANSWER_LOST, 0.05):
            await trio.sleep(dice.choose((0.0, 1.0, 100.0)))
            return TryAgain(reason="the connection broke after the body was taken")
        return Accepted()


class ModelServer(ScriptedEmbedder):
    """Answers calls, within the batcher's bounds, or fails them."""

    def surround(self, dice: Dice, policy: BatchPolicy, check: Callable[..., None]) -> None:
        """Tell it what it needs of its world."""
        self.dice, self.policy, self.check = dice, policy, check
        self.paused_until = 0.0

    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:  # type: ignore[explicit-override]
        """Do what the dice say."""
        dice, policy = self.dice, self.policy
        check = self.check
        check(self.in_flight < policy.max_in_flight, "too many calls at once")
        check(0 < len(texts) <= policy.max_batch_rows, "a call of so many rows", len(texts))
        size = sum(map(len, texts))
        check(size <= policy.max_batch_bytes, "a call of so many bytes", size)
        check(trio.current_time() >= self.paused_until, "asked while it had asked to wait")
        self.in_flight += 1
        try:
            await trio.sleep(dice.choose((0.01, 0.05, 0.2)))
            if dice.strikes(Fault.MODEL_SLOW, 0.05):
                await trio.sleep(dice.of(Fault.MODEL_SLOW).uniform(0.5, 6))
            if dice.strikes(Fault.MODEL_HANGS, 0.01):
                await trio.sleep_forever()
        finally:
            self.in_flight -= 1
        if dice.strikes(Fault.MODEL_BUSY, 0.03):
            pause_s = dice.choose((None, 0.5, 3.0))
            if pause_s is not None:
                self.paused_until = trio.current_time() + pause_s
            raise EmbedderBusyError("429", retry_after_s=pause_s)
        if dice.strikes(Fault.MODEL_FAILS, 0.03):
            raise EmbedderUnavailableError("500")
        if any(BAD_TEXT in text for text in texts):
            raise RowRejectedError("400")
        vectors = [self.vector(text) for text in texts]
        if dice.strikes(Fault.MODEL_MISCOUNTS, 0.02):
            vectors.append(vectors[0])
        return vectors
