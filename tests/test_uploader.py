"""The uploader: what each answer of the target leads to, and the one limit over all attempts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable, UploadAnswer
from stationmaster.collector import Collector
from stationmaster.errors import UploadFailedError
from stationmaster.events import (
    UploadAttempted,
    UploadDone,
    UploadFailed,
    UploadRejected,
    UploadRetried,
)
from stationmaster.testing import Hang, RecordingObserver, RecordingSink, Slow
from stationmaster.uploader import Uploader
from tests.telemetry import NOON, batch

if TYPE_CHECKING:
    from stationmaster.batch import BatchReport

BUSY = TryAgain(reason="503 Service Unavailable")


def report(offset: int = 0) -> BatchReport:
    collector = Collector(
        batch("A", offset=offset),
        opened=trio.current_time(),
        quorum=1.0,
        report_bytes=100,
        observer=RecordingObserver(),
    )
    return collector.close(closed_at=NOON)


def uploader(sink: RecordingSink, observer: RecordingObserver, limit_s: float = 60.0) -> Uploader:
    return Uploader(sink, limit_s=limit_s, observer=observer, jitter=random.Random(7))


async def test_an_accepted_report_is_delivered_once(autojump_clock: MockClock) -> None:
    sink, observer, sent = RecordingSink([Slow(2)]), RecordingObserver(), report()
    await uploader(sink, observer).deliver(sent)
    assert sink.attempts == [sent]
    tried, done = observer.events
    assert tried == UploadAttempted(
        batch_id=sent.batch.batch_id, status=200, seconds=2.0, from_outbox=False
    )
    assert done == UploadDone(report=sent, attempts=1, seconds=2.0)


async def test_a_report_that_is_refused_for_good_is_delivered_as_well() -> None:
    sink, observer, sent = (
        RecordingSink([Rejected(status=422, answer="no")]),
        RecordingObserver(),
        report(),
    )
    await uploader(sink, observer).deliver(sent)
    assert len(sink.attempts) == 1
    assert [event.status for event in observer.of(UploadAttempted)] == [422]
    assert observer.of(UploadRejected) == [UploadRejected(report=sent, status=422, answer="no")]
    assert len(observer.events) == 2


@pytest.mark.parametrize("trouble", [BUSY, Unavailable(reason="401 Unauthorized")])
@pytest.mark.parametrize("end", [Accepted(), Rejected(status=400, answer="no")])
async def test_a_passing_trouble_and_a_refused_token_are_tried_again_until_an_answer_decides(
    autojump_clock: MockClock, trouble: UploadAnswer, end: UploadAnswer
) -> None:
    sink, observer, sent = RecordingSink([trouble] * 3 + [end]), RecordingObserver(), report()
    await uploader(sink, observer).deliver(sent)
    assert sink.attempts == [sent] * 4
    retries = observer.of(UploadRetried)
    assert [event.attempt for event in retries] == [1, 2, 3]
    assert {event.batch_id for event in retries} == {"air_0_0_0"}
    assert isinstance(trouble, TryAgain | Unavailable)
    assert {event.reason for event in retries} == {trouble.reason}
    assert trio.current_time() == pytest.approx(sum(event.retry_in_s for event in retries))
    assert len(observer.of(UploadDone)) + len(observer.of(UploadRejected)) == 1


async def test_pauses_grow_to_five_seconds_and_are_jittered_between_half_and_all(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver()
    with pytest.raises(UploadFailedError):
        await uploader(RecordingSink(otherwise=BUSY), observer, limit_s=600).deliver(report())
    # Near the limit pauses are halves of what is left.
    retries = [event for event in observer.of(UploadRetried) if event.remaining_s > 5]
    pauses = [event.retry_in_s for event in retries]
    full = [min(0.1 * 2**attempt, 5.0) for attempt in range(len(pauses))]
    assert len(pauses) > 100
    assert all(whole / 2 <= pause <= whole for pause, whole in zip(pauses, full, strict=True))
    assert len(set(pauses)) == len(pauses)
    assert min(pauses[10:]) < 3
    assert max(pauses) > 4.5


async def test_the_time_that_is_left_is_told_with_every_retry(autojump_clock: MockClock) -> None:
    observer = RecordingObserver()
    await uploader(RecordingSink([BUSY] * 5), observer, limit_s=60).deliver(report())
    waited = 0.0
    for event in observer.of(UploadRetried):
        waited += event.retry_in_s
        assert event.remaining_s == pytest.approx(60 - waited)


async def test_retry_after_is_honoured_when_it_is_longer_than_the_own_pause(
    autojump_clock: MockClock,
) -> None:
    answers = [
        TryAgain(reason="429", retry_after_s=20.0),
        TryAgain(reason="429", retry_after_s=0.0),
    ]
    observer = RecordingObserver()
    await uploader(RecordingSink(answers), observer).deliver(report())
    asked, own = (event.retry_in_s for event in observer.of(UploadRetried))
    assert asked == 20.0
    assert 0.1 <= own <= 0.2


async def test_retry_after_within_the_limit_is_honoured_however_much_of_it_that_takes(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver()
    answers = [
        TryAgain(reason="429", retry_after_s=40.0),
        TryAgain(reason="429", retry_after_s=19.0),
    ]
    await uploader(RecordingSink(answers), observer, limit_s=60).deliver(report())
    assert [event.retry_in_s for event in observer.of(UploadRetried)] == [40.0, 19.0]


async def test_retry_after_beyond_the_limit_is_tried_again_within_it(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver()
    later = TryAgain(reason="429 slow down", retry_after_s=300.0)
    await uploader(RecordingSink([later, later]), observer, limit_s=60).deliver(report())
    assert [event.retry_in_s for event in observer.of(UploadRetried)] == [30.0, 15.0]


async def test_a_target_that_always_asks_for_more_time_is_given_up_at_the_limit(
    autojump_clock: MockClock,
) -> None:
    sink = RecordingSink(otherwise=TryAgain(reason="429 slow down", retry_after_s=300.0))
    with pytest.raises(UploadFailedError):
        await uploader(sink, RecordingObserver(), limit_s=60).deliver(report())
    assert 59 < trio.current_time() <= 60
    assert len(sink.attempts) == 11


async def test_when_the_limit_strikes_the_error_has_the_facts(autojump_clock: MockClock) -> None:
    observer = RecordingObserver()
    sink = RecordingSink([BUSY, BUSY], otherwise=Unavailable(reason="404 Not Found"))
    with pytest.raises(UploadFailedError) as caught:
        await uploader(sink, observer, limit_s=10).deliver(report())
    error = caught.value
    assert error.batch_id == "air_0_0_0"
    assert error.attempts == len(sink.attempts) == len(observer.of(UploadRetried)) + 1
    assert error.limit_s == 10
    assert error.last_answer == "404 Not Found"
    assert "within 10 s" in str(error)
    assert "404 Not Found" in str(error)
    assert observer.events[-1] == UploadFailed(
        batch_id="air_0_0_0", attempts=error.attempts, reason="404 Not Found"
    )
    assert trio.current_time() <= 10


async def test_a_sink_that_hangs_is_cut_at_the_limit(autojump_clock: MockClock) -> None:
    observer = RecordingObserver()
    with pytest.raises(UploadFailedError) as caught:
        await uploader(RecordingSink([BUSY], otherwise=Hang()), observer, limit_s=10).deliver(
            report()
        )
    assert trio.current_time() == 10
    assert caught.value.attempts == 2
    assert caught.value.last_answer == "no answer before the limit"


@pytest.mark.parametrize("_round", range(5))
async def test_in_the_tick_of_the_limit_a_report_is_accepted_or_failed_never_both(
    autojump_clock: MockClock, _round: int
) -> None:
    observer, sink = RecordingObserver(), RecordingSink([Slow(10)])
    try:
        await uploader(sink, observer, limit_s=10).deliver(report())
    except UploadFailedError:
        assert not sink.reports
    assert len(observer.of(UploadDone)) == len(sink.reports)
    assert len(observer.of(UploadFailed)) == 1 - len(sink.reports)


async def test_a_report_in_trouble_holds_up_no_other(autojump_clock: MockClock) -> None:
    sink, observer = RecordingSink([Hang()]), RecordingObserver()
    shared = uploader(sink, observer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.deliver, report(0))
        await wait_all_tasks_blocked()
        for offset in range(1, 5):
            nursery.start_soon(shared.deliver, report(offset))
        await trio.sleep(1)
        assert set(sink.reports) == {f"air_0_{offset}_0" for offset in range(1, 5)}
        nursery.cancel_scope.cancel()


async def test_a_bug_of_the_sink_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        await uploader(RecordingSink([ZeroDivisionError()]), RecordingObserver()).deliver(report())


@pytest.mark.parametrize("step", [Hang(), BUSY])
async def test_a_cancelled_delivery_ends_at_once_in_an_attempt_or_between_two(
    autojump_clock: MockClock, step: Hang | TryAgain
) -> None:
    observer = RecordingObserver()
    with trio.move_on_after(0.01) as scope:
        await uploader(RecordingSink(otherwise=step), observer).deliver(report())
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(0.01)
    assert not observer.of(UploadFailed)


async def test_uploaders_spread_their_retries_without_being_told_to(
    autojump_clock: MockClock,
) -> None:
    pauses = set()
    for _ in range(5):
        observer = RecordingObserver()
        await Uploader(RecordingSink([BUSY]), limit_s=60, observer=observer).deliver(report())
        pauses.add(observer.of(UploadRetried)[0].retry_in_s)
    assert len(pauses) > 1


async def test_an_upload_says_how_many_bytes_went_out() -> None:
    sink, observer = RecordingSink([BUSY, Accepted(sent_bytes=1234)]), RecordingObserver()
    await uploader(sink, observer).deliver(report())
    assert [event.sent_bytes for event in observer.of(UploadDone)] == [1234]
