"""The uploader with an outbox: when a batch goes there, what a full one means, and what is refused for good."""

from __future__ import annotations

import math
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import orjson
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable, UploadAnswer
from stationmaster.errors import StoreError
from stationmaster.events import (
    BatchOpened,
    StoreBlocked,
    StoreUnblocked,
    UploadDone,
    UploadKept,
    UploadRejected,
    UploadsDiverted,
    UploadsResumed,
)
from stationmaster.state import Replay, open_outbox
from stationmaster.testing import (
    Hang,
    MemoryDeadLetters,
    MemoryOutboxRows,
    RecordingObserver,
    RecordingSink,
)
from stationmaster.uploader import Uploader
from tests.pipelines import Setting, one_second
from tests.test_uploader import report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.batch import BatchReport

BUSY = TryAgain(reason="503 Service Unavailable")
FULL = StoreError("the disk is full", kind="disk-full")


@attrs.define(eq=False)
class Target:
    """A target that is down until a moment, for direct uploads and out of the outbox alike."""

    up_at: float = math.inf
    down: UploadAnswer = BUSY
    got: list[str] = attrs.field(factory=list)
    asked: list[float] = attrs.field(factory=list)

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        return await self.send(report.batch.batch_id, b"")

    async def send(self, batch_id: str, body: bytes, /) -> UploadAnswer:
        await trio.lowlevel.checkpoint()
        self.asked.append(trio.current_time())
        if trio.current_time() < self.up_at:
            return self.down
        self.got.append(batch_id)
        return Accepted()


@attrs.define(eq=False)
class Surroundings:
    """An outbox in memory and what is around it."""

    target: Target = attrs.field(factory=Target)
    rows: MemoryOutboxRows = attrs.field(factory=MemoryOutboxRows)
    letters: MemoryDeadLetters = attrs.field(factory=MemoryDeadLetters)
    observer: RecordingObserver = attrs.field(factory=RecordingObserver)

    @asynccontextmanager
    async def open(self, *, failures: int = 5) -> AsyncIterator[Replay]:
        async with open_outbox(
            self.rows,
            send=self.target.send,
            dead_letters=self.letters,
            failures=failures,
            observer=self.observer,
            clock=trio.current_time,
            jitter=random.Random(3),
        ) as outbox:
            yield outbox

    def uploader(self, outbox: Replay, *, limit_s: float = 60.0) -> Uploader:
        return Uploader(
            self.target,
            limit_s=limit_s,
            outbox=outbox,
            bury=self.letters.keep,
            observer=self.observer,
            jitter=random.Random(7),
        )


