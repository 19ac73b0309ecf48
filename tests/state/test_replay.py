from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain
from stationmaster.batch import DeadLetter, KeptBatch
from stationmaster.errors import StoreError
from stationmaster.events import (
    DeadLettersKept,
    OutboxDelivered,
    OutboxRejected,
    OutboxRetried,
    StoreBlocked,
    StoreUnblocked,
    UploadAttempted,
    UploadsDiverted,
)
from stationmaster.reports import encode_report
from stationmaster.state import open_outbox
from stationmaster.testing import Disk, MemoryOutboxRows
from tests.state.settings import Setting, ids
from tests.state.targets import DOWN
from tests.uploads import report

if TYPE_CHECKING:
    from trio.testing import MockClock

DISK_FULL = StoreError("no space left", kind="disk-full")


# ----------------------------------------------------------------------------------------------- a target that works


@pytest.mark.parametrize("connections", [1, 4])
async def test_a_backlog_is_delivered_oldest_first(
    autojump_clock: MockClock, connections: int
) -> None:
    setting = Setting()
    await setting.lay(*ids(50))
    setting.target.seconds = 0.1
    async with setting.open(connections=connections):
        await setting.target.accepted.wait_value(50)
        await wait_all_tasks_blocked()
    for position, batch_id in enumerate(setting.target.ids()):
        assert abs(position - int(batch_id[1:])) < connections, "those under way have no order"
    delivered = [event.batch_id for event in setting.observer.of(OutboxDelivered)]
    assert sorted(delivered) == ids(50)


