"""One station: one task, one nursery and one bounded channel; it works on job after job, and its errors end here.

Rules (each was found by breaking it):
1. One cancel scope serves job after job and is renewed only after it was cancelled: a scope per job costs about three
   times as much CPU. Its deadline follows the job, so that `trio.current_effective_deadline()` is right inside a
   handler.
2. After every job look whether it was cancelled, or its time is over. A cancel that came in the same tick as the result
   would otherwise fall on the next batch's job.
3. A handler's errors end at its station's edge. An error group mixed with Cancelled is split there: the errors are the
   station's, the cancellation goes on. MemoryError, alone or in a group, and whatever is no Exception ends the
   pipeline.
4. No job starts when its batch is closed or its deadline has come: both can happen while it waits in the channel; nor
   when what is left of its time is hopeless (see `health`).
5. While its breaker is open, its channel holds nothing but a probe: what waits when it opens is rejected at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import attrs
import trio

from stationmaster.batch import Outcome, StationInput, StationResult
from stationmaster.events import StationBreakerClosed, StationBreakerOpened, StationTrouble
from stationmaster.outcomes import Collecting, answer_of, failure_of, is_cancellation, is_fatal
from stationmaster.stations.health import StationHealth

if TYPE_CHECKING:
    from collections.abc import Callable

    from stationmaster.abc import Observer, StationHandler

_CLEAN_UP_S: Final = 1.0  # what a cancelled job may take to end before the next ones are rejected


@attrs.frozen(kw_only=True, eq=False)
class Workplace:
    """What all stations share."""

    handler: StationHandler
    result_bytes: int
    job_timeout_s: float | None
    breaker_failures: int
    """0: breakers never open."""
    breaker_probe_s: float
    on_rest: Callable[[Station, float], None]
    """Called whenever a station has nothing to do, with the time."""
    on_eased: Callable[[], None]
    """Called when an expected wait may have fallen."""
    on_crash: Callable[[], None]
    """Called before an error that is no outcome takes all stations down."""
    observer: Observer


@attrs.define(eq=False)
class Station(StationHealth):
    """One live station. Its owner runs `live` in a task, and closes `send` only while it is idle."""

    station_id: str
    send: trio.MemorySendChannel[Collecting]
    _receive: trio.MemoryReceiveChannel[Collecting]
    _workplace: Workplace
    queued: int = 0
    idle_since: float = 0.0
    is_troubled: bool = False
    """A job was cancelled since its last answer, or is being cancelled: ask `refusal` before it gets another."""
    _cancelled_at: float = math.inf
    """When the job at hand was cancelled."""
    _scope: trio.CancelScope = attrs.field(init=False)
    _helpers: trio.Nursery = attrs.field(init=False)
    _lent: bool = False
    """A handler has seen `_helpers`: a task in it may have failed."""

    async def live(self) -> None:  # noqa: ASYNC910 - `_serve` waits for a job first
        """Work until `send` is closed, anew whenever a helper task of the handler fails.

        Raises:
            BaseException: what is no outcome, see rule 3; `on_crash` was called before.
        """
        receive = self._receive
        try:
            with receive:
                while receive.statistics().open_send_channels:
                    own: Exception | None = None
                    try:
                        async with trio.open_nursery() as helpers:
                            self._helpers, self._lent = helpers, False
                            try:
                                await self._serve()
                            except Exception as error:  # noqa: BLE001 - raised again below: it is no helper's
                                own = error
                            helpers.cancel_scope.cancel()
                    except* MemoryError:
                        raise
                    except* Exception as group:  # noqa: BLE001 - whatever a helper task raises
                        self._workplace.observer.observe(
                            StationTrouble(station_id=self.station_id, error=group)
                        )
                    if own is not None:
                        raise own  # noqa: TRY301 - it is nobody's own failure: on_crash hears of it
                    self._cancelled_at = math.inf
                    if not self.queued:  # else the probe, if there is one, still waits
                        self.give_up_probe()
        except BaseException as error:
            if not is_cancellation(error):
                self._workplace.on_crash()  # before the others are cancelled: their errors then are no answers
            raise

    def cancel(self) -> None:
        """Cancel the job at hand."""
        self.is_troubled = True
        self._cancelled_at = trio.current_time()
        self._scope.cancel()

    def lend_nursery(self) -> trio.Nursery:
        """Return the nursery for the handler's helper tasks."""
        self._lent = True
        return self._helpers

    async def _serve(self) -> None:
        """Work on job after job, to the end of the channel, or until a helper task failed."""
        clock, receive = trio.current_time, self._receive
        job_timeout_s = self._workplace.job_timeout_s
        now = clock()
        while True:  # noqa: ASYNC913 - it waits whenever its queue is empty
            answered = False
            with trio.CancelScope() as scope:  # noqa: ASYNC912 - as above
                self._scope = scope
                while True:
                    waited = self.queued > 0
                    if waited:
                        collecting = receive.receive_nowait()
                    else:
                        scope.deadline = math.inf
                        self._workplace.on_rest(self, now)
                        try:
                            collecting = await receive.receive()
                        except trio.EndOfChannel:
                            return
                        now = clock()
                    self.queued -= 1
                    started, limit = now, collecting.deadline
                    mean_s = self.mean_s
                    if collecting.closed or started >= limit:
                        self.give_up_probe()
                    elif waited and mean_s is not None and limit - started < mean_s:
                        self._give_back(collecting, limit - started)
                    else:
                        if job_timeout_s is not None and started + job_timeout_s < limit:
                            limit = started + job_timeout_s
                        scope.deadline = limit
                        await self._work(collecting)
                        now = clock()
                        if self._lent and self._helpers.cancel_scope.cancel_called:
                            return  # the next job is none of this failure's business
                        if now >= limit or self._cancelled_at < math.inf:
                            # An answer in the tick of the cancel counts if the batch is open; else it is late.
                            answered = not collecting.closed
                            break
                        if self.is_troubled or mean_s is None:
                            self._recovered(now - started)
                        else:
                            self.measure(now - started)
                    del collecting  # whoever rests holds no batch
            now = clock()
            if answered:
                self._recovered(now - started)
            else:
                self._cancelled(collecting, started, limit)
            del collecting

    async def _work(  # noqa: ASYNC910 - a handler that never waits is served up to one queue in a row
        self, collecting: Collecting
    ) -> None:
        """Run one job; its errors are its outcome."""
        station_id, batch, workplace = self.station_id, collecting.batch, self._workplace
        job = StationInput(
            station_id,
            batch.entries[station_id],
            batch,
            batch.last_message[station_id],
            self.lend_nursery,
        )
        collecting.begin(station_id, self.cancel)
        try:
            value = await workplace.handler(job)
            result = answer_of(station_id, value, most_bytes=workplace.result_bytes)
        except Exception as error:
            if is_fatal(error):
                raise
            collecting.settle(failure_of(station_id, error))
        except BaseExceptionGroup as group:
            errors, rest = group.split(Exception)
            if errors is not None and is_fatal(errors):
                raise
            # Cancelled at the limit of its own job it timed out; that its clean-up failed besides is no outcome.
            timed_out = rest is not None and self._scope.cancel_called and not collecting.closed
            if errors is not None and not timed_out:
                collecting.settle(failure_of(station_id, errors))
            if rest is not None:
                raise rest from None
        else:
            collecting.settle(result)
        finally:
            collecting.end(station_id)
            if self._lent and self._helpers.cancel_scope.cancel_called and not collecting.closed:
                # A helper task failed and took the job with it; an outcome that was settled before counts.
                collecting.settle(
                    StationResult(station_id, Outcome.FAILED, None, "a helper task failed")
                )

    # ----------------------------------------------------------------------------------------- what a job's end says

    def _recovered(self, seconds: float) -> None:
        """It answered for the first time, or after a cancel."""
        self.is_troubled = False
        self._cancelled_at = math.inf
        self.measure(seconds)
        open_s = self.recover(trio.current_time())
        self._workplace.on_eased()  # it counts in estimates from now on
        if open_s is not None:
            self._workplace.observer.observe(
                StationBreakerClosed(station_id=self.station_id, open_s=open_s)
            )

    def _cancelled(self, collecting: Collecting, started: float, limit: float) -> None:
        workplace = self._workplace
        self.is_troubled = True
        self._cancelled_at = math.inf
        now = trio.current_time()
        breaker = self.trouble(
            failures=workplace.breaker_failures, probe_s=workplace.breaker_probe_s
        )
        is_probe = breaker.probing
        if now < limit:
            breaker.give_up(is_probe=is_probe)
            return
        had_s = limit - started
        own_limit = limit < collecting.deadline
        if own_limit:  # the batch goes on: nobody else says so
            reason = f"no answer within {had_s:g} s (stations.job_timeout_s)"
            collecting.settle(StationResult(self.station_id, Outcome.TIMED_OUT, None, reason))
        fresh = own_limit or had_s >= (collecting.deadline - collecting.opened) / 2
        if not self.is_strike(had_s, fresh=fresh) or not workplace.breaker_failures:
            breaker.give_up(is_probe=is_probe)
        elif breaker.fail(now, is_probe=is_probe):
            self._shut_off(breaker.in_a_row)

    def _shut_off(self, failures: int) -> None:
        """Its breaker opened: reject what waits."""
        reason = self._breaker_is_open
        self._workplace.observer.observe(
            StationBreakerOpened(station_id=self.station_id, failures=failures)
        )
        while self.queued:
            self.queued -= 1
            waiting = self._receive.receive_nowait()
            waiting.settle(StationResult(self.station_id, Outcome.REJECTED, None, reason))

    def refusal(self, now: float) -> str:
        """Return why it takes no job now; empty if it does, and then the job must be sent: it may be the probe."""
        if now > self._cancelled_at + _CLEAN_UP_S:
            return "it does not come back from a job that was cancelled"
        breaker = self.breaker
        if breaker is None:
            return ""
        if now < breaker.next_at:
            return self._breaker_is_open
        breaker.begin()
        return ""

    @property
    def _breaker_is_open(self) -> str:
        probe_s = self._workplace.breaker_probe_s
        return f"timed out too often, tried again every {probe_s:g} s (stations.breaker_failures)"

    def _give_back(self, collecting: Collecting, left_s: float) -> None:
        self.give_up_probe()
        reason = f"cannot end in time: {left_s:.3g} s are left, its jobs take {self.mean_s:.3g} s"
        collecting.settle(StationResult(self.station_id, Outcome.REJECTED, None, reason))
