"""Crowds that are cancelled at random: nobody hangs, nobody is woken twice, nobody gets another's vector.

A task that is woken twice, or is woken after it was cancelled, makes trio itself crash: that is what these look for.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.errors import (
    BatcherClosedError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    EmbedderBusyError,
    EmbedderError,
    EmbedderUnavailableError,
    QueueFullError,
    RowRejectedError,
)
from stationmaster.testing import ScriptedEmbedder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stationmaster.abc import Vector


def run(main: Any, *args: Any) -> None:
    trio.run(main, *args, clock=MockClock(autojump_threshold=0))


def unruly(embedder: ScriptedEmbedder, dice: random.Random) -> Any:
    """Make a step that is slow, fails or lies at random."""

    async def step(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(dice.random() * 0.004)
        fate = dice.random()
        if fate < 0.05:
            raise EmbedderBusyError("429", retry_after_s=0.002)
        if fate < 0.10:
            raise EmbedderUnavailableError("reset")
        if fate < 0.15:
            raise RuntimeError("bug")
        if fate < 0.20:
            raise RowRejectedError(f"{dice.random()}")
        vectors = [embedder.vector(text) for text in texts]
        return vectors[1:] if fate < 0.25 else vectors

    return step


POLICIES = {
    "default": BatchPolicy(start_estimate_s=0.001, max_queue_rows=500),
    "classic": attrs.evolve(BatchPolicy.seed_compat(), max_wait_s=0.002, hard_timeout_s=0.004),
    "calls of one": BatchPolicy(max_batch_rows=1, max_in_flight=2, start_estimate_s=0.0),
    "tokens, shared": BatchPolicy(
        start_estimate_s=0.001, max_queue_rows=500, max_batch_tokens=50, share_identical=True
    ),
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["trio's order", "a fixed order"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_crowd_that_is_cancelled_at_random_never_hangs(
    seed: int, policy: BatchPolicy, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if deterministic:
        scheduler: Any = trio._core._run
        monkeypatch.setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        scheduler._r.seed(seed)
    outcomes = storm(policy, seed)
    assert outcomes.total() == 1000
    assert outcomes["cancelled"] > 50
    assert outcomes["answered"] > 5
    assert len(outcomes) >= 4


def storm(policy: BatchPolicy, seed: int) -> Counter[str]:
    """Let a crowd ask an unruly embedder; return what became of its requests."""
    dice = random.Random(seed)
    embedder = ScriptedEmbedder()
    embedder._steps = iter(lambda: unruly(embedder, dice), None)
    outcomes: Counter[str] = Counter()

    async def caller(batcher: Batcher, name: int) -> None:
        for number in range(10):
            texts = [f"{name}/{number}/{row}" for row in range(dice.choice([1, 1, 1, 5, 40]))]
            options: dict[str, Any] = {}
            if dice.random() < 0.5:
                options["deadline"] = trio.current_time() + dice.random() * 0.03
            if dice.random() < 0.2:
                options["priority"] = dice.random()
            with trio.move_on_after(dice.random() * 0.012) as scope:
                try:
                    if len(texts) == 1:
                        assert await batcher.embed(texts[0], **options) == embedder.vector(texts[0])
                    else:
                        results = await batcher.embed_many(texts, return_errors=True, **options)
                        for text, result in zip(texts, results, strict=True):
                            if not isinstance(result, (EmbedderError, DeadlineExceededError)):
                                assert result == embedder.vector(text)
                    outcomes["answered"] += 1
                except (
                    QueueFullError,
                    DeadlineUnreachableError,
                    DeadlineExceededError,
                    EmbedderError,
                ) as error:
                    outcomes[type(error).__name__] += 1
            if scope.cancelled_caught:
                outcomes["cancelled"] += 1

    async def main() -> None:
        async with open_batcher(embedder, policy=policy) as batcher:
            with trio.fail_after(600):
                async with trio.open_nursery() as nursery:
                    for name in range(100):
                        nursery.start_soon(caller, batcher, name)
        left = batcher.statistics()
        assert left.queued_rows == left.queued_bytes == 0
        assert left.calls_in_flight == left.rows_in_flight == 0

    run(main)
    return outcomes


LAWLESS = {
    "a deadline": """
