"""A waiter that is never answered is the defect that most batchers have shipped: here each way to it is tried.

Whatever becomes of the embedder, of those who wait in the same call, or of the batcher itself: everybody gets a vector
or a typed error, and the batcher works afterwards, or says that it does not.
"""

from __future__ import annotations

import gc
import itertools
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.batcher.bulks import Segment
from stationmaster.batcher.callers import Single
from stationmaster.batcher.calls import Call
from stationmaster.errors import (
    BatcherClosedError,
    EmbedderBusyError,
    EmbedderError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
    StationmasterError,
)
from stationmaster.testing import ScriptedEmbedder
from stationmaster.testing.embedder import hang
from tests.batching import bench, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stationmaster.abc import Vector


def run(main: Any, *args: Any) -> None:
    trio.run(main, *args, clock=MockClock(autojump_threshold=0))


# ------------------------------------------------------------------------------------------------- whatever it does


def too_few(texts: Sequence[str]) -> Any:
    return [[1.0]] * (len(texts) - 1)


def too_many(texts: Sequence[str]) -> Any:
    return [[1.0]] * (len(texts) + 1)


def a_generator(texts: Sequence[str]) -> Any:
    return ([1.0] for _ in texts)


def a_mapping(texts: Sequence[str]) -> Any:
    return {row: [1.0] for row in range(len(texts))}


def nothing(texts: Sequence[str]) -> Any:
    del texts


def raises(error: BaseException) -> Callable[[Sequence[str]], Any]:
    def fail(texts: Sequence[str]) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        (too_few, ProtocolError),
        (too_many, ProtocolError),
        (a_generator, ProtocolError),
        (a_mapping, ProtocolError),
        (nothing, ProtocolError),
        (raises(RuntimeError("bug")), EmbedderError),
        (raises(TimeoutError()), EmbedderError),
        (raises(ExceptionGroup("several", [ValueError("bug")])), EmbedderError),
        (raises(EmbedderUnavailableError("reset")), EmbedderUnavailableError),
        (raises(EmbedderBusyError("429", retry_after_s=3600.0)), EmbedderBusyError),
        (raises(RowRejectedError("400")), RowRejectedError),
    ],
    ids=[
        "few",
        "many",
        "generator",
        "mapping",
        "nothing",
        "bug",
        "timeout",
        "group",
        "reset",
        "busy",
        "rejected",
    ],
)
async def test_whatever_the_embedder_does_everybody_is_answered_and_the_next_call_works(
    autojump_clock: MockClock, does: Callable[[Sequence[str]], Any], kind: type[Exception]
) -> None:
    ill = True

    async def step(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(0.01)
        if ill:
            return does(texts)  # type: ignore[no-any-return]
        return [b.embedder.vector(text) for text in texts]

    async with bench(ScriptedEmbedder(script=itertools.repeat(step)), patience_s=5.0) as b:
        await b.submit(*texts(5))
        results = await b.batcher.embed_many(texts(3, "many"), return_errors=True)
        assert [type(result) for result in results] == [kind] * 3
        with pytest.raises(kind):
            await b.batcher.embed_many(texts(3, "first"))
        ill = False
        await trio.sleep(30)
        await b.submit("after")
        assert all(type(b.got[text]) is kind for text in texts(5))
    assert b.right("after")


async def test_a_hanging_embedder_keeps_nobody_beyond_their_deadline(
    autojump_clock: MockClock,
) -> None:
    async with bench(ScriptedEmbedder(script=[hang] * 4), max_in_flight=1, max_batch_rows=2) as b:
        await b.submit(*texts(5), deadline=1.0)
        with trio.move_on_at(1.0) as scope:
            await b.batcher.embed_many(texts(3, "many"))
        assert scope.cancelled_caught
        await trio.sleep_until(2.0)
        assert len(b.got) == 5
        assert all(1.0 <= at <= 1.0101 for at in b.at.values())


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt("^C"), SystemExit(1), GeneratorExit()],
    ids=lambda e: type(e).__name__,
)
def test_what_is_no_exception_answers_all_current_and_refuses_all_future_requests(
    error: BaseException,
) -> None:
    got: list[object] = []

    async def ask(batcher: Batcher, text: str) -> None:
        try:
            got.append(await batcher.embed(text))
        except BatcherClosedError as closed:
            got.append(closed)

    async def main() -> None:
        opened: list[Batcher] = []
        async with trio.open_nursery() as outside:

            async def live() -> None:
                async with open_batcher(ScriptedEmbedder(script=[error])) as batcher:
                    opened.append(batcher)
                    for text in texts(40):
                        outside.start_soon(ask, batcher, text)
                    await trio.sleep_forever()

            with pytest.raises(type(error)):
                await live()
            with pytest.raises(BatcherClosedError) as caught:
                await opened[0].embed("later")
            assert caught.value.__cause__ is error  # the original cause, not a hang
            assert opened[0].statistics().refusals == {"BatcherClosedError": 1}

    run(main)
    assert [type(each) for each in got] == [BatcherClosedError] * 40


