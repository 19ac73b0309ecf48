"""What a station's past says of its next job."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stationmaster.stations.health import StationHealth


def known(mean_s: float) -> StationHealth:
    health = StationHealth()
    health.measure(mean_s)
    return health


def test_the_mean_begins_with_the_first_service_time_and_follows_the_last_ones() -> None:
    health = known(1.0)
    assert health.mean_s == 1.0
    health.measure(2.0)
    assert health.mean_s == pytest.approx(1.2)
    for _ in range(30):
        health.measure(2.0)
    assert health.mean_s == pytest.approx(2.0, abs=0.01)


def test_a_job_with_twice_the_usual_time_had_a_fair_chance_and_teaches_nothing_else() -> None:
    health = known(0.1)
    assert health.is_strike(0.2, fresh=False)
    assert health.mean_s == 0.1


def test_a_job_with_little_more_than_the_usual_time_says_that_the_station_became_slower() -> None:
    health = known(0.1)
    assert not health.is_strike(0.19, fresh=False)
    assert health.mean_s == pytest.approx(0.285)


def test_a_moment_in_which_the_loop_was_busy_is_no_strike_of_a_fast_station() -> None:
    assert not known(0.001).is_strike(0.049, fresh=False)
    assert known(0.001).is_strike(0.05, fresh=False)


def test_of_an_unknown_station_only_a_fresh_job_is_a_strike() -> None:
    health = StationHealth()
    assert health.is_strike(5.0, fresh=True)
    assert health.mean_s is None
    assert not health.is_strike(0.1, fresh=False)
    assert health.mean_s == pytest.approx(0.15)


def test_a_slow_station_that_misses_with_a_fresh_job_gets_a_strike_and_a_longer_mean() -> None:
    health = known(3.0)
    assert health.is_strike(5.0, fresh=True)
    assert health.mean_s == 7.5


def test_an_answer_makes_it_healthy_and_tells_how_long_its_breaker_was_open() -> None:
    health = StationHealth()
    assert health.recover(1.0) is None
    breaker = health.trouble(failures=2, probe_s=10.0)
    assert health.trouble(failures=2, probe_s=10.0) is breaker
    assert not breaker.fail(1.0, is_probe=False)
    assert health.recover(2.0) is None
    assert health.breaker is None
    breaker = health.trouble(failures=1, probe_s=10.0)
    assert breaker.fail(3.0, is_probe=False)
    assert health.recover(7.5) == 4.5
    assert health.breaker is None


def test_a_probe_that_says_nothing_lets_the_next_job_be_the_probe() -> None:
    health = StationHealth()
    health.give_up_probe()  # healthy: nothing to give up
    breaker = health.trouble(failures=1, probe_s=10.0)
    breaker.fail(0.0, is_probe=False)
    assert breaker.begin()
    assert breaker.next_at == float("inf")
    health.give_up_probe()
    assert breaker.next_at == 10.0


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("answer"), st.floats(0.0, 5.0)),
            st.tuples(st.just("cut"), st.floats(0.001, 5.0)),
        ),
        max_size=60,
    )
)
def test_the_mean_stays_within_what_one_guess_may_add_to_the_longest_job(
    past: list[tuple[str, float]],
) -> None:
    health = StationHealth()
    for what, seconds in past:
        if what == "answer":
            health.measure(seconds)
        else:
            health.is_strike(seconds, fresh=seconds >= 2.5)
        assert health.mean_s is None or 0.0 <= health.mean_s <= 7.5
