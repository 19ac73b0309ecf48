from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.errors import EmbedderUnavailableError, RowRejectedError
from stationmaster.testing.embedder import ScriptedEmbedder, hang


async def test_a_vector_follows_from_its_text_alone() -> None:
    one, other = ScriptedEmbedder(dimensions=8), ScriptedEmbedder(dimensions=8)

    first, second, third = await one.embed(["größe", "b", "größe"])

    assert first == third == other.vector("größe") != second
    assert len(first) == 8
    assert all(-1 <= number < 1 for number in first)
    assert one.vector("a")[0] == pytest.approx(-0.6236421437934041)


async def test_a_call_takes_the_time_that_is_told(autojump_clock: MockClock) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=0.5, seconds_per_text=0.25)

    await embedder.embed(["a", "b"])

    assert trio.current_time() == 1.0
    assert embedder.began == [0.0]
    assert embedder.calls == [("a", "b")]


async def test_the_script_is_played_in_order_and_then_calls_are_answered(
    autojump_clock: MockClock,
) -> None:
    lost = EmbedderUnavailableError("lost")
    embedder = ScriptedEmbedder(seconds_per_call=1.0, script=[None, lost, hang])

    assert await embedder.embed(["a"]) == [embedder.vector("a")]
    with pytest.raises(EmbedderUnavailableError) as caught:
        await embedder.embed(["a"])
    assert caught.value is lost
    assert trio.current_time() == 2.0
    with trio.move_on_after(10.0):
        await embedder.embed(["a"])
    assert trio.current_time() == 12.0
    assert embedder.cancelled == 1
    assert await embedder.embed(["a"]) == [embedder.vector("a")]


async def test_a_call_with_a_refused_text_fails_as_a_whole() -> None:
    embedder = ScriptedEmbedder(refuses=str.isupper)

    with pytest.raises(RowRejectedError, match="cannot embed 'B'"):
        await embedder.embed(["a", "B", "c"])


async def test_calls_in_flight_are_counted(autojump_clock: MockClock) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(embedder.embed, ["a"])
        await wait_all_tasks_blocked()
        assert embedder.in_flight == 3
    assert (embedder.in_flight, embedder.most_in_flight, embedder.cancelled) == (0, 3, 0)


@pytest.mark.parametrize("texts", [[], [""], ["a", ""]])
async def test_what_no_caller_may_ask_is_an_error_of_the_caller(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one text and no empty ones"):
        await ScriptedEmbedder().embed(texts)