def fail(self, make_error):
    task = self.task
    if task is None:
        return 0
    error = make_error()
    callers.reschedule(task, callers.Failure(error))  # and the task is not cleared: it is woken again
    return 1

callers.Single.fail = fail
""",
    "a cancellation": """
callers.Single.__call__ = lambda self, raise_cancel: callers.Abort.SUCCEEDED  # again, not cleared
""",
}
STRESS = """
from stationmaster.batcher import callers
from tests.test_batcher_stress import POLICIES, storm
{violation}
for seed in range(20):
    storm(POLICIES["default"], seed)
"""


@pytest.mark.parametrize("violation", LAWLESS.values(), ids=LAWLESS)
def test_the_stress_finds_out_when_the_law_of_waking_is_broken(violation: str) -> None:
    """Else it would prove nothing. In a process of its own, since trio's run loop dies of it."""
    child = subprocess.run(
        [sys.executable, "-c", STRESS.format(violation=violation)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 1
    assert "TrioInternalError" in child.stderr


def test_a_crowd_is_woken_in_slices_and_can_leave_meanwhile() -> None:
    async def main() -> None:
        embedder = ScriptedEmbedder(seconds_per_call=1.0)
        policy = BatchPolicy(max_batch_rows=1000, max_queue_rows=1000)
        answered: list[int] = []
        async with open_batcher(embedder, policy=policy) as batcher:
            async with trio.open_nursery() as nursery:

                async def caller(number: int) -> None:
                    await batcher.embed(f"t{number}")
                    answered.append(number)
                    nursery.cancel_scope.cancel()

                for number in range(1000):
                    nursery.start_soon(caller, number)
        assert embedder.calls[0] == embedder.calls[-1]
        assert len(embedder.calls[0]) == 1000
        statistics = batcher.statistics()
        assert statistics.answered_rows + statistics.cancelled_rows == 1000
        assert statistics.answered_rows == 256  # one slice, then the others were cancelled
        assert statistics.rows_in_flight == 0

    run(main)


@attrs.frozen
class Plan:
    """What one caller does: when it asks, for how many rows, and when it is cancelled or its deadline strikes."""

    starts: int
    rows: int
    leaves_after: int | None
    deadline_after: int | None


plans = st.builds(
    Plan,
    starts=st.integers(0, 12),
    rows=st.sampled_from([1, 1, 1, 3, 7]),
    leaves_after=st.none() | st.integers(0, 12),
    deadline_after=st.none() | st.integers(1, 12),
)
TICK = 0.02


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    crowd=st.lists(plans, min_size=1, max_size=14),
    policy=st.sampled_from(
        [
            BatchPolicy(max_batch_rows=4, max_in_flight=2, start_estimate_s=0.01),
            attrs.evolve(BatchPolicy.seed_compat(), max_in_flight=1, max_batch_rows=5),
            BatchPolicy(max_batch_rows=2, max_in_flight=1, max_wait_s=0.0, hard_timeout_s=0.0),
            BatchPolicy(
                max_batch_rows=3, max_batch_tokens=20, share_identical=True, start_estimate_s=0.01
            ),
        ]
    ),
    call_ticks=st.sampled_from([0.0, 1.0, 2.5]),
    guilty=st.sets(st.integers(0, 13), max_size=2),
)
def test_live_rows_are_waiting_callers_at_every_step_whoever_leaves(
    crowd: list[Plan], policy: BatchPolicy, call_ticks: float, guilty: set[int]
) -> None:
    refused = {f"{name}/0" for name in guilty}
    embedder = ScriptedEmbedder(
        seconds_per_call=call_ticks * TICK, refuses=lambda text: text in refused
    )
    waiting: dict[int, int] = {}
    ends: Counter[str] = Counter()

    async def caller(batcher: Batcher, name: int, plan: Plan) -> None:
        await trio.sleep(plan.starts * TICK)
        now = trio.current_time()
        texts = [f"{name}/{row}" for row in range(plan.rows)]
        options: dict[str, Any] = {}
        if plan.deadline_after is not None:
            options["deadline"] = now + plan.deadline_after * TICK
        waiting[name] = plan.rows
        try:
            with trio.CancelScope() as scope:
                if plan.leaves_after is not None:
                    scope.deadline = now + (plan.leaves_after + 0.5) * TICK
                if plan.rows == 1:
                    assert await batcher.embed(texts[0], **options) == embedder.vector(texts[0])
                else:
                    vectors = await batcher.embed_many(texts, **options)
                    assert vectors == [embedder.vector(text) for text in texts]
                assert not refused & set(texts)
                ends["answered"] += 1
            if scope.cancelled_caught:
                ends["left"] += 1
                assert trio.current_time() == pytest.approx(scope.deadline)
        except RowRejectedError:
            assert refused & set(texts)
            ends["refused"] += 1
        except DeadlineExceededError as error:
            if error.__cause__ is None:
                assert options["deadline"] <= trio.current_time() <= options["deadline"] + 0.0101
            ends["late"] += 1
        except DeadlineUnreachableError:
            assert trio.current_time() == now
            ends["unreachable"] += 1
        finally:
            del waiting[name]

    async def watch(batcher: Batcher) -> None:
        while True:
            await wait_all_tasks_blocked()
            seen = batcher.statistics()
            assert len(waiting) <= seen.queued_rows + seen.rows_in_flight <= sum(waiting.values())
            assert seen.calls_in_flight <= policy.max_in_flight
            await trio.sleep(TICK / 4)

    async def main() -> None:
        async with open_batcher(embedder, policy=policy) as batcher:
            async with trio.open_nursery() as outer:
                outer.start_soon(watch, batcher)
                async with trio.open_nursery() as callers:
                    for name, plan in enumerate(crowd):
                        callers.start_soon(caller, batcher, name, plan)
                outer.cancel_scope.cancel()
        left = batcher.statistics()
        assert left.queued_rows == left.queued_bytes == 0
        assert left.calls_in_flight == left.rows_in_flight == 0
        ended = left.answered_rows + left.failed_rows + left.expired_rows
        ended += left.cancelled_rows + left.refused_rows
        assert ended == sum(plan.rows for plan in crowd)
        assert not batcher._queue._entries or not left.queued_rows

    run(main)
    assert ends.total() == len(crowd)


@pytest.mark.parametrize("steps", range(12))
def test_a_batcher_can_be_closed_at_any_step_of_its_work(steps: int) -> None:
    async def main() -> None:
        embedder = ScriptedEmbedder(
            seconds_per_call=0.01, refuses=lambda text: text in {"3/0", "5/0"}
        )
        policy = BatchPolicy(max_batch_rows=4, max_in_flight=2, grace_s=0.0, start_estimate_s=0.0)
        ends: Counter[str] = Counter()

        async def caller(batcher: Batcher, name: int) -> None:
            try:
                await batcher.embed(f"{name}/0")
                ends["answered"] += 1
            except RowRejectedError:
                ends["refused"] += 1
            except BatcherClosedError:
                ends["closed"] += 1

        async with trio.open_nursery() as outside:
            async with open_batcher(embedder, policy=policy) as batcher:
                for name in range(20):
                    outside.start_soon(caller, batcher, name)
                await trio.sleep(0.005 * steps)
        assert ends.total() == 20
        assert embedder.in_flight == 0

    run(main)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attempt", range(8))  # trio shuffles the tasks of one instant
def test_an_answer_and_a_deadline_at_one_instant_wake_a_caller_once(
    rows: int, attempt: int
) -> None:
    async def main() -> None:
        embedder = ScriptedEmbedder(seconds_per_call=1.0)
        async with open_batcher(embedder) as batcher:
            texts = [f"{attempt}/{row}" for row in range(rows)]
            ends: Counter[str] = Counter()

            async def caller() -> None:
                try:
                    if rows == 1:
                        await batcher.embed(
                            texts[0], deadline=0.995
                        )  # kept to 10 ms: strikes at 1.0
                    else:
                        await batcher.embed_many(texts, deadline=0.995)
                    ends["answered"] += 1
                except DeadlineExceededError:
                    ends["late"] += 1

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(caller)
        assert trio.current_time() == 1.0
        assert ends.total() == 5
        statistics = batcher.statistics()
        assert statistics.answered_rows == ends["answered"] * rows
        assert statistics.expired_rows == ends["late"] * rows

    run(main)
