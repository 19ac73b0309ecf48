"""The replay while the target is down, and when it comes back."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.errors import StoreError
from stationmaster.events import UploadsDiverted, UploadsResumed
from tests.state.settings import Setting, ids
from tests.state.targets import DOWN
from tests.uploads import report

if TYPE_CHECKING:
    from trio.testing import MockClock

    from stationmaster.state import Replay

HOUR_S = 3600.0


def goes_down(setting: Setting, outbox: Replay) -> None:
    """Let the target refuse everything; five direct uploads have just met that."""
    setting.target.otherwise = DOWN
    for _ in range(5):
        outbox.note(DOWN)
    assert outbox.is_diverting


def is_diverting(outbox: Replay) -> bool:
    return outbox.is_diverting


async def test_an_hour_of_outage_costs_few_probes_and_drains_gently(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    async with setting.open(connections=4) as outbox:
        goes_down(setting, outbox)
        for batch_id in ids(720):  # a batch every 5 s
            assert outbox.is_diverting
            await outbox.put(report(batch_id), reason="down")
            await trio.sleep(5)
        probes = setting.target.sent.copy()
        assert 110 < len(probes) < 260, "one every 15 to 30 s, after a few quick ones"
        assert setting.target.most_in_flight == 1
        assert len(setting.rows) == 720
        setting.target.otherwise = Accepted()
        setting.target.seconds = 0.1
        came_back = trio.current_time()
        await setting.target.accepted.wait_value(1)
        assert trio.current_time() - came_back < 31
        await setting.target.accepted.wait_value(720)
        await wait_all_tasks_blocked()
    assert len(setting.rows) == 0
    begun = [at for at, _ in setting.target.sent[len(probes) :]]
    begun = begun[-720:]  # but for a probe that met the last of the outage
    assert [begun.count(at) for at in sorted(set(begun))][:3] == [1, 1, 2], "it widens step by step"
    assert setting.target.most_in_flight == 4
    assert len(setting.observer.of(UploadsDiverted)) == 1
    [resumed] = setting.observer.of(UploadsResumed)
    assert HOUR_S <= resumed.diverted_s <= HOUR_S + 31


async def test_rows_that_fail_open_the_breaker_as_direct_uploads_do(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay(*ids(20))
    setting.target.otherwise = Unavailable(reason="401: who are you")
    async with setting.open() as outbox:
        await trio.sleep(60)
        assert outbox.is_diverting
        assert setting.observer.of(UploadsDiverted) == [
            UploadsDiverted(reason="401: who are you", refused=True)
        ]
        assert len(setting.rows) == 20
        assert setting.target.most_in_flight == 1


async def test_one_probe_goes_at_a_time_and_only_after_the_pause(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    setting.target.seconds = 3.0
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        for batch_id in ids(10):
            await outbox.put(report(batch_id), reason="down")
        assert setting.target.sent == []
        await trio.sleep(40)
    begun = [at for at, _ in setting.target.sent]
    assert 0.25 <= begun[0] <= 0.5
    pauses = [later - (earlier + 3.0) for earlier, later in pairwise(begun)]
    for pause, longest in zip(pauses, [1.0, 2.0, 4.0, 8.0], strict=False):
        assert longest / 2 <= pause <= longest
    assert setting.target.most_in_flight == 1


async def test_a_batch_that_the_target_cannot_bear_does_not_keep_it_down(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("poison", "b1")
    setting.target.by_id["poison"] = DOWN
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        setting.target.otherwise = Accepted()
        await setting.target.accepted.wait_value(1)
        assert trio.current_time() < 2.0
        assert not outbox.is_diverting
    assert setting.target.ids()[:2] == ["poison", "b1"]


async def test_a_probe_that_is_rejected_ends_the_outage(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay("b1")
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        setting.target.otherwise = Rejected(status=422, answer="no")
        await outbox.wait_change()
        assert not outbox.is_diverting
    assert len(setting.observer.of(UploadsResumed)) == 1


async def test_with_nothing_to_probe_with_direct_uploads_find_out(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        await outbox.wait_change()
        assert 0.25 <= trio.current_time() <= 0.5
        assert not is_diverting(outbox)
        outbox.note(DOWN)
        assert is_diverting(outbox), "one failure is enough"
        await outbox.wait_change()
        assert not is_diverting(outbox)
        outbox.note(Accepted())
        for _ in range(4):
            outbox.note(DOWN)
        assert not outbox.is_diverting
    assert len(setting.observer.of(UploadsDiverted)) == 1
    assert len(setting.observer.of(UploadsResumed)) == 1


async def test_with_a_disk_that_cannot_be_read_direct_uploads_find_out(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        setting.rows.disk.looks = StoreError("broken", kind="disk-error")
        await outbox.wait_change()
        assert not outbox.is_diverting


async def test_with_a_disk_that_cannot_be_written_direct_uploads_find_out(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    async with setting.open() as outbox:
        setting.rows.disk.otherwise = StoreError("no space left", kind="disk-full")
        await setting.target.accepted.wait_value(1)
        goes_down(setting, outbox)
        await outbox.wait_change()
        assert not outbox.is_diverting


async def test_an_operators_retry_is_a_probe_within_about_a_second(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay(*ids(3))
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        await trio.sleep(600)
        setting.target.otherwise = Accepted()
        setting.rows.retry_all()
        asked = trio.current_time()
        await setting.target.accepted.wait_value(3)
        assert trio.current_time() - asked <= 1.0


async def test_an_operators_retry_brings_one_probe_and_the_pauses_hold_again(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay(*ids(3))
    async with setting.open(max_backoff_s=30.0) as outbox:
        goes_down(setting, outbox)
        await trio.sleep(600)
        setting.rows.retry_all()
        await trio.sleep(1.5)
        begun = len(setting.target.sent)
        await trio.sleep(60)
        assert 2 <= len(setting.target.sent) - begun <= 4  # one each 15 to 30 s


async def test_a_probe_that_failed_is_not_the_next_one_if_there_is_another(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay(*ids(2))
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        for _ in range(4):
            setting.rows.retry_all()  # due at once, both of them: the first would be first again
            await trio.sleep(1.5)
        assert len(setting.target.sent) >= 4
        assert all(one != another for one, another in pairwise(setting.target.ids()))


async def test_an_operators_retry_during_a_probe_that_fails_is_a_probe_right_after_it(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay(*ids(3))
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        await trio.sleep(600)
        setting.target.seconds = 10.0
        setting.target.sends.value = 0
        await setting.target.sends.wait_transition()
        setting.rows.retry_all()
        await trio.sleep(10.5)
        assert setting.target.sends.value == len(setting.target.sent)
        assert trio.current_time() - setting.target.sent[-1][0] < 1.0


async def test_a_direct_upload_that_is_accepted_late_starts_the_drain_at_once(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay(*ids(3))
    async with setting.open() as outbox:
        goes_down(setting, outbox)
        outbox.note(Accepted())
        setting.target.otherwise = Accepted()
        await setting.target.accepted.wait_value(3)
        assert trio.current_time() == 0.0


async def test_what_retry_after_asks_of_direct_uploads_delays_the_probe(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    await setting.lay("b1")
    async with setting.open(failures=1) as outbox:
        outbox.note(TryAgain(reason="503", retry_after_s=20.0))
        await setting.target.accepted.wait_value(1)
        assert trio.current_time() == pytest.approx(20.0)


async def test_a_probe_goes_at_its_instant(autojump_clock: MockClock) -> None:
    setting = Setting()
    await setting.lay("b1")
    await trio.sleep(64)
    async with setting.open(failures=1) as outbox:
        outbox.note(TryAgain(reason="503", retry_after_s=20.25))  # between two looks at the rows
        await setting.target.accepted.wait_value(1)
        assert trio.current_time() == 84.25


async def test_waiting_for_a_change_ends_by_itself(autojump_clock: MockClock) -> None:
    async with Setting().open() as outbox:
        await outbox.wait_change()
        assert trio.current_time() == pytest.approx(2.0)
