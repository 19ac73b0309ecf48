"""What every outbox must do, and the rows below it: in memory, and on a real SQLite file."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain
from stationmaster.batch import KeptBatch, OffsetRange
from stationmaster.errors import StoreError
from stationmaster.events import OutboxDelivered
from stationmaster.reports import encode_report
from stationmaster.state import open_outbox, open_state
from stationmaster.testing import MemoryDeadLetters, MemoryOutboxRows, RecordingObserver
from tests.state.targets import DOWN, Target
from tests.uploads import report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from stationmaster.state import OutboxRows, Replay

MAX_BYTES = 3000


@asynccontextmanager
async def in_memory(folder: Path) -> AsyncIterator[OutboxRows]:
    yield MemoryOutboxRows(max_bytes=MAX_BYTES)


@asynccontextmanager
async def on_disk(folder: Path) -> AsyncIterator[OutboxRows]:
    async with open_state(folder / "state.sqlite", outbox_max_bytes=MAX_BYTES) as state:
        yield state.outbox


@pytest.fixture(params=[in_memory, on_disk])
async def rows(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OutboxRows]:
    with trio.fail_after(20):
        async with request.param(tmp_path) as opened:
            yield opened


async def put(rows: OutboxRows, batch_id: str, *, size: int = 100, **changes: Any) -> None:
    ranges = (
        OffsetRange(topic="air", partition=3, first=7, last=9),
        OffsetRange(topic="air", partition=4, first=1, last=1),
    )
    row: dict[str, Any] = {
        "topic": "air",
        "ranges": ranges,
        "kept_at": 50.0,
        "reason": "down",
    } | changes
    await rows.put(batch_id, body=b"x" * size, **row)


async def due(rows: OutboxRows, now: float = 1000.0, *, limit: int = 100) -> list[str]:
    return [row.batch_id for row in await rows.due(now, latest=now + 30, limit=limit)]


# --------------------------------------------------------------------------------------------------------------- rows


async def test_a_row_that_was_put_is_held_and_due_at_once(rows: OutboxRows) -> None:
    await put(rows, "b1")
    assert rows.holds("b1")
    assert not rows.holds("b2")
    assert len(rows) == 1
    assert await rows.due(0.0, latest=30.0, limit=9) == [
        KeptBatch(batch_id="b1", topic="air", partition=3, offset=7, kept_at=50.0, attempts=0)
    ]
    assert await rows.body("b1") == b"x" * 100


async def test_a_row_without_ranges_is_kept_as_well(rows: OutboxRows) -> None:
    await put(rows, "b1", ranges=())
    [row] = await rows.due(0.0, latest=30.0, limit=9)
    assert (row.partition, row.offset) == (-1, -1)


async def test_rows_are_due_oldest_first_as_many_as_asked_for(rows: OutboxRows) -> None:
    for batch_id in ("b3", "b1", "b2"):
        await put(rows, batch_id)
    assert await due(rows) == ["b3", "b1", "b2"]
    assert await due(rows, limit=2) == ["b3", "b1"]


async def test_the_first_of_two_rows_with_one_id_stays(rows: OutboxRows) -> None:
    await put(rows, "b1", size=10)
    await put(rows, "b1", size=20)
    assert len(rows) == 1
    assert await rows.body("b1") == b"x" * 10


async def test_a_postponed_row_is_due_at_its_time_and_not_before(rows: OutboxRows) -> None:
    await put(rows, "b1")
    await put(rows, "b2")
    await rows.postpone("b1", until=1010.0, reason="500")
    assert await due(rows, 1009.0) == ["b2"]
    assert await due(rows, 1010.0) == ["b2", "b1"]
    [_, last] = await rows.due(1010.0, latest=1040.0, limit=9)
    assert last.attempts == 1


async def test_rows_that_failed_hold_up_no_row_that_waits_longer(rows: OutboxRows) -> None:
    for batch_id in ("b1", "b2", "b3"):
        await put(rows, batch_id)
    await rows.postpone("b1", until=20.0, reason="500")
    await rows.postpone("b2", until=10.0, reason="500")
    assert await due(rows) == ["b3", "b2", "b1"]
    assert await due(rows, limit=1) == ["b3"]


async def test_a_row_that_lies_beyond_any_backoff_is_due(rows: OutboxRows) -> None:
    await put(rows, "b1")
    await rows.postpone("b1", until=5000.0, reason="500, before the clock was put back")
    assert await due(rows, 1000.0) == ["b1"]


async def test_a_deleted_row_is_gone_and_gone_twice_is_fine(rows: OutboxRows) -> None:
    await put(rows, "b1")
    await rows.delete("b1")
    await rows.delete("b1")
    await rows.postpone("b1", until=0.0, reason="")
    assert not rows.holds("b1")
    assert len(rows) == 0
    assert await rows.body("b1") is None
    assert await due(rows) == []


async def test_a_row_is_taken_while_it_fits_and_room_comes_back(rows: OutboxRows) -> None:
    await put(rows, "b1", size=MAX_BYTES - 100)
    with pytest.raises(StoreError, match="full") as caught:
        await put(rows, "b2", size=101)
    assert caught.value.kind == "full"
    assert not rows.holds("b2")
    await put(rows, "b3", size=100)
    await rows.delete("b1")
    await put(rows, "b2", size=101)
    assert await due(rows) == ["b3", "b2"]


async def test_a_row_larger_than_the_bound_is_taken_when_nothing_else_is_there(
    rows: OutboxRows,
) -> None:
    await put(rows, "b1", size=10 * MAX_BYTES)
    assert rows.holds("b1")
    with pytest.raises(StoreError):
        await put(rows, "b2", size=1)


async def test_nobody_else_wrote(rows: OutboxRows) -> None:
    await put(rows, "b1")
    assert not await rows.refresh()


# ------------------------------------------------------------------------------------------------------------- outbox


@attrs.frozen
class Setting:
    outbox: Replay
    target: Target
    observer: RecordingObserver
    rows: OutboxRows


@asynccontextmanager
async def opened(rows: OutboxRows, **settings: Any) -> AsyncIterator[Setting]:
    target, observer = Target(), RecordingObserver()
    async with open_outbox(
        rows,
        send=target.send,
        dead_letters=MemoryDeadLetters(),
        observer=observer,
        **settings,
    ) as outbox:
        yield Setting(outbox, target, observer, rows)


@pytest.fixture
async def setting(rows: OutboxRows) -> AsyncIterator[Setting]:
    async with opened(rows) as setting:
        yield setting


async def test_a_batch_that_is_kept_is_delivered_and_leaves(setting: Setting) -> None:
    setting.target.seconds = 0.01
    await setting.outbox.put(report("b1"), reason="500")
    assert setting.outbox.holds("b1")
    await setting.outbox.wait_change()
    assert setting.target.taken == {"b1": encode_report(report("b1"))}
    assert not setting.outbox.holds("b1")
    [delivered] = setting.observer.of(OutboxDelivered)
    assert (delivered.batch_id, delivered.attempts, delivered.sent_bytes) == ("b1", 1, 3)
    assert delivered.rows_left == 0


async def test_a_batch_that_is_kept_twice_is_delivered_once(setting: Setting) -> None:
    setting.target.otherwise = DOWN
    await setting.outbox.put(report("b1"), reason="500")
    await setting.outbox.put(report("b1"), reason="500")
    assert len(setting.rows) == 1


def _is_diverting(setting: Setting) -> bool:
    return setting.outbox.is_diverting


async def test_failures_in_a_row_divert_and_an_accepted_upload_ends_it(setting: Setting) -> None:
    for _ in range(4):
        setting.outbox.note(DOWN)
    assert not _is_diverting(setting)
    setting.outbox.note(DOWN)
    assert _is_diverting(setting)
    setting.outbox.note(Accepted())
    assert not _is_diverting(setting)


@pytest.mark.parametrize("answer", [Accepted(), Rejected(status=422, answer="no")])
async def test_a_target_that_takes_some_is_not_down(
    setting: Setting, answer: Accepted | Rejected
) -> None:
    for _ in range(4):
        setting.outbox.note(DOWN)
    setting.outbox.note(answer)
    for _ in range(4):
        setting.outbox.note(TryAgain(reason="busy"))
    assert not setting.outbox.is_diverting


async def test_a_put_that_was_refused_is_told_when_room_came(setting: Setting) -> None:
    setting.target.seconds = 0.05
    await put(setting.rows, "large", size=MAX_BYTES)
    with pytest.raises(StoreError):
        await setting.outbox.put(report("b1"), reason="500")
    while True:
        with trio.fail_after(5):
            await setting.outbox.wait_change()
        try:
            await setting.outbox.put(report("b1"), reason="500")
        except StoreError:
            continue
        break
    await setting.target.accepted.wait_value(2)


async def test_the_end_of_diverting_is_told(rows: OutboxRows) -> None:
    async with opened(rows, failures=1) as setting, trio.open_nursery() as nursery:
        setting.outbox.note(TryAgain(reason="busy", retry_after_s=20.0))
        told = trio.Event()

        async def wait() -> None:
            await setting.outbox.wait_change()
            told.set()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not told.is_set()
        setting.outbox.note(Accepted())
        await wait_all_tasks_blocked()
        assert told.is_set()  # by that, not by the end of the longest wait


async def test_waiting_and_putting_are_checkpoints(setting: Setting) -> None:
    with assert_checkpoints():
        await setting.outbox.put(report("b1"), reason="500")
    with assert_checkpoints():
        await setting.outbox.wait_change()


async def test_what_was_not_delivered_is_there_the_next_time(rows: OutboxRows) -> None:
    async with opened(rows) as setting:
        setting.target.seconds = 60.0
        await setting.outbox.put(report("b1"), reason="500")
        await setting.target.sends.wait_value(1)
    async with opened(rows) as setting:
        await setting.target.accepted.wait_value(1)


async def test_what_a_send_raises_ends_the_block_as_itself(rows: OutboxRows) -> None:
    async def broken(batch_id: str, body: bytes) -> Accepted:
        raise KeyError(batch_id)

    async def run() -> None:
        async with open_outbox(rows, send=broken, dead_letters=MemoryDeadLetters()) as outbox:
            await outbox.put(report("b1"), reason="500")
            await trio.sleep_forever()

    with pytest.raises(KeyError, match="b1"):
        await run()