async def test_a_slot_is_free_again_after_any_end_of_its_call(autojump_clock: MockClock) -> None:
    ends = [
        None,
        hang,
        RuntimeError("bug"),
        EmbedderUnavailableError("reset"),
        EmbedderUnavailableError("again"),
        EmbedderBusyError("429", retry_after_s=0.1),
        RowRejectedError("400"),
        ProtocolError("short"),
        ProtocolError("short again"),
    ]
    async with bench(ScriptedEmbedder(script=ends), max_in_flight=1, start_estimate_s=0.0) as b:
        for text in texts(7):
            with trio.move_on_after(1.0):
                await b.ask(text)
        await b.submit("after")
        assert b.batcher.statistics().busy_senders == 0
    assert b.right("after")


@pytest.mark.parametrize("callers", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_any_number_of_callers_at_once_is_answered_or_refused(
    autojump_clock: MockClock, callers: int
) -> None:
    embedder = ScriptedEmbedder(dimensions=1)
    ends: Counter[str] = Counter()
    async with open_batcher(embedder, policy=BatchPolicy(max_queue_rows=2_000)) as batcher:

        async def ask() -> None:
            try:
                await batcher.embed("text")
                ends["answered"] += 1
            except StationmasterError as error:
                ends[type(error).__name__] += 1

        async with trio.open_nursery() as nursery:
            for _ in range(callers):
                nursery.start_soon(ask)
    assert ends["answered"] + ends["QueueFullError"] == ends.total() == callers
    assert ends["answered"] >= 2_000


# ----------------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", ValueError, "an empty text"),
        ("a\ud800b", ValueError, r"text 0 has a lone surrogate"),
        (b"bytes", TypeError, r"texts are str, not bytes \(text 0\)"),
        (7, TypeError, "texts are str, not int"),
        (None, TypeError, "texts are str, not NoneType"),
        (["a"], TypeError, "texts are str, not list"),
    ],
    ids=["empty", "surrogate", "bytes", "number", "none", "list"],
)
async def test_what_is_no_text_is_refused_at_once_and_harms_nobody(
    autojump_clock: MockClock, text: Any, error: type[Exception], words: str
) -> None:
    async with bench(send_when_idle=False) as b:
        await b.submit("before")
        with pytest.raises(error, match=words):
            await b.batcher.embed(text)
        with pytest.raises(error, match=words.replace("text 0", "text 1")):
            await b.batcher.embed_many(["fine", text])
        assert b.batcher.statistics().queued_rows == 1
    assert b.right("before")


async def test_a_quick_batcher_refuses_what_is_no_text_too(autojump_clock: MockClock) -> None:
    async with bench(detailed=False) as b:
        for _ in range(8):  # now its calls are known to take no time
            await b.batcher.embed("measured")
        assert b.batcher._queue.free > 0
        b.nursery.start_soon(b.ask, "before")
        b.nursery.start_soon(b.ask, "beside")
        for text, error in (("", ValueError), (b"x", TypeError), ("\udfff", ValueError)):
            with pytest.raises(error):
                await b.batcher.embed(text)  # type: ignore[arg-type]
        await b.submit("größer")
    assert b.right("before", "beside", "größer")


# ------------------------------------------------------------------------------- every subset leaves at every step


def crowd_of(batcher: Batcher, embedder: ScriptedEmbedder) -> list[tuple[int, Any]]:
    """Make five callers of all kinds, with the rows each has."""

    async def one(text: str, **options: Any) -> None:
        assert await batcher.embed(text, **options) == embedder.vector(text)

    async def many(prefix: str, **options: Any) -> None:
        rows = texts(3, prefix)
        assert await batcher.embed_many(rows, **options) == [embedder.vector(row) for row in rows]

    return [
        (1, lambda: one("same")),
        (1, lambda: one("same", deadline=100.0)),
        (3, lambda: many("m")),
        (3, lambda: many("same", return_errors=True, priority=1.0)),
        (1, lambda: one("guilty")),
    ]


