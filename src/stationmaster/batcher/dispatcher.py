"""When rows leave: the standing senders, the timekeeper, and who wakes whom.

A free sender parks in `_idle`. An arrival, or the timekeeper, summons it when the rule says so. A wake-up takes effect
on the next pass of trio's scheduler, so whatever is submitted in the same pass, or at the same instant as a timer,
travels in the same call.

Rules:
1. At most one sender is on its way (`_summoned`). It decides anew by the state it finds, and if there is still a reason
   to send after it took its rows, it summons the next one.
2. One task, the timekeeper, owns every timer. Its alarm is only moved earlier; when it rings it is set anew. With
   nothing to wait for it sleeps for ever: an idle batcher wakes nobody.
3. While so few rows wait that one more is answered within 100 ms, an arrival is an append to the queue's `fresh`, and
   its ambient deadline is not looked at (reading that costs as much as half a wake-up). It tells the dispatcher only if
   that is `alert`: a sender is idle and not summoned, or rows are expected. Not so if requests are observed, counted in
   tokens, or shared.
4. State changes only between checkpoints, so nothing here needs a lock.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import Abort, current_task, reschedule, wait_task_rescheduled

from stationmaster.batcher.cost import CostModel
from stationmaster.batcher.courier import Courier
from stationmaster.batcher.expiries import Expiries
from stationmaster.batcher.policy import decide
from stationmaster.batcher.rows import RowQueue
from stationmaster.errors import DeadlineExceededError

if TYPE_CHECKING:
    from trio.lowlevel import Task

    from stationmaster.abc import Embedder, Observer
    from stationmaster.batcher.callers import Caller
    from stationmaster.batcher.calls import Call
    from stationmaster.batcher.policy import BatchPolicy, SendReason

PROMPT_S: Final = 0.1
"""Where rows are answered within this time no ambient deadline is worth the time to read it."""
_SHORTEST_CALL_S: Final = 1e-6


class Dispatcher:
    """Decides when rows leave, and sends them."""

    def __init__(self, embedder: Embedder, *, policy: BatchPolicy, observer: Observer) -> None:
        self._policy = policy
        self.queue: RowQueue = RowQueue(policy, on_empty=self._look_for_rest)
        self.cost: CostModel = CostModel(policy.start_estimate_s)
        self.courier: Courier = Courier(
            embedder,
            queue=self.queue,
            cost=self.cost,
            policy=policy,
            observer=observer,
        )
        self.carrying: int = 0
        """Senders at work."""
        self._clock = trio.lowlevel.current_clock().current_time
        self._idle: list[Task] = []
        self._summoned = False
        self._alarm = trio.CancelScope()
        self._expiries = Expiries()
        self._released: tuple[float, SendReason] = (-inf, "flush")
        self._expected = 0
        self._expected_until = -inf
        self._draining = False
        self._at_rest = trio.Event()
        self.alert: bool = False
        """Arrivals are to be told to `arrived` (see rule 3)."""
        self._may_be_quick = (
            policy.send_when_idle and policy.max_batch_tokens is None and not policy.share_identical
        )
        self._observer = observer
        self.is_detailed: bool = observer.detailed
        """Requests are observed; asked once a call, as an answer may cost more than a request does."""
        self.expired: int = 0
        """Rows, so far, whose deadlines were kept here and passed."""

    # ------------------------------------------------------------------------------------------------- for the batcher

    def arrived(self, rows: int, now: float) -> None:
        """Take note that rows were queued."""
        if self._expected:
            if now > self._expected_until:
                self._expected = 0
            else:
                self._expected = max(self._expected - rows, 0)
                if not self._expected:
                    self._released = (now, "expected")
            self._set_alert()
        self._ring_by(self._consider(now))

    def expect(self, rows: int) -> None:
        """Hold rows back until that many arrived, or `max_wait_s` passed."""
        now = self._clock()
        self._expected = rows + (self._expected if now <= self._expected_until else 0)
        self._expected_until = now + self._policy.max_wait_s
        self._set_alert()

    def flush(self) -> None:
        """Let the rows that are queued now leave."""
        now = self._clock()
        self._released = (now, "flush")
        self._ring_by(self._consider(now))

    def close(self) -> None:
        """Let everything leave; from now on every arrival needs care (and is refused)."""
        self._draining = True
        self._may_be_quick = False
        self.queue.quicken(0)

    async def drain(self, grace_s: float) -> None:
        """Close, and wait within the grace until every row has its end."""
        self.close()
        self._look_for_rest()
        self._ring_by(self._consider(self._clock()))
        with trio.move_on_after(grace_s):
            await self._at_rest.wait()

    def keep_deadline(self, deadline: float, caller: Caller) -> None:
        """Strike for a caller that no scope of its own would cancel in time."""
        instant = self._expiries.add(caller, deadline)
        if instant != inf:
            self._ring_by(instant)

    def drop_deadline(self, deadline: float, caller: Caller) -> None:
        """Keep it no more; fine if it struck."""
        self._expiries.discard(caller, deadline)

    def paused_s(self) -> float:
        """Return how long nothing will be sent because the model server asked to wait."""
        return max(self.courier.paused_until - self._clock(), 0.0)

    # ------------------------------------------------------------------------------------------------------ the tasks

    async def keep_time(self) -> None:
        """Strike deadlines and summon senders, each at its instant."""
        while True:
            now = self._clock()
            for caller in self._expiries.pop(now):
                self.expired += caller.fail(_expired)
            wake_at = min(self._consider(now), self._expiries.next())
            with trio.CancelScope(deadline=wake_at) as self._alarm:
                await trio.sleep_forever()

    async def send_rows(self) -> None:
        """Be a sender: take rows when there is a reason to, and have them carried."""
        while True:
            call, reason = await self._next_call()
            failure: Exception | None = None
            # One scope serves call after call until one is in trouble: entering one costs as much as three wake-ups.
            with trio.CancelScope() as scope:
                failure = await self.courier.attempt(call, reason, scope)
                while failure is None and not scope.cancel_called:
                    del call  # its texts and vectors
                    self._rest()
                    call, reason = await self._next_call()
                    failure = await self.courier.attempt(call, reason, scope)
            await self.courier.care(call, failure)
            del call, failure  # an error has a traceback, and that has the call's frames
            self._rest()

    async def _next_call(self) -> tuple[Call, SendReason]:
        """Take rows as soon as there is a reason to."""
        while True:
            now = self._clock()
            reason, instant = self._decide(now)
            if reason is not None:
                break
            self._ring_by(instant)
            await self._park()
        call = self.queue.take()
        self.carrying += 1
        self._ring_by(self._consider(now))
        return call, reason  # noqa: ASYNC910 - the attempt that follows is a checkpoint

    def _rest(self) -> None:
        self.carrying -= 1
        self._look_for_rest()
        self._measure()

    async def _park(self) -> None:
        task = current_task()

        def abort(_raise_cancel: object) -> Abort:
            self._idle.remove(task)
            return Abort.SUCCEEDED

        self._idle.append(task)
        self._set_alert()
        await wait_task_rescheduled(abort)
        self._summoned = False
        self._set_alert()

    # --------------------------------------------------------------------------------------------------- the decision

    def _decide(self, now: float) -> tuple[SendReason | None, float]:
        """Return why a free sender should take rows now, or None and when it should look again."""
        queue = self.queue
        if not queue.rows:
            return None, inf
        if now < self.courier.paused_until:
            return None, self.courier.paused_until
        return decide(
            self._policy,
            queue,
            now=now,
            cost=self.cost,
            idle=not self.carrying,
            draining=self._draining,
            released=self._released,
            held_until=self._expected_until if self._expected else -inf,
        )

    def _consider(self, now: float) -> float:
        """Summon a sender if there is a reason to; else return the instant at which there will be (maybe infinity)."""
        if not self._idle or self._summoned:
            return inf
        reason, instant = self._decide(now)
        if reason is None:
            return instant
        self._summoned = True
        self._set_alert()
        reschedule(self._idle.pop())
        return inf

    def _ring_by(self, instant: float) -> None:
        if instant < self._alarm.deadline:  # noqa: PLR1730 - setting it costs more than the look
            self._alarm.deadline = instant

    def _look_for_rest(self) -> None:
        """Take note that a row or a call is gone: the last one ends the draining."""
        if self._draining and not self.carrying and not self.queue.rows:
            self._at_rest.set()

    def _set_alert(self) -> None:
        self.alert = bool(self._expected or (self._idle and not self._summoned))

    def _measure(self) -> None:
        """Find how many rows may wait so that one more is answered within `PROMPT_S` at the measured pace.

        None may where each has to be looked at.
        """
        self.is_detailed = self._observer.detailed
        if not self._may_be_quick:
            return
        policy = self._policy
        rows = 0
        if self.cost.measured and not self.is_detailed:
            call_s = max(self.cost.cautious(policy.max_batch_rows), _SHORTEST_CALL_S)
            rounds = max(int(PROMPT_S / call_s) - 1, 0)  # the first is in flight already
            rows = rounds * policy.max_batch_rows * policy.max_in_flight
        self.queue.quicken(min(rows, policy.max_queue_rows))


def _expired() -> DeadlineExceededError:
    return DeadlineExceededError("the deadline passed while the request was queued or in flight")
