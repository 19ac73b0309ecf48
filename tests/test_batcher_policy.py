"""The rule and the cost model, without a task or a clock."""

from __future__ import annotations

import math
from math import inf, nan
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stationmaster.batcher import BatchPolicy
from stationmaster.batcher.cost import CostModel
from stationmaster.batcher.policy import decide
from stationmaster.errors import ConfigError


@attrs.frozen(kw_only=True)
class Queue:
    rows: int = 1
    size_bytes: int = 10
    tokens: int = 0
    oldest: float = 100.0
    earliest_due: float = 130.0


def decision(policy: BatchPolicy, queue: Queue, **state: Any) -> tuple[str | None, float]:
    state = {"now": 100.0, "cost": CostModel(0.1), "idle": False, **state}
    return decide(policy, queue, **state)


CLASSIC = BatchPolicy.seed_compat()
DEFAULT = BatchPolicy()


@pytest.mark.parametrize(
    ("policy", "queue", "state", "expected"),
    [
        pytest.param(DEFAULT, Queue(rows=32), {}, ("full", 100.0), id="rows fill a call"),
        pytest.param(
            DEFAULT, Queue(size_bytes=1 << 20), {}, ("full", 100.0), id="bytes fill a call"
        ),
        pytest.param(
            BatchPolicy(max_batch_tokens=9), Queue(tokens=9), {}, ("full", 100.0), id="tokens do"
        ),
        pytest.param(
            BatchPolicy(max_batch_tokens=9), Queue(tokens=8), {}, (None, 100.005), id="not yet"
        ),
        pytest.param(
            BatchPolicy(min_batch_rows=3, max_batch_rows=3),
            Queue(rows=2),
            {"now": 100.04},
            (None, 100.05),
            id="a minimum that is the maximum",
        ),
        pytest.param(
            BatchPolicy(min_batch_rows=3, max_batch_rows=3),
            Queue(rows=3),
            {},
            ("full", 100.0),
            id="then nothing leaves by the minimum",
        ),
        pytest.param(
            BatchPolicy(hard_timeout_s=inf), Queue(), {"now": 101.0}, ("min", 101.0), id="no hard"
        ),
        pytest.param(DEFAULT, Queue(), {"idle": True}, ("idle", 100.0), id="nothing in flight"),
        pytest.param(CLASSIC, Queue(), {"idle": True}, (None, 100.25), id="idle sending is off"),
        pytest.param(DEFAULT, Queue(), {}, (None, 100.005), id="one row waits for company"),
        pytest.param(DEFAULT, Queue(), {"now": 100.005}, ("min", 100.005), id="long enough"),
        pytest.param(
            CLASSIC, Queue(rows=3), {"now": 100.2}, (None, 100.25), id="below the minimum"
        ),
        pytest.param(CLASSIC, Queue(rows=3), {"now": 100.25}, ("hard", 100.25), id="hard limit"),
        pytest.param(
            CLASSIC, Queue(rows=4), {"now": 100.01}, (None, 100.05), id="minimum, too young"
        ),
        pytest.param(CLASSIC, Queue(rows=4), {"now": 100.06}, ("min", 100.06), id="minimum, old"),
        pytest.param(
            CLASSIC, Queue(earliest_due=100.2), {}, (None, 100.2 - 0.1 - 0.005), id="due soon"
        ),
        pytest.param(CLASSIC, Queue(earliest_due=100.1), {}, ("latest", 100.0), id="due too soon"),
        pytest.param(CLASSIC, Queue(), {"draining": True}, ("drain", 100.0), id="closing"),
        pytest.param(
            CLASSIC, Queue(), {"released": (100.0, "flush")}, ("flush", 100.0), id="flushed"
        ),
        pytest.param(
            CLASSIC, Queue(), {"released": (99.0, "flush")}, (None, 100.25), id="flushed before"
        ),
        pytest.param(
            DEFAULT,
            Queue(),
            {"idle": True, "held_until": 100.002},
            (None, 100.002),
            id="more rows are announced",
        ),
        pytest.param(
            BatchPolicy(max_wait_s=0.0), Queue(), {}, ("min", 100.0), id="no wait, no minimum"
        ),
        pytest.param(
            BatchPolicy(hard_timeout_s=inf, max_wait_s=inf, patience_s=50.0),
            Queue(earliest_due=inf),
            {},
            (None, inf),
            id="nothing but the end of a call",
        ),
        pytest.param(
            BatchPolicy(max_batch_rows=1), Queue(), {}, ("full", 100.0), id="calls of one"
        ),
    ],
)
def test_the_rule(
    policy: BatchPolicy, queue: Queue, state: dict[str, Any], expected: tuple[str | None, float]
) -> None:
    assert decision(policy, queue, **state) == expected


