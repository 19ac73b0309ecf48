"""The corner cases of when a batch leaves, as a table: who asks when, what is sent when and why, who gets what."""

from __future__ import annotations

from math import inf
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.errors import DeadlineExceededError, DeadlineUnreachableError
from stationmaster.testing import ScriptedEmbedder
from tests.batching import Bench, bench, texts


@attrs.frozen
class Ask:
    """One text that is asked for."""

    at: float
    text: str
    leaves: float = inf
    """When its caller is cancelled."""
    deadline: float = inf
    priority: float = 0.0


CLASSIC: dict[str, Any] = {
    "min_batch_rows": 2,
    "max_batch_rows": 4,
    "max_wait_s": 1.0,
    "hard_timeout_s": 3.0,
    "send_when_idle": False,
    "start_estimate_s": 1.0,
    "margin_s": 0.0,
}
Sent = list[tuple[float, str, str]]
"""When, why, and the texts."""


@pytest.mark.parametrize(
    ("policy", "asks", "sent"),
    [
        pytest.param(
            {"max_wait_s": 0.0, "min_batch_rows": 1},
            [Ask(0, "a"), Ask(0.5, "b")],
            [(0, "min", "a"), (0.5, "min", "b")],
            id="no wait, no timer: each leaves at once",
        ),
        pytest.param(
            {"min_batch_rows": 1},
            [Ask(0, "a")],
            [(1, "min", "a")],
            id="a minimum of one: the hard limit is never reached",
        ),
        pytest.param(
            {"min_batch_rows": 4},
            [Ask(0, "a"), Ask(0, "b"), Ask(0, "c"), Ask(2, "d"), Ask(2.25, "e")],
            [(2, "full", "abcd"), (5.25, "hard", "e")],
            id="minimum = maximum: full comes first, the rest waits for the hard limit",
        ),
        pytest.param(
            {},
            [Ask(0, "a"), Ask(1, "b")],
            [(1, "min", "ab")],
            id="who arrives at the very instant of the wait completes the minimum",
        ),
        pytest.param(
            {"min_batch_rows": 4},
            [Ask(0, "a"), Ask(3, "b")],
            [(3, "hard", "ab")],
            id="who arrives at the very instant of the hard limit travels along",
        ),
        pytest.param(
            {},
            [Ask(0, "a", leaves=0.5), Ask(0.25, "b")],
            [(3.25, "hard", "b")],
            id="the oldest leaves: the age is that of the next",
        ),
        pytest.param(
            {},
            [Ask(0, "a"), Ask(0, "b", leaves=0.5)],
            [(3, "hard", "a")],
            id="below the minimum again",
        ),
        pytest.param(
            {},
            [Ask(0, "a", leaves=0.5), Ask(0, "b", leaves=0.5)],
            [],
            id="all leave: no empty call",
        ),
        pytest.param(
            {"max_in_flight": 1},
            [Ask(0, text) for text in "abcdefghi"],
            [(0, "full", "abcd"), (1, "full", "efgh"), (3, "hard", "i")],
            id="full repeats, the remainder keeps its own age",
        ),
        pytest.param(
            {},
            [Ask(0, "a", deadline=2.0)],
            [(1, "latest", "a")],
            id="the deadline less the estimate",
        ),
        pytest.param(
            {},
            [Ask(0, "a"), Ask(0.5, "b", deadline=1.75)],
            [(0.75, "latest", "ba")],
            id="an urgent one takes the others along",
        ),
        pytest.param(
            {"hard_timeout_s": 60.0, "patience_s": 90.0},
            [Ask(0, "a", deadline=inf)],
            [(60, "hard", "a")],
            id="without a deadline there is no latest",
        ),
        pytest.param(
            {"max_in_flight": 1, "max_batch_rows": 2},
            [Ask(0, "a"), Ask(0, "b"), Ask(0.1, "c"), Ask(0.125, "d"), Ask(0.2, "e", deadline=9.0)],
            [(0, "full", "ab"), (1, "full", "ec"), (3.125, "hard", "d")],
            id="the nearest deadline goes first, then arrival",
        ),
        pytest.param(
            {"max_in_flight": 1, "max_batch_rows": 2},
            [Ask(0, "a"), Ask(0, "b"), Ask(0.1, "c"), Ask(0.125, "d"), Ask(0.2, "e", priority=5.0)],
            [(0, "full", "ab"), (1, "full", "ec"), (3.125, "hard", "d")],
            id="a priority is a deadline that is nearer",
        ),
        pytest.param(
            {"send_when_idle": True},
            [Ask(0, "a"), Ask(0.5, "b"), Ask(0.75, "c")],
            [(0, "idle", "a"), (1, "idle", "bc")],
            id="the end of the last call sends what came meanwhile",
        ),
        pytest.param(
            {"max_batch_rows": 1, "min_batch_rows": 1, "max_queue_rows": 1},
            [Ask(0, "a"), Ask(0.5, "b")],
            [(0, "full", "a"), (0.5, "full", "b")],
            id="calls of one row",
        ),
    ],
)
async def test_what_leaves_when_and_why(
    autojump_clock: MockClock, policy: dict[str, Any], asks: list[Ask], sent: Sent
) -> None:
    embedder = ScriptedEmbedder(seconds_per_call=1.0)
    async with bench(embedder, **CLASSIC | policy) as b:
        for ask in asks:
            b.nursery.start_soon(_ask, b, ask)
            await (
                wait_all_tasks_blocked()
            )  # those of the instant 0 in order; later ones have instants of their own
    told = [
        (instant, reason, "".join(call))
        for (instant, _), reason, call in zip(b.sent(), b.reasons(), embedder.calls, strict=True)
    ]
    assert told == sent
    assert b.right(*(ask.text for ask in asks if ask.leaves == inf))
    assert b.batcher.statistics().cancelled_rows == sum(ask.leaves < inf for ask in asks)


