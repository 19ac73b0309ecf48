"""The uploader: one report is delivered once, tried again within one limit, and then kept in the outbox.

What the target answers decides (`stationmaster.abc.UploadAnswer`):

    Accepted      done
    Rejected      done as well: the batch becomes a dead letter, the next may go on
    TryAgain      again after a growing, jittered pause, or after what `Retry-After` asks for; if that lies beyond the
                  limit, after half of the time that is left: a target may be better than its word
    Unavailable   the same: somebody must mend a token or a URL, meanwhile nothing is lost

When the limit strikes, or at once while the target is known to be down, the batch goes to the outbox: durable, that
is delivered too. If the outbox has no room the batch keeps its slot, so that consumption pauses by itself, and begins
anew when something has changed: nothing is dropped. A batch that the outbox holds already (from before a crash) is
not uploaded beside it.

Without an outbox a batch has no home when the limit strikes: `UploadFailedError`, nothing is committed.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.batch import DeadLetter
from stationmaster.blockage import Blockage
from stationmaster.errors import StoreError, UploadFailedError
from stationmaster.events import (
    UploadAttempted,
    UploadDone,
    UploadFailed,
    UploadKept,
    UploadRejected,
    UploadRetried,
)
from stationmaster.reports import encode_report

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from stationmaster.abc import Observer, Outbox, Sink, UploadAnswer
    from stationmaster.batch import BatchReport

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_SHORTEST_PAUSE_S = 0.05  # less than this is left: no further attempt would have the time


class Uploader:
    """Delivers reports to a sink; many tasks may use it at once."""

    def __init__(
        self,
        sink: Sink,
        *,
        limit_s: float,
        observer: Observer,
        outbox: Outbox | None = None,
        bury: Callable[[Sequence[DeadLetter]], Awaitable[None]] | None = None,
        jitter: random.Random | None = None,
    ) -> None:
        """Join the uploader to its neighbours.

        Args:
            sink: the target.
            limit_s: seconds for all attempts of one report together.
            observer: hears what becomes of each.
            outbox: takes what the target does not.
            bury: keeps what the target refuses for good, and returns when that is durable.
            jitter: a seeded source for tests.
        """
        self._sink = sink
        self.limit_s = limit_s
        self._observer = observer
        self._outbox = outbox
        self._bury = bury
        self._jitter = jitter or random.Random()  # noqa: S311 - spreads retries, guards nothing
        self._blockage = Blockage("outbox", observer)

    @property
    def is_blocked(self) -> bool:
        """Whether a batch waits because the outbox has no room."""
        return self._blockage.lasts

    async def deliver(self, report: BatchReport) -> None:
        """Deliver a report: return when it was accepted, lies in the outbox, or is a dead letter.

        Raises:
            UploadFailedError: the limit passed, and there is no outbox.

        If cancelled, it may or may not have arrived.
        """
        delivery = _Delivery(report)
        outbox = self._outbox
        if outbox is None:
            if not await self._upload(delivery):
                self._fail(delivery)
            return
        await trio.lowlevel.checkpoint()
        blocked = False
        try:
            while True:
                # Asked every time: a disk that failed may have it all the same.
                if outbox.holds(report.batch.batch_id):
                    delivery.last_answer = "it lay in the outbox already"
                    self._kept(delivery)
                    break
                if await self._upload(delivery):
                    break
                try:
                    await outbox.put(report, reason=delivery.last_answer)
                except StoreError as error:
                    if not blocked:
                        blocked = True
                        self._blockage.begin(error)
                    await outbox.wait_change()
                else:
                    self._kept(delivery)
                    break
        finally:
            if blocked:
                self._blockage.end()

    async def _upload(self, delivery: _Delivery) -> bool:
        """Try until the report is accepted or refused for good (True), or the time for trying is over (False)."""
        report = delivery.report
        limit = trio.current_time() + self.limit_s
        await trio.lowlevel.checkpoint()
        while not self._diverts():
            delivery.attempts += 1
            answer: UploadAnswer = TryAgain(reason="no answer before the limit")
            began = trio.current_time()
            with trio.move_on_at(limit):
                answer = await self._sink.upload(report)
            now = trio.current_time()
            self._observer.observe(
                UploadAttempted(
                    batch_id=report.batch.batch_id,
                    status=answer.status,
                    seconds=now - began,
                    from_outbox=False,
                )
            )
            if self._outbox is not None:
                self._outbox.note(answer)
            if isinstance(answer, Accepted):
                self._observer.observe(
                    UploadDone(
                        report=report,
                        attempts=delivery.attempts,
                        seconds=now - delivery.began,
                        sent_bytes=answer.sent_bytes,
                    )
                )
                return True
            if isinstance(answer, Rejected):
                if self._bury is not None:
                    await self._bury([_letter(report, answer)])
                self._observer.observe(
                    UploadRejected(report=report, status=answer.status, answer=answer.answer)
                )
                return True
            delivery.last_answer = answer.reason
            if self._diverts():
                return False  # at once: this failure was one too many
            remaining = limit - now
            pause = self._pause_s(answer, delivery.attempts)
            if pause >= remaining:
                pause = remaining / 2
            if pause < _SHORTEST_PAUSE_S:
                return False
            self._observer.observe(
                UploadRetried(
                    batch_id=report.batch.batch_id,
                    attempt=delivery.attempts,
                    reason=answer.reason,
                    retry_in_s=pause,
                    remaining_s=remaining - pause,
                )
            )
            await trio.sleep(pause)
        return False

    def _diverts(self) -> bool:
        return self._outbox is not None and self._outbox.is_diverting

    def _pause_s(self, answer: TryAgain | Unavailable, attempts: int) -> float:
        pause: float = min(_FIRST_PAUSE_S * 2 ** min(attempts - 1, 10), _LONGEST_PAUSE_S)
        pause *= self._jitter.uniform(0.5, 1.0)
        if isinstance(answer, TryAgain) and answer.retry_after_s is not None:
            return max(pause, answer.retry_after_s)
        return pause

    def _kept(self, delivery: _Delivery) -> None:
        self._observer.observe(
            UploadKept(
                batch_id=delivery.report.batch.batch_id,
                attempts=delivery.attempts,
                reason=delivery.last_answer,
            )
        )

    def _fail(self, delivery: _Delivery) -> None:
        batch_id, attempts = delivery.report.batch.batch_id, delivery.attempts
        reason = delivery.last_answer
        self._observer.observe(UploadFailed(batch_id=batch_id, attempts=attempts, reason=reason))
        raise UploadFailedError(
            batch_id=batch_id, attempts=attempts, limit_s=self.limit_s, last_answer=reason
        )


class _Delivery:
    """What was done for one report so far."""

    __slots__ = ("attempts", "began", "last_answer", "report")

    def __init__(self, report: BatchReport) -> None:
        self.report = report
        self.began = trio.current_time()
        self.attempts = 0
        self.last_answer = "the target is known to be down"


def _letter(report: BatchReport, answer: Rejected) -> DeadLetter:
    first = report.batch.ranges[0]
    return DeadLetter(
        reason="rejected-upload",
        detail=f"{answer.status}: {answer.answer}",
        topic=report.batch.topic,
        partition=first.partition,
        offset=first.first,
        value=encode_report(report),
        batch_id=report.batch.batch_id,
    )