@given(
    rows=st.integers(1, 40),
    oldest=st.floats(0, 1e6),
    due_in=st.floats(0, 60),
    idle=st.booleans(),
    policy=st.sampled_from([CLASSIC, DEFAULT, BatchPolicy(max_wait_s=0.0)]),
)
def test_at_the_instant_that_is_slept_for_there_is_a_reason_to_send(
    rows: int, oldest: float, due_in: float, idle: bool, policy: BatchPolicy
) -> None:
    queue = Queue(rows=rows, oldest=oldest, earliest_due=oldest + due_in)
    reason, instant = decision(policy, queue, now=oldest, idle=idle)
    if reason is None:
        assert oldest < instant < inf
        reason, now = decision(policy, queue, now=instant, idle=idle)
        assert reason is not None
        assert now == instant


def test_a_policy_lists_everything_that_is_wrong_with_it_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BatchPolicy(
            min_batch_rows=40,
            max_wait_s=1.0,
            hard_timeout_s=0.5,
            max_queue_rows=0,
            max_in_flight=True,
            grace_s=nan,
            margin_s=-1.0,
            patience_s=inf,
            max_batch_bytes=2.5,  # type: ignore[arg-type]  # as from a file
        )
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "max_batch_bytes",
        "max_queue_rows",
        "max_in_flight",
        "grace_s",
        "margin_s",
        "patience_s",
        "min_batch_rows",
        "max_wait_s",
        "max_batch_rows",
    ]


def test_an_endless_hard_limit_needs_sending_when_idle() -> None:
    assert BatchPolicy(hard_timeout_s=inf).hard_timeout_s == inf
    with pytest.raises(
        ConfigError, match=r"^hard_timeout_s: must be finite without send_when_idle"
    ):
        BatchPolicy(hard_timeout_s=inf, send_when_idle=False)


def test_the_classic_policy_has_the_classic_numbers() -> None:
    assert (
        BatchPolicy(
            min_batch_rows=4,
            max_batch_rows=16,
            max_wait_s=0.05,
            hard_timeout_s=0.25,
            send_when_idle=False,
            max_queue_rows=160,
        )
        == CLASSIC
    )


def test_the_cost_model_believes_the_configured_estimate_until_eight_calls_were_measured() -> None:
    cost = CostModel(0.1)
    for number in range(1, 8):
        cost.learn(rows=number, seconds=2.0)
        assert cost.estimate(32) == cost.cautious(32) == 0.1
        assert cost.optimistic(32) == 0.0
        assert not cost.measured
    cost.learn(rows=8, seconds=2.0)
    assert cost.measured
    assert cost.estimate(32) == pytest.approx(2.0)


def test_the_cost_model_finds_a_fixed_part_and_a_part_per_row() -> None:
    cost = CostModel(0.1)
    for number in range(40):
        rows = 1 + number * 7 % 32
        cost.learn(rows=rows, seconds=0.025 + 0.004 * rows)
    assert cost.fixed_s == pytest.approx(0.025)
    assert cost.per_row_s == pytest.approx(0.004)
    assert cost.cautious(64) == pytest.approx(0.025 + 0.004 * 64)


def test_the_cost_model_forgets_how_slow_a_server_once_was() -> None:
    cost = CostModel(0.1)
    for seconds in [5.0] * 20 + [0.1] * 100:
        cost.learn(rows=8, seconds=seconds)
    assert cost.estimate(8) == pytest.approx(0.1, rel=0.4)


def test_calls_of_one_size_have_a_constant_cost() -> None:
    cost = CostModel(0.1)
    for _ in range(100):
        cost.learn(rows=3, seconds=0.03)
    assert cost.estimate(3) == pytest.approx(0.03)
    assert cost.estimate(30) == pytest.approx(0.03)


def test_the_guard_covers_the_scatter_of_calls() -> None:
    cost = CostModel(0.1)
    for number in range(100):
        cost.learn(rows=10, seconds=0.1 if number % 2 else 0.2)
    assert cost.estimate(10) == pytest.approx(0.15, abs=0.01)
    assert cost.cautious(10) >= 0.2
    assert cost.optimistic(10) <= 0.1


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0, 100)), min_size=8, max_size=60))
def test_no_estimate_is_ever_negative_or_nan(calls: list[tuple[int, float]]) -> None:
    cost = CostModel(0.1)
    for rows, seconds in calls:
        cost.learn(rows=rows, seconds=seconds)
    for rows in (1, 10, 1000):
        estimates = cost.optimistic(rows), cost.estimate(rows), cost.cautious(rows)
        assert all(estimate >= 0 and math.isfinite(estimate) for estimate in estimates)
        assert list(estimates) == sorted(estimates)
