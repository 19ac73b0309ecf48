"""Closing, crashing and being cancelled: nobody is left waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.errors import (
    BatcherClosedError,
    EmbedderBusyError,
    StationmasterError,
)
from stationmaster.events import CallAbandoned, CallStarted, Event, RequestSubmitted
from stationmaster.testing import RecordingObserver, ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stationmaster.abc import Vector

CLASSIC = BatchPolicy.seed_compat()


async def ask(batcher: Batcher, text: str, got: dict[str, Any]) -> None:
    try:
        got[text] = await batcher.embed(text)
    except StationmasterError as error:
        got[text] = error


async def test_closing_sends_what_is_queued_at_once_and_waits_for_it(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0)
    observer = RecordingObserver()
    got: dict[str, Any] = {}
    async with trio.open_nursery() as outside:
        async with open_batcher(embedder, policy=CLASSIC, observer=observer) as batcher:
            for text in texts(3):
                outside.start_soon(ask, batcher, text, got)
            await wait_all_tasks_blocked()
        assert trio.current_time() == 1.0
        with pytest.raises(BatcherClosedError, match="the batcher is closed"):
            await batcher.embed("late")
    assert got == {text: embedder.vector(text) for text in texts(3)}
    assert [event.reason for event in observer.of(CallStarted)] == ["drain"]


async def test_while_it_closes_nothing_more_is_taken(autojump_clock: MockClock) -> None:
    got: dict[str, Any] = {}

    async def late(batcher: Batcher) -> None:
        await trio.sleep(0.5)
        await ask(batcher, "late", got)
        assert trio.current_time() == 0.5

    async with trio.open_nursery() as outside:
        async with open_batcher(ScriptedEmbedder(seconds_per_call=1.0)) as batcher:
            outside.start_soon(ask, batcher, "early", got)
            outside.start_soon(late, batcher)
            await wait_all_tasks_blocked()
    assert isinstance(got["late"], BatcherClosedError)
    assert isinstance(got["early"], list)
    assert batcher.statistics().refused_rows == 1


async def test_after_the_grace_the_rest_is_answered_with_an_error(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(script=[hang, hang])
    observer = RecordingObserver()
    policy = BatchPolicy(max_in_flight=2, max_batch_rows=2, grace_s=2.0)
    got: dict[str, Any] = {}
    results: list[Any] = []
    async with trio.open_nursery() as outside:
        async with open_batcher(embedder, policy=policy, observer=observer) as batcher:
            for text in texts(5):
                outside.start_soon(ask, batcher, text, got)
            await wait_all_tasks_blocked()

            async def many() -> None:
                results.extend(await batcher.embed_many(["x", "y"], return_errors=True))

            outside.start_soon(many)
            await wait_all_tasks_blocked()
        assert trio.current_time() == 2.0
    assert [type(got[text]) for text in texts(5)] == [BatcherClosedError] * 5
    assert [type(result) for result in results] == [BatcherClosedError] * 2
    assert embedder.cancelled == 2
    assert len(observer.of(CallAbandoned)) == 2
    left = batcher.statistics()
    assert left.queued_rows == left.queued_bytes == left.rows_in_flight == left.calls_in_flight == 0
    assert left.failed_rows == 7


@pytest.mark.parametrize("grace_s", [0.0, 5.0])
async def test_with_nobody_waiting_closing_takes_no_time(
    autojump_clock: MockClock, grace_s: float
) -> None:
    async with open_batcher(ScriptedEmbedder(), policy=BatchPolicy(grace_s=grace_s)) as batcher:
        await batcher.embed("a")
    assert trio.current_time() == 0.0


async def test_closing_ends_as_soon_as_the_last_waiter_left(autojump_clock: MockClock) -> None:
    busy = EmbedderBusyError("429", retry_after_s=3.0)
    got: dict[str, Any] = {}

    async def impatient(batcher: Batcher) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, batcher, "a", got)
            await trio.sleep(1.0)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as outside:
        async with open_batcher(ScriptedEmbedder(script=[busy])) as batcher:
            outside.start_soon(impatient, batcher)
            await wait_all_tasks_blocked()
        assert trio.current_time() == 1.0
    assert got == {}


async def test_a_cancelled_batcher_answers_everybody_who_waits_outside_at_once(
    autojump_clock: MockClock,
) -> None:
    got: dict[str, Any] = {}
    async with trio.open_nursery() as outside:
        with trio.move_on_after(1.0) as scope:
            async with open_batcher(
                ScriptedEmbedder(script=[hang, hang]), policy=CLASSIC
            ) as batcher:
                for text in texts(17):
                    outside.start_soon(ask, batcher, text, got)
                await trio.sleep_forever()
        assert scope.cancelled_caught
        await wait_all_tasks_blocked()
        assert trio.current_time() == 1.0
        assert [str(got[text]) for text in texts(17)] == [
            "the batcher is closed: it was cancelled"
        ] * 17
        assert all(got[text].__cause__ is None for text in texts(17))
        with pytest.raises(BatcherClosedError, match="it was cancelled"):
            await batcher.embed("late")


async def test_a_body_that_is_cancelled_and_shields_itself_is_answered_until_it_leaves(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0)
    with trio.CancelScope() as scope:
        async with open_batcher(embedder) as batcher:
            with trio.CancelScope(shield=True):
                scope.cancel()
                await wait_all_tasks_blocked()
                assert await batcher.embed("late") == embedder.vector("late")
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    with pytest.raises(BatcherClosedError, match="it was cancelled"):
        await batcher.embed("too late")


async def test_an_error_in_the_body_is_the_cause_for_those_outside(
    autojump_clock: MockClock,
) -> None:
    got: dict[str, Any] = {}
    bug = ZeroDivisionError("in the body")

    async def fail(outside: trio.Nursery) -> None:
        async with open_batcher(ScriptedEmbedder(script=[hang])) as batcher:
            outside.start_soon(ask, batcher, "a", got)
            await wait_all_tasks_blocked()
            raise bug

    async with trio.open_nursery() as outside:
        with pytest.raises(ZeroDivisionError, match="in the body"):
            await fail(outside)
    assert isinstance(got["a"], BatcherClosedError)
    assert got["a"].__cause__ is bug


class Abort(BaseException):
    """Like KeyboardInterrupt."""


async def test_what_is_no_exception_ends_the_batcher_loudly_and_nobody_hangs(
    autojump_clock: MockClock,
) -> None:
    abort = Abort("now")
    got: dict[str, Any] = {}
    opened: list[Batcher] = []

    async def crash(outside: trio.Nursery) -> None:
        async with open_batcher(ScriptedEmbedder(script=[abort, hang])) as batcher:
            opened.append(batcher)
            for text in texts(40):
                outside.start_soon(ask, batcher, text, got)
            await trio.sleep_forever()

    async with trio.open_nursery() as outside:
        with pytest.raises(Abort) as caught:
            await crash(outside)
        assert caught.value is abort
        with pytest.raises(BatcherClosedError, match="Abort: now") as refused:
            await opened[0].embed("late")
        assert refused.value.__cause__ is abort
    assert len(got) == 40
    assert all(isinstance(error, BatcherClosedError) for error in got.values())
    assert all(error.__cause__ is abort for error in got.values())


async def test_a_quick_batcher_that_died_takes_nothing_more(autojump_clock: MockClock) -> None:
    opened: list[Batcher] = []

    async def crash() -> None:
        embedder = ScriptedEmbedder(script=[None] * 20 + [hang, Abort("now")])
        policy = BatchPolicy(max_in_flight=2)
        async with open_batcher(embedder, policy=policy) as batcher, trio.open_nursery() as callers:
            opened.append(batcher)
            for _ in range(20):
                await batcher.embed("measured")
            callers.start_soon(ask, batcher, "hangs", {})
            await wait_all_tasks_blocked()
            for text in texts(32):
                callers.start_soon(ask, batcher, text, {})
            await trio.sleep_forever()

    with pytest.raises(Abort):
        await crash()
    with trio.fail_after(1.0), pytest.raises(BatcherClosedError, match="Abort: now"):
        await opened[0].embed("late")


async def test_a_group_with_more_than_exceptions_ends_the_batcher_too(
    autojump_clock: MockClock,
) -> None:
    async def two_ends(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.lowlevel.checkpoint()
        raise BaseExceptionGroup("two", [Abort("now"), ValueError("and this")])

    ended: BaseException | None = None
    try:
        async with open_batcher(ScriptedEmbedder(script=[two_ends])) as batcher:
            with trio.CancelScope(shield=True), pytest.raises(BatcherClosedError):
                await batcher.embed("a")
    except BaseExceptionGroup as group:
        ended = group.subgroup(Abort)
    assert ended is not None


@attrs.define
class Broken:
    """An observer with a bug."""

    breaks_at: type
    detailed: bool = True

    def observe(self, event: Event, /) -> None:
        if isinstance(event, self.breaks_at):
            raise ZeroDivisionError(type(event).__name__)


async def test_an_observer_that_raises_at_a_call_ends_the_batcher(
    autojump_clock: MockClock,
) -> None:
    got: dict[str, Any] = {}

    async def crash(outside: trio.Nursery) -> None:
        async with open_batcher(ScriptedEmbedder(), observer=Broken(CallStarted)) as batcher:
            outside.start_soon(ask, batcher, "a", got)
            await trio.sleep_forever()

    async with trio.open_nursery() as outside:
        with pytest.raises(ZeroDivisionError, match="CallStarted"):
            await crash(outside)
    assert isinstance(got["a"], BatcherClosedError)


async def test_an_observer_that_raises_at_a_request_fails_it_and_queues_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_batcher(ScriptedEmbedder(), observer=Broken(RequestSubmitted)) as batcher:
        with pytest.raises(ZeroDivisionError, match="RequestSubmitted"):
            await batcher.embed("a")
        assert batcher.statistics().queued_rows == 0


async def test_a_bisection_that_is_cut_short_leaves_nobody_waiting(
    autojump_clock: MockClock,
) -> None:
    embedder = ScriptedEmbedder(refuses=lambda text: text == "t3")
    results: list[Any] = []
    policy = BatchPolicy(grace_s=1.0)
    async with trio.open_nursery() as outside:
        async with open_batcher(embedder, policy=policy) as batcher:

            async def many() -> None:
                results.extend(await batcher.embed_many(texts(8), return_errors=True))

            embedder.seconds_per_call = 0.4
            outside.start_soon(many)
            await wait_all_tasks_blocked()
        assert trio.current_time() == 1.0
    assert len(results) == 8
    assert all(isinstance(result, BatcherClosedError) for result in results)
    assert batcher.statistics().rows_in_flight == 0