@pytest.mark.parametrize("share", [False, True], ids=["each for itself", "shared"])
@pytest.mark.parametrize("step", range(8))
def test_whoever_leaves_at_whatever_step_the_others_are_answered(step: int, share: bool) -> None:
    policy = BatchPolicy(
        max_batch_rows=4,
        max_in_flight=2,
        start_estimate_s=0.01,
        max_wait_s=0.5,
        hard_timeout_s=1.0,
        share_identical=share,
    )

    async def main(leavers: frozenset[int]) -> None:
        embedder = ScriptedEmbedder(
            seconds_per_call=1.0,
            refuses=lambda text: text == "guilty",
            script=[None, EmbedderUnavailableError("reset")],
        )
        waiting: dict[int, int] = {}
        ends: dict[int, str] = {}
        scopes = [trio.CancelScope() for _ in range(5)]

        async def caller(number: int, rows: int, ask: Any) -> None:
            waiting[number] = rows
            ends[number] = "left"
            with scopes[number]:
                try:
                    await ask()
                    ends[number] = "answered"
                except RowRejectedError:
                    ends[number] = "refused"
            del waiting[number]

        async with open_batcher(embedder, policy=policy) as batcher:
            async with trio.open_nursery() as nursery:
                for number, (rows, ask) in enumerate(crowd_of(batcher, embedder)):
                    nursery.start_soon(caller, number, rows, ask)
                await trio.sleep(step * 0.75)
                for number in leavers:
                    scopes[number].cancel()
                    if number % 2:
                        await wait_all_tasks_blocked()
                while waiting:
                    await wait_all_tasks_blocked()
                    seen = batcher.statistics()
                    live = seen.queued_rows + seen.rows_in_flight
                    assert len(waiting) <= live <= sum(waiting.values())
                    await trio.sleep(0.25)
            await trio.sleep(2.0)  # abandoned calls hold their slots for an estimate
            left = batcher.statistics()
            assert left.busy_senders == left.queued_bytes == 0
            assert embedder.in_flight == 0
            await batcher.embed("after")
        for number in range(5):
            if number not in leavers:
                assert ends[number] == ("refused" if number == 4 else "answered")

    for size in range(6):
        for leavers in itertools.combinations(range(5), size):
            run(main, frozenset(leavers))


# ----------------------------------------------------------------------------------------------- the tick of an answer


@pytest.mark.parametrize("seed", range(6))
def test_callers_that_are_cancelled_in_the_tick_of_their_answer_are_woken_once(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under deterministic scheduling: the same seed gives the same order of tasks, every time."""
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    orders: list[list[tuple[str, int]]] = []

    async def main() -> None:
        order: list[tuple[str, int]] = []
        orders.append(order)
        dice = random.Random(seed)
        embedder = ScriptedEmbedder(seconds_per_call=1.0)
        async with open_batcher(embedder, policy=BatchPolicy(max_batch_rows=7)) as batcher:

            async def caller(number: int) -> None:
                for attempt in range(5):
                    deadline = trio.current_time() + dice.choice((0.5, 1.0, 1.0, 1.0, 2.0))
                    kept = trio.current_time() + dice.choice((0.99, 1.99, 50.0))
                    with trio.move_on_at(deadline):
                        try:
                            if number % 3:
                                await batcher.embed(f"{number}/{attempt}", deadline=kept)
                            else:
                                await batcher.embed_many(texts(4), deadline=kept)
                            order.append(("answered", number))
                        except StationmasterError as error:
                            order.append((type(error).__name__, number))

            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(caller, number)
        left = batcher.statistics()
        assert left.queued_rows == left.rows_in_flight == left.busy_senders == 0

    for _ in range(2):
        trio._core._run._r.seed(seed)
        run(main)
    assert orders[0] == orders[1]
    assert orders[0]


def entries_in_memory() -> list[object]:
    return [each for each in gc.get_objects() if isinstance(each, Single | Segment | Call)]


async def test_answered_calls_leave_nothing_to_the_garbage_collector(
    autojump_clock: MockClock,
) -> None:
    # Entries know their call, and a call its entries: unless that is undone, each row waits for a collection.
    async with open_batcher(ScriptedEmbedder()) as batcher:
        await batcher.embed_many(texts(100))  # whatever the first call sets up
        gc.collect()
        old = entries_in_memory()  # errors of other tests hold some
        gc.disable()
        try:
            async with trio.open_nursery() as nursery:
                for text in texts(100):
                    nursery.start_soon(batcher.embed, text)
                nursery.start_soon(batcher.embed_many, texts(100))
            left = [entry for entry in entries_in_memory() if entry not in old]
        finally:
            gc.enable()
    assert left == []