async def test_a_batch_that_is_not_accepted_in_time_is_kept_and_delivered_later(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings(Target(up_at=100))
    async with around.open(failures=1000) as outbox:
        await around.uploader(outbox).deliver(report())
        assert 50 < trio.current_time() <= 60
        (kept,) = around.observer.of(UploadKept)
        assert (kept.batch_id, kept.reason) == ("air_0_0_0", BUSY.reason)
        assert kept.attempts == len(around.target.asked)
        await trio.sleep(100)
    assert around.target.got == ["air_0_0_0"]
    assert len(around.rows) == 0


async def test_a_target_that_never_answers_costs_a_batch_its_limit_and_no_more(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings()
    sink = RecordingSink(otherwise=Hang())
    async with around.open() as outbox:
        uploader = around.uploader(outbox, limit_s=60.0)
        uploader._sink = sink
        await uploader.deliver(report())
    assert trio.current_time() == 60
    assert [event.reason for event in around.observer.of(UploadKept)] == [
        "no answer before the limit"
    ]


async def test_once_the_target_counts_as_down_batches_are_kept_without_a_try(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings(Target(up_at=3600, down=Unavailable(reason="401 Unauthorized")))
    async with around.open() as outbox:
        uploader = around.uploader(outbox)
        await uploader.deliver(report(0))
        assert trio.current_time() < 5
        asked = len(around.target.asked)
        before = trio.current_time()
        for offset in range(1, 50):
            await uploader.deliver(report(offset))
        assert trio.current_time() == before
        assert len(around.target.asked) <= asked + 1  # a probe
        kept = around.observer.of(UploadKept)[1:]
        assert [event.attempts for event in kept] == [0] * 49
        assert {event.reason for event in kept} == {"the target is known to be down"}
        assert len(around.observer.of(UploadsDiverted)) == 1
        await trio.sleep(4000)
        assert sorted(around.target.got) == sorted(f"air_0_{n}_0" for n in range(50))
        assert len(around.target.asked) < 400, "an hour of outage is not an hour of hammering"
        await uploader.deliver(report(50))
    assert len(around.observer.of(UploadsResumed)) == 1
    assert [event.report.batch.batch_id for event in around.observer.of(UploadDone)] == [
        "air_0_50_0"
    ]


async def test_a_batch_that_the_outbox_holds_already_is_not_uploaded_beside_it(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings(Target(up_at=10))
    async with around.open() as outbox:
        await outbox.put(report(), reason="from before a crash")
        await around.uploader(outbox).deliver(report())
        (kept,) = around.observer.of(UploadKept)
        assert (kept.attempts, kept.reason) == (0, "it lay in the outbox already")
        await trio.sleep(60)
    assert around.target.got == ["air_0_0_0"]


async def test_a_batch_that_a_failing_disk_has_kept_all_the_same_is_not_uploaded_beside_it(
    autojump_clock: MockClock,
) -> None:
    class Failing(MemoryOutboxRows):
        async def put(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[explicit-override]
            await super().put(*args, **kwargs)
            raise StoreError("fsync failed", kind="disk-error")

    around = Surroundings(Target(up_at=60), rows=Failing())
    async with around.open() as outbox:
        await around.uploader(outbox, limit_s=1.0).deliver(report())
        assert around.rows.ids() == ["air_0_0_0"]
        await trio.sleep(100)
    assert around.target.got == ["air_0_0_0"]
    assert len(around.observer.of(UploadKept)) == 1


async def test_a_cancelled_delivery_of_a_batch_that_is_held_is_not_told_as_kept() -> None:
    around = Surroundings()
    async with around.open() as outbox:
        await outbox.put(report(), reason="from before a crash")
        with trio.CancelScope() as scope:
            scope.cancel()
            await around.uploader(outbox).deliver(report())
    assert scope.cancelled_caught
    assert not around.observer.of(UploadKept)


async def test_a_full_outbox_keeps_the_batch_waiting_until_it_has_room(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings()
    around.rows.disk.otherwise = FULL
    async with around.open() as outbox, trio.open_nursery() as nursery:
        uploader = around.uploader(outbox, limit_s=1.0)
        nursery.start_soon(uploader.deliver, report(0))
        nursery.start_soon(uploader.deliver, report(1))
        await trio.sleep(100)
        assert around.observer.of(StoreBlocked) == [
            StoreBlocked(store="outbox", kind="disk-full", detail=str(FULL))
        ]
        assert not around.observer.of(UploadKept)
        around.rows.disk.otherwise = None
    assert trio.current_time() < 110
    assert not uploader.is_blocked
    assert sorted(around.rows.ids()) == ["air_0_0_0", "air_0_1_0"]
    assert len(around.observer.of(StoreUnblocked)) == 1


async def test_a_batch_that_waits_at_a_full_outbox_is_uploaded_when_the_target_is_back(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings(Target(up_at=50))
    around.rows.disk.otherwise = FULL
    async with around.open() as outbox:
        await around.uploader(outbox, limit_s=1.0).deliver(report())
    assert 50 <= trio.current_time() < 90
    assert around.target.got == ["air_0_0_0"]
    assert len(around.observer.of(UploadDone)) == len(around.observer.of(StoreUnblocked)) == 1


async def test_a_batch_that_is_refused_for_good_is_a_dead_letter_with_its_whole_body() -> None:
    around = Surroundings()
    async with around.open() as outbox:
        uploader = around.uploader(outbox)
        uploader._sink = RecordingSink([Rejected(status=422, answer="no such station")])
        await uploader.deliver(report(7))
    (letter,) = around.letters.letters
    assert (letter.reason, letter.detail) == ("rejected-upload", "422: no such station")
    assert (letter.topic, letter.partition, letter.offset) == ("air", 0, 7)
    assert letter.value is not None
    assert orjson.loads(letter.value)["batchId"] == letter.batch_id == "air_0_7_0"
    assert len(around.observer.of(UploadRejected)) == 1


async def test_a_full_outbox_uses_the_slots_up_and_consumption_goes_on_when_it_has_room(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings(Target(up_at=500))
    around.rows.max_bytes = 1_000  # two of them
    setting = Setting(40)
    async with around.open() as outbox:
        setting.sink = around.target  # type: ignore[assignment]
        async with setting.open(
            one_second, outbox=outbox, max_in_flight=8, upload_timeout_s=2.0
        ) as pipeline:
            await trio.sleep(400)
            moment = pipeline.statistics()
            assert (moment.in_flight, moment.blocked) == (8, ("outbox",))
            assert len(around.rows) == 2
            assert setting.committed <= 2
            assert len(setting.observer.of(BatchOpened)) == 10
            setting.source.end()
            await pipeline.wait_finished()
            assert pipeline.statistics().blocked == ()
        assert setting.committed == 40
        await trio.sleep(100)
    assert sorted(around.target.got) == sorted(f"air_0_{n}_0" for n in range(40))


async def test_a_drain_with_the_target_down_leaves_everything_in_the_outbox_and_commits_it(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings()
    setting = Setting(20)
    async with around.open() as outbox:
        setting.sink = around.target  # type: ignore[assignment]
        async with setting.open(one_second, outbox=outbox) as pipeline:
            await wait_all_tasks_blocked()
            pipeline.drain(grace_s=15)
            await pipeline.wait_finished()
            assert pipeline.dropped == 0
    assert setting.committed == len(around.rows) == 20


async def test_what_finds_no_room_before_the_grace_ends_is_dropped_and_not_committed(
    autojump_clock: MockClock,
) -> None:
    around = Surroundings()
    around.rows.disk.otherwise = FULL
    setting = Setting(3)
    async with around.open() as outbox:
        setting.sink = around.target  # type: ignore[assignment]
        async with setting.open(one_second, outbox=outbox, upload_timeout_s=2.0) as pipeline:
            await trio.sleep(10)
            pipeline.drain(grace_s=5)
            await pipeline.wait_finished()
    assert trio.current_time() == 15
    assert (pipeline.dropped, setting.committed) == (3, 0)
    assert len(around.observer.of(StoreBlocked)) == 0, "the pipeline tells its own observer"
    assert len(setting.observer.of(StoreBlocked)) == len(setting.observer.of(StoreUnblocked)) == 1
