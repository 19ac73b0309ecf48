from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from stationmaster.breaker import Breaker


def breaker(failures: int = 3, probe_s: float = 2.0) -> Breaker:
    return Breaker(failures=failures, probe_s=probe_s)


def opened(at: float = 10.0) -> Breaker:
    one = breaker(failures=1)
    assert one.fail(at, is_probe=one.begin())
    return one


def test_it_opens_with_the_last_of_the_failures_in_a_row() -> None:
    one = breaker(failures=3)
    told = [one.fail(instant, is_probe=one.begin()) for instant in (1.0, 2.0, 3.0)]
    assert told == [False, False, True]
    assert (one.state(3.0), one.next_at, one.refused) == ("open", 5.0, False)


def test_a_success_between_failures_begins_the_row_anew() -> None:
    one = breaker(failures=2)
    assert not one.fail(1.0, is_probe=False)
    assert one.succeed(2.0) is None
    assert not one.fail(3.0, is_probe=False)
    assert (one.state(3.0), one.next_at, one.in_a_row) == ("closed", -inf, 1)


def test_one_refusal_opens_it() -> None:
    one = breaker(failures=3)
    assert one.fail(1.0, is_probe=False, refused=True)
    assert (one.state(1.0), one.refused) == ("open", True)


def test_it_is_half_open_from_its_instant_on_and_one_probe_goes() -> None:
    one = opened(10.0)
    assert (one.state(11.999), one.state(12.0)) == ("open", "half-open")
    assert one.next_at == 12.0
    assert one.begin()
    assert one.next_at == inf


def test_a_probe_that_succeeds_closes_it_and_says_how_long_it_was_open() -> None:
    one = opened(10.0)
    one.begin()
    assert one.succeed(13.0) == 3.0
    assert (one.state(13.0), one.next_at, one.in_a_row, one.failed_probes) == ("closed", -inf, 0, 0)


def test_a_probe_that_fails_opens_it_for_as_long_again_without_news() -> None:
    one = opened(10.0)
    assert not one.fail(13.0, is_probe=one.begin())
    assert (one.state(14.0), one.next_at, one.failed_probes) == ("open", 15.0, 1)
    assert not one.fail(16.0, is_probe=one.begin())
    assert (one.state(17.0), one.next_at, one.failed_probes) == ("open", 18.0, 2)
    one.begin()
    assert one.succeed(19.0) == 9.0


def test_a_probe_that_is_refused_makes_it_a_refusal_and_the_other_way_round() -> None:
    one = opened(10.0)
    one.fail(13.0, is_probe=one.begin(), refused=True)
    assert one.refused
    one.fail(16.0, is_probe=one.begin())
    assert not one.refused


def test_a_probe_that_is_given_up_lets_the_next_call_be_the_probe() -> None:
    one = opened(10.0)
    one.give_up(is_probe=one.begin())
    assert (one.state(12.5), one.next_at, one.failed_probes) == ("half-open", 12.0, 0)
    assert one.begin()


def test_an_older_call_can_close_it_but_never_prolongs_it() -> None:
    one = opened(10.0)
    assert not one.fail(11.0, is_probe=False, refused=True)
    assert (one.next_at, one.refused) == (12.0, False)
    one.begin()
    one.give_up(is_probe=False)
    assert one.next_at == inf
    assert one.succeed(12.5) == 2.5
    assert one.state(12.5) == "closed"


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.sampled_from(["fail", "refuse", "succeed", "give up"])),
        max_size=40,
    ),
    st.integers(1, 4),
)
def test_whatever_happens_a_call_may_go_again_within_its_time(
    steps: list[tuple[float, str]], failures: int
) -> None:
    one = breaker(failures=failures, probe_s=2.0)
    now = 0.0
    row = 0
    for pause_s, end in steps:
        now += pause_s
        if now < one.next_at:
            assert one.state(now) == "open"
            assert one.next_at - now <= 2.0 + 1e-9
            now = one.next_at
        was_closed = one.state(now) == "closed"
        is_probe = one.begin()
        assert is_probe is not was_closed
        match end:
            case "succeed":
                assert (one.succeed(now) is None) is was_closed
                row = 0
            case "give up":
                one.give_up(is_probe=is_probe)
            case _:
                row += 1
                opens = one.fail(now, is_probe=is_probe, refused=end == "refuse")
                assert opens == (was_closed and (end == "refuse" or row >= failures))
        assert one.next_at < inf