async def test_it_begins_with_one_at_a_time_and_widens_to_its_connections(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay(*ids(30))
    setting.target.seconds = 1.0
    async with setting.open(connections=3):
        await setting.target.accepted.wait_value(30)
    begun = [at for at, _ in setting.target.sent]
    at_once = [begun.count(at) for at in sorted(set(begun))]
    assert at_once[:2] == [1, 2]
    assert setting.target.most_in_flight == 3


async def test_no_more_bodies_are_in_memory_than_are_sent(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay(*ids(100))
    setting.target.seconds = 1.0
    most = 0

    def look(batch_id: str) -> None:
        nonlocal most
        most = max(most, setting.rows.bodies_read - len(setting.target.taken))

    setting.target.on_sent = look
    async with setting.open(connections=4):
        await setting.target.accepted.wait_value(100)
    assert most == 4


async def test_a_batch_that_is_put_is_sent_without_delay(autojump_clock: MockClock) -> None:
    setting = Setting()
    async with setting.open() as outbox:
        await trio.sleep(10.3)
        began = trio.current_time()
        await outbox.put(report("b1"), reason="500")
        await setting.target.accepted.wait_value(1)
        assert trio.current_time() == began


async def test_a_delivery_says_how_long_the_batch_lay_there(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay("b1")
    await trio.sleep(100)
    setting.target.script.append(DOWN)
    async with setting.open():
        await setting.target.accepted.wait_value(1)
        await wait_all_tasks_blocked()
    [delivered] = setting.observer.of(OutboxDelivered)
    assert delivered.attempts == 2
    assert 100.0 < delivered.waited_s < 103.0
    assert delivered.rows_left == 0


async def test_each_send_is_told_with_its_batch_its_time_and_its_way(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.seconds = 0.25
    async with setting.open():
        await setting.target.accepted.wait_value(1)
        await wait_all_tasks_blocked()
    assert setting.observer.of(UploadAttempted) == [
        UploadAttempted(batch_id="b1", status=200, seconds=0.25, from_outbox=True)
    ]
    [delivered] = setting.observer.of(OutboxDelivered)
    assert delivered.waited_s == 0.25


async def test_a_wall_clock_that_was_put_back_makes_no_wait_negative(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.jump_s = -3600.0
    async with setting.open():
        await setting.target.accepted.wait_value(1)
        await wait_all_tasks_blocked()
    [delivered] = setting.observer.of(OutboxDelivered)
    assert delivered.waited_s == 0.0


async def test_leaving_gives_up_what_is_being_sent_and_its_row_stays(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.seconds = 30.0
    async with setting.open():
        await setting.target.sends.wait_value(1)
    assert setting.rows.ids() == ["b1"]
    assert setting.target.in_flight == 0
    assert setting.observer.events == []


async def test_an_accepted_batch_is_deleted_even_when_leaving_at_that_moment(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    with trio.CancelScope() as scope:
        setting.target.on_sent = lambda _: scope.cancel()

        async def send(batch_id: str, body: bytes) -> Accepted:
            with trio.CancelScope(shield=True):
                await setting.target.send(batch_id, body)
            return Accepted()

        async with open_outbox(setting.rows, send=send, dead_letters=setting.dead_letters):
            await trio.sleep_forever()
    assert setting.target.taken
    assert setting.rows.ids() == []


# ------------------------------------------------------------------------------------------------ one batch's trouble


@pytest.mark.parametrize("poisonous", [2, 30])
async def test_batches_that_the_target_cannot_bear_keep_neither_it_down_nor_others_back(
    autojump_clock: MockClock, poisonous: int
) -> None:
    setting = Setting()
    await setting.lay(*ids(100))
    setting.target.by_id |= dict.fromkeys(ids(poisonous), DOWN)
    setting.target.script.extend([DOWN] * 20)  # an outage: each has failed already
    setting.target.seconds = 1.0
    async with setting.open() as outbox:
        await setting.target.accepted.wait_value(100 - poisonous)
        await outbox.put(report("new"), reason="500")
        await trio.sleep(900)
        assert setting.rows.ids() == ids(poisonous)
    assert "new" in setting.target.taken


async def test_a_batch_that_fails_alone_holds_up_no_other(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay(*ids(20))
    setting.target.by_id["b0003"] = DOWN
    async with setting.open():
        await setting.target.accepted.wait_value(19)
        assert trio.current_time() == 0.0
        await trio.sleep(600)
        assert setting.rows.ids() == ["b0003"]
        assert setting.observer.of(UploadsDiverted) == [], "it alone failed, never 5 times"
        del setting.target.by_id["b0003"]
        await setting.target.accepted.wait_value(20)


async def test_a_failing_batch_comes_again_after_growing_pauses(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.by_id["b1"] = DOWN
    async with setting.open(failures=10**9, max_backoff_s=30.0):
        await trio.sleep(200)
    retried = setting.observer.of(OutboxRetried)
    assert [event.attempts for event in retried] == list(range(1, len(retried) + 1))
    for event, longest in zip(retried, [0.5, 1, 2, 4, 8, 16, 30, 30, 30], strict=False):
        assert longest / 2 <= event.retry_in_s <= longest
    times = [at for at, _ in setting.target.sent]
    for event, began, ended in zip(retried, times, times[1:], strict=False):
        assert event.retry_in_s <= ended - began <= event.retry_in_s + 1.0, "looked at every second"
    assert setting.rows.next_try("b1") > setting.wall()


async def test_a_target_that_asks_to_wait_is_waited_for_within_limits(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.script.extend(
        [TryAgain(reason="429", retry_after_s=12.0), TryAgain(reason="503", retry_after_s=3600.0)]
    )
    async with setting.open(max_backoff_s=30.0):
        await setting.target.accepted.wait_value(1)
    [first, second, third] = [at for at, _ in setting.target.sent]
    assert 12.0 <= second - first <= 13.0
    assert 30.0 <= third - second <= 31.0


@pytest.mark.parametrize("jump_s", [-7200.0, -20.0, 7200.0])
async def test_a_jump_of_the_wall_clock_parks_no_batch_longer_than_the_longest_pause(
    autojump_clock: MockClock, jump_s: float
) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.script.append(TryAgain(reason="503", retry_after_s=25.0))
    async with setting.open(max_backoff_s=30.0):
        await trio.sleep(5)
        setting.jump_s = jump_s
        await setting.target.accepted.wait_value(1)
        assert trio.current_time() <= 5 + 31


async def test_a_send_that_never_answers_is_given_up(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.seconds = 1e9
    async with setting.open():
        await setting.target.sends.wait_value(1)
        setting.target.seconds = 0.0
        await setting.target.accepted.wait_value(1)
    [retried] = setting.observer.of(OutboxRetried)
    assert retried.reason == "no answer within 60 s"


class Vanishing(MemoryOutboxRows):
    """Somebody deletes a row between the look and the reading."""

    async def body(  # type: ignore[explicit-override]  # typing.override came with Python 3.12
        self, batch_id: str, /
    ) -> bytes | None:
        if batch_id == "b0001":
            await self.delete(batch_id)
        return await super().body(batch_id)


async def test_a_batch_that_vanished_meanwhile_is_no_trouble(autojump_clock: MockClock) -> None:
    setting = Setting(rows=Vanishing())
    await setting.lay(*ids(3))
    async with setting.open():
        await setting.target.accepted.wait_value(2)
    assert setting.target.ids() == ["b0000", "b0002"]


# ---------------------------------------------------------------------------------------------------------- rejections


async def test_a_rejected_batch_becomes_a_dead_letter_and_leaves(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay(*ids(3))
    words = "no station S001 \ud800 " + "é" * 3000
    setting.target.by_id["b0001"] = Rejected(status=422, answer=words)
    async with setting.open():
        await setting.target.accepted.wait_value(2)
        await wait_all_tasks_blocked()
    assert setting.rows.ids() == []
    [letter] = setting.dead_letters.letters
    assert letter.detail.startswith("422: no station S001 \\ud800 éé")
    assert 2040 < len(letter.detail.encode()) <= 2048
    assert letter == DeadLetter(
        reason="rejected-upload",
        detail=letter.detail,
        topic="air",
        partition=0,
        offset=12345,
        value=encode_report(report("b0001")),
        batch_id="b0001",
    )
    assert setting.observer.of(DeadLettersKept) == [DeadLettersKept(letters=(letter,))]
    assert setting.observer.of(OutboxRejected) == [
        OutboxRejected(batch_id="b0001", status=422, answer=words)
    ]


async def test_a_rejected_batch_stays_until_there_is_room_for_its_letter(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.otherwise = Rejected(status=400, answer="no")
    setting.dead_letters.disk = Disk(otherwise=DISK_FULL)
    async with setting.open():
        await trio.sleep(100)
        assert setting.rows.ids() == ["b1"]
        assert not setting.observer.of(OutboxRejected)
        assert "no space left" in setting.observer.of(OutboxRetried)[0].reason
        setting.dead_letters.disk.otherwise = None
        await trio.sleep(31)
        assert setting.rows.ids() == []
    assert len(setting.dead_letters.letters) == 1
    assert setting.observer.of(UploadsDiverted) == [], "the target takes others"


async def test_a_crash_between_letter_and_row_makes_neither_none_nor_two(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.target.otherwise = Rejected(status=400, answer="no")
    setting.rows.disk.otherwise = DISK_FULL
    async with setting.open():
        await trio.sleep(100)
    assert len(setting.dead_letters.letters) == 1
    assert setting.rows.ids() == ["b1"]
    setting.rows.disk.otherwise = None
    async with setting.open():
        await trio.sleep(1)
    assert len(setting.dead_letters.letters) == 1
    assert setting.rows.ids() == []


# ------------------------------------------------------------------------------------------------------ a failing disk


async def test_what_was_accepted_is_not_sent_again_while_the_disk_does_not_take_its_deletion(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay(*ids(20))
    setting.target.seconds = 0.1
    setting.rows.disk.otherwise = DISK_FULL
    async with setting.open(connections=4) as outbox:
        await trio.sleep(3600)
        assert setting.target.ids() == ["b0000"], "nothing else is sent meanwhile"
        assert outbox.holds("b0000")
        setting.rows.disk.otherwise = None
        await setting.target.accepted.wait_value(20)
        await wait_all_tasks_blocked()
    assert setting.rows.ids() == []
    assert sorted(setting.target.ids()) == ids(20), "each of them once"
    [blocked] = setting.observer.of(StoreBlocked)
    assert blocked == StoreBlocked(store="outbox-replay", kind="disk-full", detail="no space left")
    [unblocked] = setting.observer.of(StoreUnblocked)
    assert unblocked.store == "outbox-replay"
    assert 3599 < unblocked.blocked_s < 3602


class SlowToLook(MemoryOutboxRows):
    seconds = 0.0

    async def due(  # type: ignore[explicit-override]  # typing.override came with Python 3.12
        self, now: float, /, *, latest: float, limit: int
    ) -> list[KeptBatch]:
        await trio.sleep(self.seconds)
        return await super().due(now, latest=latest, limit=limit)


async def test_a_deletion_that_fails_during_a_look_at_the_rows_counts_before_anything_is_sent(
    autojump_clock: MockClock,
) -> None:
    rows = SlowToLook()
    setting = Setting(rows=rows)
    await setting.lay(*ids(2))
    setting.target.seconds = 1.0
    async with setting.open(connections=2) as outbox:
        await trio.sleep(1.8)
        assert setting.target.ids() == ids(2), "the first is delivered, the second under way"
        rows.seconds = 0.5
        await outbox.put(report("b0002"), reason="500")
        rows.disk.otherwise = DISK_FULL
        await trio.sleep(100)
        assert setting.target.ids() == ids(2)
        rows.disk.otherwise = None
        await setting.target.accepted.wait_value(3)


async def test_a_disk_that_fails_does_not_make_a_busy_loop(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay(*ids(20))
    setting.target.otherwise = DOWN
    setting.rows.disk.otherwise = DISK_FULL
    async with setting.open():
        await trio.sleep(1000)
    assert len(setting.target.sent) == 1


async def test_a_batch_that_cannot_be_read_holds_up_no_other(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay(*ids(5))
    setting.rows.unreadable["b0001"] = StoreError("malformed", kind="disk-error")
    async with setting.open():
        await setting.target.accepted.wait_value(4)
        await trio.sleep(60)
    assert setting.rows.ids() == ["b0001"]
    assert "malformed" in setting.observer.of(OutboxRetried)[0].reason
    assert len(setting.observer.of(OutboxRetried)) < 10


async def test_a_disk_that_cannot_be_looked_at_is_said_once_and_looked_at_again(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    setting.rows.disk.looks = DISK_FULL
    async with setting.open():
        await trio.sleep(100)
        assert setting.target.sent == []
        setting.rows.disk.looks = None
        await setting.target.accepted.wait_value(1)
    assert len(setting.observer.of(StoreBlocked)) == 1
    assert len(setting.observer.of(StoreUnblocked)) == 1


@attrs.define(eq=False, kw_only=True)
class WatchedRows(MemoryOutboxRows):
    """Notes when it is looked at."""

    looks: list[float] = attrs.field(factory=list, init=False)
    searches: list[float] = attrs.field(factory=list, init=False)

    async def refresh(self) -> bool:  # type: ignore[explicit-override]
        self.looks.append(trio.current_time())
        return await super().refresh()

    async def due(  # type: ignore[explicit-override]
        self, now: float, /, *, latest: float, limit: int
    ) -> list[KeptBatch]:
        self.searches.append(trio.current_time())
        return await super().due(now, latest=latest, limit=limit)


async def test_what_others_did_is_looked_at_once_a_second_however_much_is_delivered(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(rows=WatchedRows())
    await setting.lay(*ids(100))
    setting.target.seconds = 0.05
    async with setting.open(connections=1):
        await setting.target.accepted.wait_value(100)
    assert isinstance(setting.rows, WatchedRows)
    assert setting.rows.looks == pytest.approx([0, 1, 2, 3, 4], abs=0.2)


async def test_an_empty_outbox_is_not_searched(autojump_clock: MockClock) -> None:
    setting = Setting(rows=WatchedRows())
    async with setting.open():
        await trio.sleep(60)
    assert isinstance(setting.rows, WatchedRows)
    assert setting.rows.searches == []
    assert len(setting.rows.looks) == pytest.approx(60, abs=1)
