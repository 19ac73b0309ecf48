"""What every embedder must do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import assert_checkpoints

from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.testing.contracts.running import Contract, in_trio
from stationmaster.testing.sink import Hang

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from stationmaster.abc import Embedder


class EmbedderContract(Contract):
    """What every `stationmaster.abc.Embedder` must do whose model server answers."""

    tolerance: float = 1e-3
    """How far a number of a vector may lie from that of another call with the same text."""

    def open(self) -> AbstractAsyncContextManager[Embedder]:
        """Open the embedder."""
        raise NotImplementedError

    async def check(self, embedder: Embedder, texts: Sequence[str]) -> None:
        """Ask for all of them, and compare with each one alone.

        Override it to compare with known vectors.
        """
        vectors = await embedder.embed(texts)
        assert len(vectors) == len(texts)
        for vector, text in zip(vectors, texts, strict=True):
            [alone] = await embedder.embed([text])
            assert list(vector) == pytest.approx(list(alone), abs=self.tolerance)

    @in_trio
    async def test_each_text_gets_its_vector_in_order(self) -> None:
        async with self.open() as embedder:
            await self.check(embedder, ["Dongsi PM2.5 9", "größer 7 µg", "x"])
            await self.check(embedder, ("x", "Dongsi PM2.5 9"))
            await self.check(embedder, ["x"])

    @in_trio
    async def test_the_same_text_twice_gets_the_same_vector_twice(self) -> None:
        async with self.open() as embedder:
            first, second = await embedder.embed(["a", "a"])
            assert list(first) == pytest.approx(list(second), abs=self.tolerance)

    @in_trio
    async def test_different_texts_get_different_vectors(self) -> None:
        async with self.open() as embedder:
            first, second = await embedder.embed(["Dongsi PM2.5 9", "x"])
            assert list(first) != pytest.approx(list(second), abs=self.tolerance)

    @in_trio
    async def test_all_vectors_have_one_dimension(self) -> None:
        async with self.open() as embedder:
            vectors = await embedder.embed([f"text {number}" for number in range(50)])
            [dimensions] = {len(vector) for vector in vectors}
            assert dimensions > 0

    @in_trio
    async def test_several_tasks_ask_at_once_and_each_gets_its_own(self) -> None:
        async with self.open() as embedder, trio.open_nursery() as nursery:
            for number in range(20):
                texts = [f"{number} and {row}" for row in range(number % 4 + 1)]
                nursery.start_soon(self.check, embedder, texts)

    @in_trio
    async def test_a_cancelled_call_harms_no_later_one(self) -> None:
        async with self.open() as embedder:
            with trio.CancelScope() as scope:
                scope.cancel()
                await embedder.embed(["a"])
            assert scope.cancelled_caught
            await self.check(embedder, ["a", "b"])

    @in_trio
    async def test_a_call_checkpoints(self) -> None:
        async with self.open() as embedder:
            with assert_checkpoints():
                await embedder.embed(["a"])


class RemoteEmbedderContract(EmbedderContract):
    """What it must do besides if the tests can tell its model server to fail, or not to answer."""

    def will(self, *steps: EmbedderError | Hang) -> None:
        """Let the next calls meet these: the server's words for such an error, or no answer."""
        raise NotImplementedError

    async def reached(self, calls: int) -> None:
        """Wait until so many calls of this test reached the server."""
        raise NotImplementedError

    async def rested(self) -> None:
        """Wait until the embedder may be asked again after a failure: at once, unless it has a breaker."""
        await trio.lowlevel.checkpoint()

    @pytest.mark.parametrize(
        "error",
        [
            RowRejectedError("text too long"),
            EmbedderBusyError("come back", retry_after_s=0.05),
            EmbedderRefusedError("no such key"),
            EmbedderUnavailableError("out of memory"),
            ProtocolError("<html>"),
        ],
        ids=lambda error: type(error).__name__,
    )
    @in_trio
    async def test_a_failed_call_is_a_typed_error_with_the_servers_words(
        self, error: EmbedderError
    ) -> None:
        async with self.open() as embedder:
            self.will(error)
            with pytest.raises(type(error), match=str(error)) as caught:
                await embedder.embed(["a", "b"])
            if isinstance(caught.value, EmbedderBusyError):
                assert caught.value.retry_after_s is not None
                assert 0 <= caught.value.retry_after_s <= 0.05
            await self.rested()
            await self.check(embedder, ["a", "b"])

    @in_trio
    async def test_a_call_that_hangs_holds_up_no_other_and_can_be_cancelled(self) -> None:
        async with self.open() as embedder:
            self.will(Hang())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(embedder.embed, ["stuck"])
                await self.reached(1)
                for number in range(3):
                    await self.check(embedder, [f"text {number}"])
                nursery.cancel_scope.cancel()
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(self.check, embedder, [f"text {number}"])

    @in_trio
    async def test_a_callers_deadline_is_honoured(self) -> None:
        scope = trio.CancelScope()

        async def ask(embedder: Embedder) -> None:
            with scope:
                await embedder.embed(["a"])

        async with self.open() as embedder:
            self.will(Hang())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, embedder)
                await self.reached(1)
                scope.deadline = trio.current_time() + 0.05
            assert scope.cancelled_caught
            await self.check(embedder, ["a"])
