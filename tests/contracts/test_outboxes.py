"""The rows of an outbox keep the contract, in memory and on a real SQLite file; and so does the outbox above them."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain
from stationmaster.errors import StoreError
from stationmaster.events import OutboxDelivered
from stationmaster.reports import encode_report
from stationmaster.state import open_outbox, open_state
from stationmaster.testing import MemoryDeadLetters, MemoryOutboxRows, RecordingObserver
from stationmaster.testing.contracts import OutboxRowsContract
from tests.state.targets import DOWN, Target
from tests.uploads import report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.state import OutboxRows, Replay

MAX_BYTES = OutboxRowsContract.max_bytes


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


class TestMemoryOutboxRows(OutboxRowsContract):
    def open(self) -> AbstractAsyncContextManager[OutboxRows]:
        return in_memory(Path())


class TestOutboxRowsOnDisk(OutboxRowsContract):
    patience_s = 20.0

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def open(self) -> AbstractAsyncContextManager[OutboxRows]:
        return on_disk(self.folder)


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
    await setting.rows.put(
        "large", topic="air", ranges=(), body=b"x" * MAX_BYTES, kept_at=50.0, reason="down"
    )
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
