"""Embedders and callers at their worst, beyond what `test_batcher_promises` tries."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.errors import BatcherClosedError, EmbedderBusyError, EmbedderError, ProtocolError
from stationmaster.testing import ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import bench, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Lazy:
    """A sequence whose rows are not there when they are read: a table that is indexed by column, say."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return self
        raise KeyError(place)


class Unmeasured:
    """A sequence that cannot say how long it is."""

    def __len__(self) -> int:
        raise RuntimeError("not evaluated yet")


def lazy(texts: list[str]) -> Any:
    return Lazy(len(texts))


def unmeasured(texts: list[str]) -> Any:
    del texts
    return Unmeasured()


def takes_texts_away(texts: list[str]) -> Any:
    texts.pop()
    return [[1.0]] * len(texts)


class KeywordsOnlyError(EmbedderError):
    """Its instances cannot be made from `args`."""

    def __new__(cls, *, code: int) -> Self:
        return super().__new__(cls, code)

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


@attrs.frozen(slots=False)
class FrozenError(EmbedderError):
    """Its instances take no attribute after `__init__`."""

    code: int


def raises(error: BaseException) -> Callable[[list[str]], Any]:
    def fail(texts: list[str]) -> Any:
        del texts
        raise error

    return fail


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        pytest.param(lazy, ProtocolError, id="rows that cannot be read"),
        pytest.param(unmeasured, ProtocolError, id="a length that cannot be read"),
        pytest.param(takes_texts_away, ProtocolError, id="texts that are taken away"),
        pytest.param(raises(KeywordsOnlyError(code=7)), EmbedderError, id="an error of keywords"),
        pytest.param(raises(FrozenError(7)), EmbedderError, id="a frozen error"),
        pytest.param(raises(MemoryError()), EmbedderError, id="no memory"),
        pytest.param(raises(RecursionError()), EmbedderError, id="no stack"),
        pytest.param(raises(StopAsyncIteration()), EmbedderError, id="the end of an iteration"),
    ],
)
@pytest.mark.parametrize("how", ["embed", "embed_many"])
def test_an_odd_answer_or_error_is_that_of_its_call_and_the_next_one_works(
    does: Callable[[list[str]], Any], kind: type[EmbedderError], how: str
) -> None:
    got: list[object] = []

    async def main() -> None:
        ill = True

        async def step(texts: Sequence[str]) -> Any:
            await trio.sleep(0.01)
            if ill:
                return does(texts)  # type: ignore[arg-type]
            return [[1.0]] * len(texts)

        class Odd:
            async def embed(self, texts: Sequence[str], /) -> Any:
                return await step(texts)

        async def ask(batcher: Batcher, text: str) -> None:
            try:
                if how == "embed":
                    await batcher.embed(text)
                else:
                    await batcher.embed_many([text, text])
            except EmbedderError as error:
                got.append(error)

        with trio.fail_after(100):
            async with open_batcher(Odd()) as batcher:
                async with trio.open_nursery() as nursery:
                    for text in texts(3):
                        nursery.start_soon(ask, batcher, text)
                ill = False
                assert await batcher.embed("after") == [1.0]

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(got) == 3
    assert all(isinstance(error, kind) for error in got)


@pytest.mark.parametrize("how", ["embed", "embed_many"])
def test_the_greatest_deadline_there_is_is_no_deadline(how: str) -> None:
    async def main() -> None:
        embedder = ScriptedEmbedder(seconds_per_call=0.01)
        async with open_batcher(embedder) as batcher:
            for _ in range(2):
                if how == "embed":
                    got = await batcher.embed("a", deadline=sys.float_info.max)
                else:
                    (got,) = await batcher.embed_many(["a"], deadline=sys.float_info.max)
                assert got == embedder.vector("a")
        assert batcher.statistics().expired_rows == 0

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("wait_s", [0.0, -1.0, float("nan")])
async def test_a_busy_server_that_asks_for_no_wait_at_all_is_asked_ever_more_seldom(
    autojump_clock: MockClock, wait_s: float
) -> None:
    calls = 0

    class Busy:
        async def embed(self, texts: Sequence[str], /) -> Any:
            nonlocal calls
            calls += 1
            await trio.sleep(0.01)
            raise EmbedderBusyError("429", retry_after_s=wait_s)

    policy = BatchPolicy(patience_s=20.0)
    with trio.fail_after(100):
        async with open_batcher(Busy(), policy=policy) as batcher:
            with pytest.raises(EmbedderBusyError):
                await batcher.embed("a")
    assert 4 <= calls <= 12


async def test_closing_with_a_full_queue_and_a_server_that_hangs_answers_everybody(
    autojump_clock: MockClock,
) -> None:
    policy = BatchPolicy(max_batch_rows=2, max_in_flight=2, max_queue_rows=8, grace_s=1.0)
    got: list[BatcherClosedError] = []

    async def ask(batcher: Batcher, text: str) -> None:
        with pytest.raises(BatcherClosedError) as caught:
            await batcher.embed(text)
        got.append(caught.value)

    async with trio.open_nursery() as outside:
        async with open_batcher(ScriptedEmbedder(script=[hang] * 9), policy=policy) as batcher:
            for text in texts(11):  # one alone, two in a full call, eight behind
                outside.start_soon(ask, batcher, text)
                await wait_all_tasks_blocked()
            assert batcher.statistics().queued_rows == 8
        assert trio.current_time() == 1.0
    assert len(got) == 11
    assert batcher.statistics().rows_in_flight == batcher.statistics().queued_rows == 0


async def test_a_hundred_callers_that_leave_in_the_tick_of_their_answer_get_one_of_both(
    autojump_clock: MockClock,
) -> None:
    ends: list[str] = []

    async def ask(scope: trio.CancelScope, batcher: Batcher, text: str) -> None:
        with scope:
            await batcher.embed(text)
            ends.append("answered")
        if scope.cancelled_caught:
            ends.append("left")

    scopes = [trio.CancelScope() for _ in range(100)]

    async def step(texts: Sequence[str]) -> Any:
        await trio.sleep(1.0)
        for scope in scopes[::2]:
            scope.cancel()
        return [[1.0]] * len(texts)

    async with bench(ScriptedEmbedder(script=[step]), max_batch_rows=100) as b:
        b.batcher.expect(100)
        for number, scope in enumerate(scopes):
            b.nursery.start_soon(partial(ask, scope, b.batcher, f"{number}"))
        await trio.sleep(2.0)
        assert b.batcher.statistics().rows_in_flight == 0
        await b.submit("after")
    assert len(ends) == 100
    assert ends.count("answered") >= 50
    assert b.right("after")