async def _ask(b: Bench, ask: Ask) -> None:
    """Ask, and be cancelled at the time to leave, of which nobody knows before."""
    async with trio.open_nursery() as nursery:

        async def leave() -> None:
            await trio.sleep_until(ask.leaves)
            nursery.cancel_scope.cancel()

        nursery.start_soon(leave)
        await trio.sleep_until(ask.at)
        await b.ask(ask.text, deadline=ask.deadline, priority=ask.priority)
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------------------------------- what cannot be met is refused


@pytest.mark.parametrize(
    ("queued", "rows", "deadline_s", "taken"),
    [
        pytest.param(0, 1, 0.9, False, id="no call is as quick as that"),
        pytest.param(0, 1, 1.1, True, id="one call is"),
        pytest.param(0, 8, 1.1, True, id="all slots at once"),
        pytest.param(0, 9, 1.1, False, id="more rows than the slots take in one round"),
        pytest.param(7, 1, 1.1, True, id="there is room beside those who wait"),
        pytest.param(8, 1, 1.1, False, id="those who wait fill the next round"),
        pytest.param(8, 1, 2.1, True, id="the round after is early enough"),
    ],
)
async def test_what_the_rows_ahead_make_impossible_is_refused_at_once(
    autojump_clock: MockClock, queued: int, rows: int, deadline_s: float, taken: bool
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=4, max_in_flight=2
    ) as b:
        for _ in range(8):
            await b.batcher.embed("measured")
        b.nursery.start_soon(b.batcher.embed_many, texts(8, "busy"))
        await wait_all_tasks_blocked()
        now = trio.current_time()
        await b.submit(*texts(queued), deadline=now + deadline_s)  # equal ones do not overtake
        before = b.batcher.statistics().refused_rows
        try:
            await b.batcher.embed_many(texts(rows, "many"), deadline=now + deadline_s)
        except DeadlineUnreachableError:
            assert not taken
            assert trio.current_time() == now
            assert b.batcher.statistics().refused_rows == before + rows
        except DeadlineExceededError:
            assert taken  # it was worth a try: what is in flight might have ended at once
        else:
            assert taken


async def test_an_urgent_row_is_not_refused_for_rows_that_it_overtakes(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=4, max_in_flight=1
    ) as b:
        for _ in range(8):
            await b.batcher.embed("measured")
        await b.submit("busy", *texts(20))
        now = trio.current_time()
        await b.batcher.embed("urgent", deadline=now + 2.5)
        assert trio.current_time() == now + 2.0


async def test_part_of_many_texts_is_worth_a_try_if_errors_are_returned(
    autojump_clock: MockClock,
) -> None:
    async with bench(
        ScriptedEmbedder(seconds_per_call=1.0), max_batch_rows=4, max_in_flight=2
    ) as b:
        for _ in range(8):
            await b.batcher.embed("measured")
        await b.submit("busy")
        now = trio.current_time()
        with pytest.raises(DeadlineUnreachableError):
            await b.batcher.embed_many(texts(12), deadline=now + 1.5)
        results = await b.batcher.embed_many(texts(12), deadline=now + 1.5, return_errors=True)
    kinds = [type(result) for result in results]
    assert kinds.count(DeadlineExceededError) == 12 - kinds.count(list)
    assert kinds[:4] == [list] * 4
