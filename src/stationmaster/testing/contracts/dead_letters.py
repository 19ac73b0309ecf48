"""What every place for dead letters must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from trio.testing import assert_checkpoints

from stationmaster.batch import DeadLetter
from stationmaster.errors import StoreError
from stationmaster.testing.contracts.running import Contract, in_trio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from stationmaster.abc import DeadLetters


def _letter(offset: int = 5, **changes: Any) -> DeadLetter:  # noqa: ANN401 - fields of all types
    plain: dict[str, Any] = {
        "reason": "not-json",
        "detail": "unexpected end",
        "topic": "air",
        "partition": 2,
        "offset": offset,
        "timestamp_ms": 1_700_000_000_000,
        "value": b"\x00{",
    }
    return DeadLetter(**(plain | changes))


class DeadLettersContract(Contract):
    """What every `stationmaster.abc.DeadLetters` must do."""

    max_bytes: int = 3000
    """The bound of the place that `open` gives, if it has one: bytes of all values together, or a little more."""

    def open(self) -> AbstractAsyncContextManager[DeadLetters]:
        """Open a place without a letter."""
        raise NotImplementedError

    async def kept(self) -> Sequence[DeadLetter]:
        """Return what is kept, oldest first."""
        raise NotImplementedError

    @in_trio
    async def test_letters_are_kept_whole_and_in_order(self) -> None:
        letters = [
            _letter(5, headers=(("trace", b"\xff\x00"), ("trace", None))),
            _letter(4, value=None),
            _letter(3, value=b""),
            _letter(3, batch_id="air_2_3_1700000000", reason="rejected-upload"),
        ]
        async with self.open() as place:
            await place.keep(letters)
            assert list(await self.kept()) == letters

    @in_trio
    async def test_a_letter_that_comes_again_is_kept_once(self) -> None:
        async with self.open() as place:
            await place.keep([_letter(1), _letter(2)])
            await place.keep([_letter(2, detail="second thoughts"), _letter(3), _letter(3)])
            assert list(await self.kept()) == [_letter(1), _letter(2), _letter(3)]

    @in_trio
    async def test_an_offset_with_another_time_is_another_letter(self) -> None:
        again = _letter(1, timestamp_ms=1_800_000_000_000)  # the topic was made anew
        async with self.open() as place:
            await place.keep([_letter(1), again])
            assert list(await self.kept()) == [_letter(1), again]

    @in_trio
    async def test_letters_larger_than_the_bound_are_taken_when_nothing_else_is_there(self) -> None:
        async with self.open() as place:
            await place.keep(
                [_letter(1, value=b"x" * self.max_bytes), _letter(2, value=b"y" * self.max_bytes)]
            )
            assert len(await self.kept()) == 2

    @in_trio
    async def test_no_letters_are_fine_and_keeping_is_a_checkpoint(self) -> None:
        async with self.open() as place:
            with assert_checkpoints():
                await place.keep([])
            with assert_checkpoints():
                await place.keep([_letter()])
            assert list(await self.kept()) == [_letter()]


class BoundedDeadLettersContract(DeadLettersContract):
    """What it must do besides if it has a bound of its own."""

    def clear(self) -> None:
        """Do what an operator does who has looked at them: let all of them go."""
        raise NotImplementedError

    @in_trio
    async def test_letters_that_do_not_fit_are_refused_all_together(self) -> None:
        large = _letter(1, value=b"x" * (self.max_bytes - 200))
        async with self.open() as place:
            await place.keep([large])
            with pytest.raises(StoreError, match="full") as caught:
                await place.keep([_letter(2), _letter(3, value=b"x" * 200)])
            assert caught.value.kind == "full"
            assert len(await self.kept()) == 1
            await place.keep([large, _letter(2)])
            assert len(await self.kept()) == 2

    @in_trio
    async def test_there_is_room_as_soon_as_an_operator_made_some(self) -> None:
        async with self.open() as place:
            await place.keep([_letter(1, value=b"x" * self.max_bytes)])
            with pytest.raises(StoreError):
                await place.keep([_letter(2)])
            self.clear()
            await place.keep([_letter(2)])
            assert list(await self.kept()) == [_letter(2)]
