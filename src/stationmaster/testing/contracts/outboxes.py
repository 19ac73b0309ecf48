"""What the rows of an outbox must do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from trio.testing import assert_checkpoints

from stationmaster.batch import KeptBatch, OffsetRange
from stationmaster.errors import StoreError
from stationmaster.testing.contracts.running import Contract, in_trio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from stationmaster.state import OutboxRows

_RANGES = (
    OffsetRange(topic="air", partition=3, first=7, last=9),
    OffsetRange(topic="air", partition=4, first=1, last=1),
)


async def _put(
    rows: OutboxRows, batch_id: str, *, size: int = 100, ranges: Sequence[OffsetRange] = _RANGES
) -> None:
    await rows.put(
        batch_id, topic="air", ranges=ranges, body=b"x" * size, kept_at=50.0, reason="down"
    )


async def _due(rows: OutboxRows, now: float = 1000.0, *, limit: int = 100) -> list[str]:
    return [row.batch_id for row in await rows.due(now, latest=now + 30, limit=limit)]


class OutboxRowsContract(Contract):
    """What the `stationmaster.state.OutboxRows` must do on which `stationmaster.state.open_outbox` works."""

    max_bytes: int = 3000
    """The bound of the rows that `open` gives: bytes of all bodies together."""

    def open(self) -> AbstractAsyncContextManager[OutboxRows]:
        """Open rows without a batch, which hold at most `max_bytes`."""
        raise NotImplementedError

    @in_trio
    async def test_a_row_that_was_put_is_held_and_due_at_once(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1")
            assert rows.holds("b1")
            assert not rows.holds("b2")
            assert len(rows) == 1
            kept = KeptBatch(
                batch_id="b1", topic="air", partition=3, offset=7, kept_at=50.0, attempts=0
            )
            assert list(await rows.due(0.0, latest=30.0, limit=9)) == [kept]
            assert await rows.body("b1") == b"x" * 100

    @in_trio
    async def test_a_row_without_ranges_is_kept_as_well(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1", ranges=())
            [row] = await rows.due(0.0, latest=30.0, limit=9)
            assert (row.partition, row.offset) == (-1, -1)

    @in_trio
    async def test_rows_are_due_oldest_first_as_many_as_asked_for(self) -> None:
        async with self.open() as rows:
            for batch_id in ("b3", "b1", "b2"):
                await _put(rows, batch_id)
            assert await _due(rows) == ["b3", "b1", "b2"]
            assert await _due(rows, limit=2) == ["b3", "b1"]

    @in_trio
    async def test_the_first_of_two_rows_with_one_id_stays(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1", size=10)
            await _put(rows, "b1", size=20)
            assert len(rows) == 1
            assert await rows.body("b1") == b"x" * 10

    @in_trio
    async def test_a_postponed_row_is_due_at_its_time_and_not_before(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1")
            await _put(rows, "b2")
            await rows.postpone("b1", until=1010.0, reason="500")
            assert await _due(rows, 1009.0) == ["b2"]
            assert await _due(rows, 1010.0) == ["b2", "b1"]
            [_, last] = await rows.due(1010.0, latest=1040.0, limit=9)
            assert last.attempts == 1

    @in_trio
    async def test_rows_that_failed_hold_up_no_row_that_waits_longer(self) -> None:
        async with self.open() as rows:
            for batch_id in ("b1", "b2", "b3"):
                await _put(rows, batch_id)
            await rows.postpone("b1", until=20.0, reason="500")
            await rows.postpone("b2", until=10.0, reason="500")
            assert await _due(rows) == ["b3", "b2", "b1"]
            assert await _due(rows, limit=1) == ["b3"]

    @in_trio
    async def test_a_row_that_lies_beyond_any_backoff_is_due(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1")
            await rows.postpone("b1", until=5000.0, reason="500, before the clock was put back")
            assert await _due(rows, 1000.0) == ["b1"]

    @in_trio
    async def test_a_deleted_row_is_gone_and_gone_twice_is_fine(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1")
            await rows.delete("b1")
            await rows.delete("b1")
            await rows.postpone("b1", until=0.0, reason="")
            assert not rows.holds("b1")
            assert len(rows) == 0
            assert await rows.body("b1") is None
            assert await _due(rows) == []

    @in_trio
    async def test_a_row_is_taken_while_it_fits_and_room_comes_back(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1", size=self.max_bytes - 100)
            with pytest.raises(StoreError, match="full") as caught:
                await _put(rows, "b2", size=101)
            assert caught.value.kind == "full"
            assert not rows.holds("b2")
            await _put(rows, "b3", size=100)
            await rows.delete("b1")
            await _put(rows, "b2", size=101)
            assert await _due(rows) == ["b3", "b2"]

    @in_trio
    async def test_a_row_larger_than_the_bound_is_taken_when_nothing_else_is_there(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1", size=10 * self.max_bytes)
            assert rows.holds("b1")
            with pytest.raises(StoreError):
                await _put(rows, "b2", size=1)

    @in_trio
    async def test_nobody_else_wrote(self) -> None:
        async with self.open() as rows:
            await _put(rows, "b1")
            assert not await rows.refresh()

    @in_trio
    async def test_what_waits_is_a_checkpoint(self) -> None:
        async with self.open() as rows:
            with assert_checkpoints():
                await _put(rows, "b1")
            with assert_checkpoints():
                await _due(rows)
            with assert_checkpoints():
                await rows.body("b1")
            with assert_checkpoints():
                await rows.postpone("b1", until=0.0, reason="500")
            with assert_checkpoints():
                await rows.delete("b1")
