"""A seed stands for the whole plan."""

from __future__ import annotations

import random

import pytest

from tests.chaos.plan import BROKER, KINDS, MODEL, SERVICES, TARGET, draw_plan


@pytest.mark.parametrize("seed", range(20))
def test_the_same_seed_draws_the_same_plan(seed: int) -> None:
    first, again = (draw_plan(random.Random(seed), kinds=KINDS, seconds=300) for _ in range(2))
    assert first == again
    assert first != draw_plan(random.Random(seed + 1), kinds=KINDS, seconds=300)


@pytest.mark.parametrize("seed", range(20))
def test_in_a_plan_of_two_minutes_every_kind_occurs_and_all_ends_in_time(seed: int) -> None:
    plan = draw_plan(random.Random(seed), kinds=KINDS, seconds=120)
    assert {fault.kind for fault in plan} == set(KINDS)
    assert all(fault.at_s < 120 for fault in plan)
    assert all(fault.at_s + fault.lasts_s <= 121 for fault in plan)
    assert {name for fault in plan for name in fault.whom.split(" > ")} <= {
        *SERVICES,
        BROKER,
        MODEL,
        TARGET,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kinds_that_are_wanted_occur(kind: str) -> None:
    plan = draw_plan(random.Random(1), kinds=[kind], seconds=60)
    assert {fault.kind for fault in plan} == {kind}
    assert kind in plan[0].told()


def test_where_nothing_is_wanted_nothing_goes_wrong() -> None:
    assert draw_plan(random.Random(1), kinds=(), seconds=60) == []
