"""Several embedders as one, on a virtual clock: what is asked when, and what becomes of it."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batcher import BatchPolicy, open_batcher
from stationmaster.embeddings import Endpoints
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.events import CallRerouted, EndpointClosed, EndpointOpened, EndpointPaused
from stationmaster.testing import RecordingObserver, ScriptedEmbedder
from stationmaster.testing.embedder import hang

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio.testing import MockClock

    from stationmaster.abc import Vector
    from stationmaster.embeddings import EndpointStatistics

DOWN = EmbedderUnavailableError("connection refused")
BUSY = EmbedderBusyError("wait", retry_after_s=2.0)
REFUSED = EmbedderRefusedError("no such key")
BROKEN = ProtocolError("<html>")
TEXTS = ("a", "b")


@attrs.define(eq=False)
class Setting:
    """Endpoints over scripted embedders, and what they told."""

    endpoints: Endpoints
    models: list[ScriptedEmbedder]
    observer: RecordingObserver

    def asked(self) -> list[int]:
        """Return how many calls each one got."""
        return [len(model.calls) for model in self.models]

    def look(self, number: int = 0) -> EndpointStatistics:
        return self.endpoints.statistics()[number]

    async def embed(self, *texts: str) -> None:
        texts = texts or TEXTS
        vectors = await self.endpoints.embed(texts)
        assert vectors == [self.models[0].vector(text) for text in texts]

    async def fails(self) -> EmbedderError:
        with pytest.raises(EmbedderError) as caught:
            await self.endpoints.embed(TEXTS)
        return caught.value


def setting(*models: ScriptedEmbedder, **options: Any) -> Setting:
    observer = RecordingObserver()
    endpoints = Endpoints(
        dict(zip("ABCDEFGH", models, strict=False)),
        observer=observer,
        jitter=Random(7),
        **options,
    )
    return Setting(endpoints, list(models), observer)


def model(*script: Any, seconds: float = 1.0, **options: Any) -> ScriptedEmbedder:
    return ScriptedEmbedder(script=script, seconds_per_call=seconds, **options)


# ----------------------------------------------------------------------------------------- choosing


async def test_calls_go_to_the_least_busy_endpoint(autojump_clock: MockClock) -> None:
    s = setting(model(), model(), model())
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(s.embed)
            await wait_all_tasks_blocked()
        assert [one.in_flight for one in s.endpoints.statistics()] == [2, 2, 2]
    assert [one.in_flight for one in s.endpoints.statistics()] == [0, 0, 0]


async def test_among_equally_busy_ones_each_is_tried_then_the_fastest_is_asked(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(seconds=1.0), model(seconds=0.1), model(seconds=0.5))
    for _ in range(9):
        await s.embed()
    assert s.asked() == [1, 7, 1]
    assert s.look(1).seconds == pytest.approx(0.1)


async def test_a_slow_endpoint_is_asked_again_after_a_while_in_case_it_became_fast(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(seconds=1.0), model(seconds=0.4))
    await s.embed()
    await s.embed()
    s.models[0].seconds_per_call = 0.1
    asked = []
    for _ in range(20):
        await trio.sleep(5.0)
        await s.embed()
        asked.append(s.asked()[0])
    assert asked[4] == 1
    assert asked[-1] > 5


async def test_a_call_waits_while_every_endpoint_has_all_its_calls(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(seconds=1.0), model(seconds=3.0), max_in_flight=2)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(s.embed)
    assert s.asked() == [3, 2]
    assert [one.most_in_flight for one in s.models] == [2, 2]
    assert s.models[0].began[2] == s.models[0].began[0] + 1.0


async def test_a_waiting_call_can_be_cancelled_and_harms_nobody(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(), max_in_flight=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(s.embed)
        await wait_all_tasks_blocked()
        with trio.move_on_after(0.5) as scope:
            await s.embed()
        assert scope.cancelled_caught
    await s.embed()
    assert s.asked() == [2]


async def test_a_cancelled_call_keeps_its_place_until_it_should_be_over(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(seconds=1.0), max_in_flight=1)
    await s.embed()
    began = trio.current_time()
    with trio.move_on_after(0.25):
        await s.embed()
    assert (s.look().in_flight, s.look().abandoned) == (0, 1)
    await s.embed()
    assert s.models[0].began[2] == began + 1.0
    assert s.look().abandoned == 0


async def test_a_cancelled_call_of_unknown_length_keeps_no_place(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(seconds=1.0), max_in_flight=1)
    with trio.move_on_after(0.25):
        await s.embed()
    assert s.look().abandoned == 0
    await s.embed()


# ---------------------------------------------------------------------------------- going elsewhere


@pytest.mark.parametrize("error", [DOWN, BUSY, REFUSED, BROKEN], ids=lambda one: type(one).__name__)
async def test_a_failed_call_is_answered_by_another_endpoint(
    autojump_clock: MockClock, error: EmbedderError
) -> None:
    s = setting(model(error), model())
    await s.embed()
    assert s.asked() == [1, 1]
    assert s.observer.of(CallRerouted) == [CallRerouted(rows=2, endpoint="A", to="B", error=error)]
    assert (s.look(0).failures, s.look(0).last_trouble) == (1, str(error))
    assert s.look(1).failures == 0


async def test_refused_texts_are_refused_at_once_and_show_that_the_endpoint_works(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(DOWN, DOWN, refuses=lambda text: text == "bad"), failures=3)
    await s.fails()
    await s.fails()
    with pytest.raises(RowRejectedError, match="bad"):
        await s.endpoints.embed(["bad"])
    assert (s.look().failures, s.look().failures_in_a_row) == (2, 0)


async def test_every_endpoint_is_asked_once_and_the_most_hopeful_error_is_raised(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(BROKEN), model(DOWN), model(REFUSED))
    assert await s.fails() is DOWN
    assert s.asked() == [1, 1, 1]


async def test_a_call_whose_every_endpoint_fails_in_a_passing_way_is_unavailable(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(BUSY), model(DOWN))
    assert await s.fails() is DOWN


async def test_an_error_of_a_kind_of_its_own_goes_elsewhere_too_and_is_raised_at_last(
    autojump_clock: MockClock,
) -> None:
    odd = EmbedderError("odd")
    s = setting(model(odd), model(odd))
    assert await s.fails() is odd
    assert s.asked() == [1, 1]


async def test_a_broken_answer_is_asked_for_elsewhere_once_only(autojump_clock: MockClock) -> None:
    s = setting(model(BROKEN), model(BROKEN), model())
    assert await s.fails() is BROKEN
    assert s.asked() == [1, 1, 0]


async def test_a_broken_answer_stays_one_although_it_opens_the_last_breaker(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(BROKEN), failures=1)
    assert await s.fails() is BROKEN
    assert s.look().state == "open"
    assert isinstance(await s.fails(), EmbedderBusyError)


async def test_a_call_goes_elsewhere_only_if_it_can_be_answered_in_time(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(None, DOWN, None, DOWN, seconds=0.5), model(seconds=2.0))
    await s.embed()
    await s.embed()  # both are measured now
    with trio.fail_after(2.0):
        assert await s.fails() is DOWN
    assert s.asked() == [2, 1]
    await s.embed()
    with trio.fail_after(3.0):
        await s.embed()
    assert s.asked() == [4, 2]


async def test_a_wrong_count_is_a_broken_answer(autojump_clock: MockClock) -> None:
    async def short(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(0.0)
        return [[1.0, 2.0]]

    s = setting(model(short))
    with pytest.raises(ProtocolError, match="A: 1 vectors for 2 texts"):
        await s.endpoints.embed(TEXTS)
    assert s.look().failures == 1


async def test_all_endpoints_have_the_dimension_of_the_first_answer(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(seconds=1.0, dimensions=4), model(seconds=0.1, dimensions=5))
    await s.embed()
    assert s.endpoints.dimensions == 4
    await s.embed()
    assert s.asked() == [2, 1]
    assert s.look(1).last_trouble == "B: a vector has 5 numbers instead of 4"
    s = setting(model(dimensions=4), dimensions=3)
    with pytest.raises(ProtocolError, match="4 numbers instead of 3"):
        await s.endpoints.embed(TEXTS)


async def test_what_is_no_error_of_an_embedder_is_a_bug_and_says_nothing_of_the_endpoint(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(TypeError("odd")), model(), failures=1)
    with pytest.raises(TypeError, match="odd"):
        await s.endpoints.embed(TEXTS)
    assert (s.asked(), s.look().failures, s.look().in_flight) == ([1, 0], 0, 0)


# --------------------------------------------------------------------------------- leaving endpoints alone


async def test_a_busy_endpoint_is_left_alone_for_as_long_as_it_asks(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(BUSY, seconds=0.1), model(seconds=1.0))
    await s.embed()
    await s.embed()
    assert s.asked() == [1, 2]
    assert s.observer.of(EndpointPaused) == [
        EndpointPaused(endpoint="A", pause_s=2.0, reason="wait")
    ]
    await trio.sleep(1.0)
    await s.embed()
    assert s.asked() == [2, 2]


async def test_a_wild_wish_for_a_pause_is_not_believed_for_longer_than_half_a_minute(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(EmbedderBusyError("wait", retry_after_s=3600.0)), model())
    await s.embed()
    assert [event.pause_s for event in s.observer.of(EndpointPaused)] == [30.0]


async def test_a_busy_endpoint_that_names_no_time_is_left_alone_longer_and_longer(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(*[EmbedderBusyError("wait")] * 12, None, EmbedderBusyError("wait")))
    for _ in range(12):
        error = await s.fails()
        assert isinstance(error, EmbedderBusyError)
        assert error.retry_after_s is not None
        await trio.sleep(error.retry_after_s)
    await s.embed()
    await s.fails()
    pauses = [event.pause_s for event in s.observer.of(EndpointPaused)]
    longest = [min(0.1 * 2**number, 30.0) for number in range(12)] + [0.1]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    assert len(set(pauses)) == len(pauses)


async def test_if_all_are_shut_the_caller_hears_when_the_first_may_be_asked(
    autojump_clock: MockClock,
) -> None:
    later = EmbedderBusyError("much later", retry_after_s=9.0)
    s = setting(model(later, seconds=0.0), model(BUSY, seconds=0.5), model(REFUSED, seconds=0.0))
    error = await s.fails()
    assert isinstance(error, EmbedderBusyError)
    assert error.retry_after_s == 2.0
    assert error.__cause__ is not None
    await trio.sleep(0.5)
    error = await s.fails()
    assert isinstance(error, EmbedderBusyError)
    assert error.retry_after_s == 1.5
    assert str(error) == (
        "no model server may be asked now: A (paused: much later), B (paused: wait), C (open: no such key)"
    )
    assert s.asked() == [1, 1, 1]
    await trio.sleep(error.retry_after_s)
    await s.embed()


async def test_if_a_way_opens_while_the_error_is_made_the_caller_may_come_again_at_once(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(DOWN), failures=1, probe_s=1.0)
    await s.fails()
    autojump_clock.jump(1.0)  # as if that happened after the choice: real clocks never stand still
    error = s.endpoints._verdict([])
    assert isinstance(error, EmbedderBusyError)
    assert error.retry_after_s == 0.0


async def test_a_breaker_opens_after_its_failures_and_a_probe_that_works_closes_it(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(DOWN, DOWN, DOWN), failures=2, probe_s=5.0)
    assert await s.fails() is DOWN
    error = await s.fails()
    assert isinstance(error, EmbedderBusyError)
    assert (error.retry_after_s, s.look().state, s.look().open_s) == (5.0, "open", 5.0)
    told = EndpointOpened(endpoint="A", failures=2, reason="connection refused")
    assert s.observer.events == [told]
    await s.fails()
    assert s.asked() == [2]
    await trio.sleep(5.0)
    assert s.look().state == "half-open"
    error = await s.fails()
    assert isinstance(error, EmbedderBusyError)
    assert (s.asked(), s.look().state) == ([3], "open")
    await trio.sleep(5.0)
    await s.embed()
    assert (s.look().state, s.look().failures_in_a_row) == ("closed", 0)
    assert s.observer.events == [told, EndpointClosed(endpoint="A", open_s=12.0)]


async def test_a_refusal_opens_at_once_and_fails_fast_while_all_refuse(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(REFUSED, REFUSED), probe_s=5.0)
    assert await s.fails() is REFUSED
    for _ in range(3):
        with pytest.raises(EmbedderRefusedError, match=r"may be asked now.*no such key"):
            await s.endpoints.embed(TEXTS)
    assert s.asked() == [1]
    await trio.sleep(5.0)
    assert await s.fails() is REFUSED
    await trio.sleep(5.0)
    await s.embed()


async def test_an_endpoint_that_hangs_is_left_alone_although_callers_leave_before_its_time_out(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(None, *[hang] * 3, seconds=0.5), model(seconds=1.0), failures=2, probe_s=60.0)
    await s.embed()
    await s.embed()
    for wait_s in (1.9, 2.0, 2.0):
        assert s.look().state == "closed"
        with trio.move_on_after(wait_s):
            await s.embed()
    assert (s.asked(), s.look().state, s.look().failures) == ([4, 1], "open", 2)
    assert s.look().last_trouble == "A was given up after 2 s without an answer"
    assert len(s.observer.of(EndpointOpened)) == 1
    await s.embed()
    assert s.asked() == [4, 2]


async def test_a_probe_that_hangs_until_its_caller_leaves_has_failed(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(DOWN, hang), failures=1, probe_s=5.0)
    await s.fails()
    await trio.sleep(5.0)
    with trio.move_on_after(2.0):
        await s.embed()
    assert (s.look().state, s.look().open_s) == ("open", 5.0)


async def test_one_call_probes_and_the_others_wait_for_its_outcome(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(DOWN, DOWN), failures=1, probe_s=5.0)
    await s.fails()
    await trio.sleep(5.0)
    errors: list[EmbedderError] = []

    async def fail() -> None:
        errors.append(await s.fails())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(fail)
        await wait_all_tasks_blocked()
        assert (s.asked(), s.look().state, s.look().open_s) == ([2], "half-open", 0.0)
    assert s.asked() == [2]
    assert all(isinstance(error, EmbedderBusyError) for error in errors)
    await trio.sleep(5.0)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(s.embed)
        await wait_all_tasks_blocked()
        assert s.asked() == [3]
    assert s.asked() == [5]


async def test_a_probe_that_is_cancelled_lets_another_call_probe(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(DOWN, hang), failures=1, probe_s=5.0)
    await s.fails()
    await trio.sleep(5.0)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.25):
            nursery.start_soon(s.endpoints.embed, TEXTS)
            await wait_all_tasks_blocked()
            await s.embed()
        assert s.asked() == [2]
        nursery.cancel_scope.cancel()
    await s.embed()
    assert s.asked() == [3]


async def test_a_probe_that_is_answered_busy_has_to_come_again(autojump_clock: MockClock) -> None:
    s = setting(model(DOWN, BUSY, DOWN), failures=1, probe_s=5.0)
    await s.fails()
    await trio.sleep(5.0)
    await s.fails()
    assert (s.look().state, s.look().paused_s) == ("half-open", 2.0)
    await trio.sleep(2.0)
    await s.fails()
    assert s.look().state == "open"


async def test_a_probe_goes_first_and_must_not_hold_up_its_texts(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(None, DOWN, hang, hang, seconds=0.5), model(seconds=1.0), failures=1)
    await s.embed()
    await s.embed()
    with trio.fail_after(2.0):
        await s.embed()  # fails at A, opens it, goes to B
    took = []
    for _ in range(3):
        await trio.sleep(20.0)
        began = trio.current_time()
        await s.embed()
        took.append(trio.current_time() - began)
    # four times the usual half second and the answer of the other; then twice that; then it works
    assert took == [3.0, 5.0, 0.5]
    assert s.look(0).last_trouble == "A was tried again and did not answer within 4 s"
    assert s.look(0).state == "closed"


async def test_an_endpoint_that_must_prove_itself_is_asked_before_a_faster_one(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(None, DOWN, seconds=2.0), model(seconds=0.1), failures=1)
    await s.embed()
    await s.embed()
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(s.embed)
    assert (s.asked(), s.look(0).state) == ([2, 3], "open")
    await s.embed()
    await trio.sleep(1.0)
    await s.embed()
    assert (s.asked(), s.look(0).state) == ([3, 4], "closed")
    await s.embed()
    assert s.asked() == [3, 5]


async def test_a_probe_has_all_the_time_if_nobody_else_could_answer(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(DOWN, seconds=50.0), failures=1)
    await s.fails()
    await trio.sleep(1.0)
    await s.embed()
    assert s.look().seconds == 50.0


async def test_a_late_answer_of_an_older_call_closes_the_breaker(
    autojump_clock: MockClock,
) -> None:
    async def slow(texts: Sequence[str]) -> Sequence[Vector]:
        await trio.sleep(3.0)
        return [model().vector(text) for text in texts]

    s = setting(model(slow, DOWN), failures=1, probe_s=60.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(s.embed)
        await wait_all_tasks_blocked()
        await s.fails()
        assert s.look().state == "open"
    assert s.look().state == "closed"


async def test_a_call_that_waits_for_a_slot_takes_an_endpoint_whose_pause_ends(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(BUSY, seconds=0.5), model(seconds=60.0), max_in_flight=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(s.embed)
        await wait_all_tasks_blocked()
        await trio.sleep(0.75)
        assert s.asked() == [1, 1]
        began = trio.current_time()
        await s.embed()
        assert trio.current_time() - began == 2.25
        nursery.cancel_scope.cancel()


# ------------------------------------------------------------------------------- behind the batcher


async def test_behind_the_batcher_rows_stay_queued_until_an_endpoint_is_back(
    autojump_clock: MockClock,
) -> None:
    s = setting(model(*[DOWN] * 4, seconds=0.01), failures=2, probe_s=3.0)
    got: list[Vector] = []

    async def ask(text: str) -> None:
        got.append(await batcher.embed(text))

    async with open_batcher(s.endpoints, policy=BatchPolicy(max_in_flight=4)) as batcher:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(ask, f"text {number}")
    assert len(got) == 100
    assert trio.current_time() < 12.0
    assert s.look().state == "closed"


async def test_behind_the_batcher_a_pause_of_one_does_not_hold_up_the_other(
    autojump_clock: MockClock,
) -> None:
    long = EmbedderBusyError("wait", retry_after_s=60.0)
    s = setting(model(long, seconds=0.01), model(seconds=0.01))
    async with open_batcher(s.endpoints, policy=BatchPolicy(max_in_flight=8)) as batcher:
        with trio.fail_after(5.0):
            vectors = await batcher.embed_many([f"text {number}" for number in range(500)])
    assert len(vectors) == 500
    assert s.asked()[0] < 8  # those that were under way, and what followed them in the same instant


# ---------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embedders": {}}, "at least one embedder"),
        ({"max_in_flight": 0}, "max_in_flight and failures must be at least 1, not 0 and 3"),
        ({"failures": 0}, "max_in_flight and failures must be at least 1, not 4 and 0"),
        ({"probe_s": 0.0}, "positive number of seconds, not 0.0"),
        ({"probe_s": float("nan")}, "positive number of seconds, not nan"),
        ({"probe_s": float("inf")}, "positive number of seconds, not inf"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    arguments = {"embedders": {"A": model()}, **options}
    with pytest.raises(ValueError, match=words):
        Endpoints(arguments.pop("embedders"), **arguments)
