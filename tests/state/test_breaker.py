from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.events import UploadsDiverted, UploadsResumed
from stationmaster.state.breaker import Backoff, Breaker
from tests.state.targets import DOWN

if TYPE_CHECKING:
    from stationmaster.abc import UploadAnswer


class Unjittered(Random):
    """Always the upper end."""

    def random(self) -> float:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return 1.0


def breaker(*, failures: int = 3, max_s: float = 30.0) -> Breaker:
    return Breaker(failures=failures, backoff=Backoff(max_s=max_s, jitter=Unjittered()))


def opened() -> Breaker:
    opened = breaker(failures=1)
    assert opened.note(DOWN, now=100.0) == UploadsDiverted(reason="500: down")
    return opened


def test_pauses_double_up_to_their_limit() -> None:
    backoff = Backoff(max_s=30.0, jitter=Unjittered())
    pauses = [backoff.pause_s(DOWN, attempt=attempt) for attempt in (1, 2, 3, 6, 7, 8, 10**6)]
    assert pauses == [0.5, 1.0, 2.0, 16.0, 30.0, 30.0, 30.0]


def test_pauses_are_jittered_between_half_and_whole() -> None:
    backoff = Backoff(max_s=30.0, jitter=Random(1))
    pauses = {backoff.pause_s(DOWN, attempt=9) for _ in range(100)}
    assert len(pauses) > 90
    assert 15.0 <= min(pauses) < 16.0
    assert 29.0 < max(pauses) <= 30.0


def test_a_target_may_ask_for_a_longer_pause_but_not_for_more_than_the_limit() -> None:
    backoff = Backoff(max_s=30.0, jitter=Unjittered())
    assert backoff.pause_s(TryAgain(reason="busy", retry_after_s=7.0), attempt=1) == 7.0
    assert backoff.pause_s(TryAgain(reason="busy", retry_after_s=0.0), attempt=1) == 0.5
    assert backoff.pause_s(TryAgain(reason="busy", retry_after_s=9e9), attempt=1) == 30.0
    assert backoff.pause_s(Unavailable(reason="401"), attempt=1) == 0.5


@pytest.mark.parametrize("failure", [DOWN, Unavailable(reason="401")])
def test_it_opens_at_the_last_of_so_many_failures_in_a_row(
    failure: TryAgain | Unavailable,
) -> None:
    closed = breaker(failures=3)
    assert closed.note(failure, now=1.0) is None
    assert closed.note(failure, now=2.0) is None
    assert not closed.is_open
    refused = isinstance(failure, Unavailable)
    expected = UploadsDiverted(reason=failure.reason, refused=refused)
    assert closed.note(failure, now=3.0) == expected
    assert (closed.is_open, closed.probe_at) == (True, 3.5)


@pytest.mark.parametrize("answer", [Accepted(), Rejected(status=400, answer="")])
def test_an_answer_that_shows_life_begins_the_row_anew_and_closes(
    answer: UploadAnswer,
) -> None:
    some = breaker(failures=2)
    some.note(DOWN, now=1.0)
    assert some.note(answer, now=2.0) is None
    assert some.note(DOWN, now=3.0) is None
    some.note(DOWN, now=4.0)
    assert some.note(answer, now=10.0) == UploadsResumed(diverted_s=6.0)
    assert not some.is_open
    assert some.note(DOWN, now=11.0) is None


def test_late_failures_of_direct_uploads_do_not_prolong_it() -> None:
    down = opened()
    assert down.note(DOWN, now=100.4) is None
    assert down.probe_at == 100.5


def test_every_failed_probe_doubles_the_pause_and_says_nothing_new() -> None:
    down = opened()
    assert down.note(DOWN, now=101.0, is_probe=True) is None
    assert down.probe_at == 102.0
    assert down.note(DOWN, now=102.0, is_probe=True) is None
    assert down.probe_at == 104.0


def test_on_trial_one_failure_opens_it_again_and_the_pauses_go_on_growing() -> None:
    down = breaker(failures=3)
    for _ in range(3):
        down.note(DOWN, now=100.0)
    down.try_directly()
    assert not down.is_open
    assert down.note(DOWN, now=101.0) is None, "it was said when the target went"
    assert (down.is_open, down.probe_at) == (True, 102.0)


def test_on_trial_the_first_success_ends_the_outage() -> None:
    down = opened()
    down.try_directly()
    assert down.note(Accepted(), now=160.0) == UploadsResumed(diverted_s=60.0)


def test_an_operator_brings_the_next_probe_forward_and_never_back() -> None:
    down = opened()
    down.probe_now(100.2)
    down.probe_now(100.3)
    assert down.probe_at == 100.2
