"""The uploader: one report is delivered once, tried again within one limit for all attempts together.

What the target answers decides (`stationmaster.abc.UploadAnswer`):

    Accepted      done
    Rejected      done as well: this batch is refused for good, the next may go on
    TryAgain      again after a growing, jittered pause, or after what `Retry-After` asks for; if that lies beyond the
                  limit, after half of the time that is left: a target may be better than its word
    Unavailable   the same: somebody must mend a token or a URL, meanwhile nothing is lost

When the limit strikes the batch has no home: `UploadFailedError`, nothing is committed.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.errors import UploadFailedError
from stationmaster.events import UploadDone, UploadFailed, UploadRejected, UploadRetried

if TYPE_CHECKING:
    from stationmaster.abc import Observer, Sink, UploadAnswer
    from stationmaster.batch import BatchReport

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_SHORTEST_PAUSE_S = 0.05  # less than this is left: no further attempt would have the time


class Uploader:
    """Delivers reports to a sink; many tasks may use it at once."""

    def __init__(
        self, sink: Sink, *, limit_s: float, observer: Observer, jitter: random.Random | None = None
    ) -> None:
        """Args: `limit_s`: seconds for all attempts of one report together; `jitter`: a seeded source for tests."""
        self._sink = sink
        self.limit_s = limit_s
        self._observer = observer
        self._jitter = jitter or random.Random()  # noqa: S311 - spreads retries, guards nothing

    async def deliver(self, report: BatchReport) -> None:
        """Deliver a report.

        Returns when it was accepted, or refused for good.

        Raises:
            UploadFailedError: the limit passed.

        If cancelled, it may or may not have arrived.
        """
        started = trio.current_time()
        limit = started + self.limit_s
        attempts = 0
        while True:
            attempts += 1
            answer: UploadAnswer = TryAgain(reason="no answer before the limit")
            with trio.move_on_at(limit):
                answer = await self._sink.upload(report)
            now = trio.current_time()
            if isinstance(answer, Accepted):
                self._observer.observe(
                    UploadDone(
                        report=report,
                        attempts=attempts,
                        seconds=now - started,
                        sent_bytes=answer.sent_bytes,
                    )
                )
                return
            if isinstance(answer, Rejected):
                self._observer.observe(
                    UploadRejected(report=report, status=answer.status, answer=answer.answer)
                )
                return
            remaining = limit - now
            pause = min(self._pause_s(answer, attempts), remaining / 2)
            if pause < _SHORTEST_PAUSE_S:
                self._fail(report, attempts, answer.reason)
            self._observer.observe(
                UploadRetried(
                    batch_id=report.batch.batch_id,
                    attempt=attempts,
                    reason=answer.reason,
                    retry_in_s=pause,
                    remaining_s=remaining - pause,
                )
            )
            await trio.sleep(pause)

    def _pause_s(self, answer: TryAgain | Unavailable, attempts: int) -> float:
        pause: float = min(_FIRST_PAUSE_S * 2 ** min(attempts - 1, 10), _LONGEST_PAUSE_S)
        pause *= self._jitter.uniform(0.5, 1.0)
        if isinstance(answer, TryAgain) and answer.retry_after_s is not None:
            return max(pause, answer.retry_after_s)
        return pause

    def _fail(self, report: BatchReport, attempts: int, reason: str) -> None:
        batch_id = report.batch.batch_id
        self._observer.observe(UploadFailed(batch_id=batch_id, attempts=attempts, reason=reason))
        raise UploadFailedError(
            batch_id=batch_id, attempts=attempts, limit_s=self.limit_s, last_answer=reason
        )
