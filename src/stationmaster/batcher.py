"""The request batcher: many callers with a text each, few calls to the model server.

One queue and `max_in_flight` standing senders. A free sender parks in `_idle`; an arrival, or the timekeeper, summons it
when the rule in `policy.py` says so. A wake-up takes effect on the next pass of trio's scheduler, so whatever is
submitted in the same pass, or at the same instant as a timer, travels in the same call.

Rules:
1. At most one sender is on its way (`_summoned`); on arrival it decides anew by the state, and if there is still a
   reason to send after it took its rows it summons the next.
2. One task, the timekeeper, owns every timer. Its alarm is only ever moved earlier; when it rings it is set anew. With
   nothing to wait for it sleeps for ever: an idle batcher wakes nobody.
3. State changes only between checkpoints, so nothing here needs a lock.
4. Every caller gets a vector or a typed error. Whatever ends a task of the batcher goes through `end`, which answers
   everybody who waits, at once and without a checkpoint, and closes the intake for good.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Final, Literal, TypeVar, overload

import attrs
import trio
from trio.lowlevel import Abort, current_task, reschedule, wait_task_rescheduled

from stationmaster.abc import NullObserver
from stationmaster.callers import Bulk, Segment, Single, row_error, size_of
from stationmaster.errors import (
    BatcherClosedError,
    BatcherError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    EmbedderBusyError,
    EmbedderUnavailableError,
    ProtocolError,
    QueueFullError,
    RequestTooLargeError,
    RowRejectedError,
    plain_errors,
)
from stationmaster.events import CallAbandoned, CallDone, CallFailed, CallStarted, RequestSubmitted
from stationmaster.policy import DEFAULT_POLICY, BatchPolicy, CostModel, SendReason, decide
from stationmaster.rows import Call, Expiries, RowQueue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from trio.lowlevel import Task

    from stationmaster.abc import Embedder, Observer, Vector
    from stationmaster.callers import Entry, Request

T = TypeVar("T")

_WAKE_SLICE: Final = 256  # rows handed out before other tasks get a turn
_FIRST_PAUSE_S: Final = (
    0.1  # when a busy server names no time; doubles with each such answer in a row
)


@attrs.frozen(kw_only=True)
class BatcherStatistics:
    """A look at a batcher. Counters count since it was opened."""

    queued_rows: int
    queued_bytes: int
    oldest_age_s: float
    """How long the oldest queued row waits; 0 if none does."""
    calls_in_flight: int
    rows_in_flight: int
    paused_s: float
    """How long nothing will be sent because the model server asked to wait."""
    answered_rows: int
    failed_rows: int
    expired_rows: int
    """Their deadline, kept by the batcher, passed."""
    cancelled_rows: int
    """Their callers were cancelled."""
    refused_rows: int
    """Never queued: too many, too large, too late, or the batcher was closed."""
    calls: Mapping[str, int]
    """Calls by their reason: those of `policy.decide`, `bisect` and `retry`."""
    call_estimate_s: float
    """What a full call is believed to take."""


class Batcher:
    """Gathers rows of many callers into calls. Opened by `open_batcher`."""

    def __init__(self, embedder: Embedder, *, policy: BatchPolicy, observer: Observer) -> None:
        self._embedder = embedder
        self._policy = policy
        self._observer = observer
        self._detailed = observer.detailed
        self._queue = RowQueue(on_empty=self._look_for_rest)
        self._expiries = Expiries()
        self._cost = CostModel(policy.start_estimate_s)
        self._idle: list[Task] = []
        self._summoned = False
        self._working = 0  # senders with rows
        self._calls: set[Call] = set()  # theirs; also those that await their turn in a bisection
        self._alarm = trio.CancelScope()
        self._released: tuple[float, SendReason] = (-inf, "flush")
        self._expected = 0
        self._expected_until = -inf
        self._paused_until = -inf
        self._busy_answers = 0  # in a row
        self._soonest_s = 0.0  # the best that a row can hope for
        self._open = True
        self._ended = False
        self._cause: BaseException | None = None
        self._at_rest = trio.Event()
        self._answered = self._failed = self._expired = self._refused = 0
        self._reasons: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------------- for callers

    async def embed(self, text: str, *, deadline: float = inf, priority: float = 0.0) -> Vector:
        """Embed one text, in a call shared with others.

        Args:
            text: what to embed, not empty.
            deadline: absolute, on trio's clock. The ambient one (`trio.current_effective_deadline()`) counts as well
                and is exact; this one is kept by the batcher, costs no scope, and may strike 10 ms late.
            priority: seconds by which it is ranked as though it was due earlier, at most the policy's `patience_s`. A
                head start, not a class: others grow older and come first in the end.

        Returns:
            The vector.

        Raises:
            QueueFullError: at once, nothing was queued.
            RequestTooLargeError: at once, it can never fit.
            DeadlineUnreachableError: at once, calls are known to take longer.
            DeadlineExceededError: the deadline passed.
            BatcherClosedError: the batcher is closing, or died (then the cause is chained).
            EmbedderError: what the model server made of it; an instance of the caller's own.

        If cancelled, its row is taken back and harms nobody; the last caller of a call in flight cancels the call.
        """
        now = trio.current_time()
        ambient = trio.current_effective_deadline()
        due = ambient if ambient <= deadline else deadline
        size_bytes = len(text) if text.isascii() else len(text.encode())
        policy = self._policy
        queue = self._queue
        if (
            queue.rows >= policy.max_queue_rows
            or queue.size_bytes + size_bytes > policy.max_queue_bytes
            or not 0 < size_bytes <= policy.max_batch_bytes
            or not due - now > self._soonest_s
            or not self._open
            or priority
        ):
            self._admit(
                (text,), size_bytes, now=now, deadline=deadline, ambient=ambient, priority=priority
            )
        latest = now + policy.patience_s
        if latest < due:
            due = latest
        request = Single(text, size_bytes, current_task(), queue, now, due, due - priority)
        self._submit(request, now)
        if deadline < ambient:
            return await self._wait_until(deadline, request)
        return await wait_task_rescheduled(request)  # type: ignore[no-any-return]  # law 1 of callers.py

    @overload
    async def embed_many(
        self,
        texts: Sequence[str],
        *,
        deadline: float = inf,
        priority: float = 0.0,
        return_errors: Literal[False] = False,
    ) -> list[Vector]: ...

    @overload
    async def embed_many(
        self,
        texts: Sequence[str],
        *,
        deadline: float = inf,
        priority: float = 0.0,
        return_errors: Literal[True],
    ) -> list[Vector | Exception]: ...

    async def embed_many(
        self,
        texts: Sequence[str],
        *,
        deadline: float = inf,
        priority: float = 0.0,
        return_errors: bool = False,
    ) -> Sequence[Vector | Exception]:
        """Embed texts, for a fraction of what as many `embed` cost; they may be spread over several calls.

        Args:
            texts: what to embed, none of them empty; all are queued or none.
            deadline: as with `embed`.
            priority: as with `embed`.
            return_errors: put each row's own error in its place instead of raising the first; what was answered before
                the deadline is then not lost. Refusals at once are raised all the same.

        Returns:
            One vector (or error) per text, in order.

        Raises:
            BatcherError: as with `embed`.
            EmbedderError: the first one of any row; the others are taken back.
        """
        if isinstance(texts, str):
            raise TypeError("embed_many takes a sequence of texts; use embed for one text")
        texts = tuple(texts)
        if not texts:
            await trio.lowlevel.checkpoint()
            return []
        now = trio.current_time()
        ambient = trio.current_effective_deadline()
        due = ambient if ambient <= deadline else deadline
        size_bytes = size_of("".join(texts))
        self._admit(
            texts, size_bytes, now=now, deadline=deadline, ambient=ambient, priority=priority
        )
        due = min(due, now + self._policy.patience_s)
        request = Bulk(
            texts,
            current_task(),
            self._queue,
            now,
            due,
            due - priority,
            return_errors=return_errors,
        )
        self._submit(Segment(request, low=0, high=len(texts), size_bytes=size_bytes), now)
        if deadline < ambient:
            return await self._wait_until(deadline, request)
        return await wait_task_rescheduled(request)  # type: ignore[no-any-return]  # law 1 of callers.py

    def expect(self, rows: int) -> None:
        """Announce rows that are about to come: they travel together, without a wait once all are here.

        Meanwhile IDLE and MIN hold back. The announcement lapses after the policy's `max_wait_s`.
        """
        if rows < 1:
            raise ValueError(f"expect takes a number of rows of at least 1, not {rows}")
        now = trio.current_time()
        self._expected = rows + (self._expected if now <= self._expected_until else 0)
        self._expected_until = now + self._policy.max_wait_s

    def flush(self) -> None:
        """Let the rows that are queued now leave as soon as senders are free. Does not wait."""
        now = trio.current_time()
        self._released = now, "flush"
        self._ring_by(self._consider(now))

    def statistics(self) -> BatcherStatistics:
        """Return a look at the state and the counters."""
        now = trio.current_time()
        queue = self._queue
        return BatcherStatistics(
            queued_rows=queue.rows,
            queued_bytes=queue.size_bytes,
            oldest_age_s=now - queue.oldest if queue.rows else 0.0,
            calls_in_flight=self._working,
            rows_in_flight=sum(
                part.rows for call in self._calls for part in call.parts if part.task is not None
            ),
            paused_s=max(self._paused_until - now, 0.0),
            answered_rows=self._answered,
            failed_rows=self._failed,
            expired_rows=self._expired,
            cancelled_rows=queue.cancelled,
            refused_rows=self._refused,
            calls=dict(self._reasons),
            call_estimate_s=self._cost.estimate(self._policy.max_batch_rows),
        )

    # ----------------------------------------------------------------------------------------------------- admission

    def _admit(
        self,
        texts: Sequence[str],
        size_bytes: int,
        *,
        now: float,
        deadline: float,
        ambient: float,
        priority: float,
    ) -> None:
        """Raise what stands against this request, if anything does; all of it is queued or nothing."""
        if "" in texts:
            raise ValueError("an empty text cannot be embedded")
        if math.isnan(deadline):
            raise ValueError("the deadline must not be NaN")
        policy = self._policy
        if not abs(priority) <= policy.patience_s:
            raise ValueError(
                f"priority must be between -{policy.patience_s:g} and {policy.patience_s:g} s, not {priority}"
            )
        try:
            if not self._open:
                raise self._closed_error()
            self._check_size(texts, size_bytes)
            if (
                ambient > now
            ):  # else the caller is cancelled at its next checkpoint, which is better than an error
                self._check_deadline(len(texts), min(deadline, ambient) - now)
        except BatcherError:
            self._refused += len(texts)
            raise

    def _check_size(self, texts: Sequence[str], size_bytes: int) -> None:
        policy = self._policy
        rows = len(texts)
        if rows > policy.max_queue_rows or size_bytes > policy.max_queue_bytes:
            raise RequestTooLargeError(
                f"{rows} rows of {size_bytes} bytes together can never fit into the queue of "
                f"{policy.max_queue_rows} rows and {policy.max_queue_bytes} bytes; send fewer at a time"
            )
        if size_bytes > policy.max_batch_bytes:
            longest = max(map(size_of, texts))
            if longest > policy.max_batch_bytes:
                raise RequestTooLargeError(
                    f"a text of {longest} bytes can never fit into a call of {policy.max_batch_bytes} bytes; shorten it"
                )
        if (
            self._queue.rows + rows > policy.max_queue_rows
            or self._queue.size_bytes + size_bytes > policy.max_queue_bytes
        ):
            raise QueueFullError(
                capacity=policy.max_queue_rows, retry_after_s=self._room_in_s(rows)
            )

    def _check_deadline(self, rows: int, remaining_s: float) -> None:
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline had passed when the request was made")
        needed_s = self._cost.optimistic(min(rows, self._policy.max_batch_rows))
        # An idle batcher tries all the same: else a server that was slow once would never be measured again.
        if remaining_s <= needed_s and self._working:
            raise DeadlineUnreachableError(
                f"a call takes {needed_s:.3g} s at best, the deadline is in {remaining_s:.3g} s"
            )

    def _room_in_s(self, rows: int) -> float:
        """Estimate when the queue has room for that many rows: all senders take full calls meanwhile."""
        policy = self._policy
        excess = max(self._queue.rows + rows - policy.max_queue_rows, 1)
        rounds = math.ceil(excess / (policy.max_batch_rows * policy.max_in_flight))
        pause_s = max(self._paused_until - trio.current_time(), 0.0)
        return pause_s + rounds * self._cost.estimate(policy.max_batch_rows)

    def _submit(self, entry: Entry, now: float) -> None:
        if self._detailed:
            self._observer.observe(
                RequestSubmitted(rows=entry.rows, queue_rows=self._queue.rows + entry.rows)
            )
        self._queue.put(entry)
        if self._expected:
            self._meet_expectation(entry.rows, now)
        if self._idle and not self._summoned:
            self._ring_by(self._consider(now))

    def _meet_expectation(self, rows: int, now: float) -> None:
        if now > self._expected_until:
            self._expected = 0
        else:
            self._expected = max(self._expected - rows, 0)
            if not self._expected:
                self._released = now, "expected"

    async def _wait_until(self, deadline: float, request: Request[T]) -> T:
        """Park a caller whose own scopes do not strike first."""
        self._ring_by(self._expiries.add(request, deadline))
        try:
            return await wait_task_rescheduled(request)  # type: ignore[no-any-return]  # law 1 of callers.py
        finally:
            self._expiries.discard(request, deadline)

    # -------------------------------------------------------------------------------------------------- when to send

    def _decide(self, now: float) -> tuple[SendReason | None, float]:
        """Return why a free sender should take rows now, or None and when it should."""
        queue = self._queue
        if not queue.rows:
            return None, inf
        if now < self._paused_until:
            return None, self._paused_until
        return decide(
            self._policy,
            now=now,
            rows=queue.rows,
            size_bytes=queue.size_bytes,
            oldest=queue.oldest,
            earliest_due=queue.earliest_due,
            estimate_s=self._cost.cautious(min(queue.rows, self._policy.max_batch_rows)),
            idle=not self._working,
            draining=not self._open,
            released=self._released,
            held_until=self._expected_until if self._expected else -inf,
        )

    def _consider(self, now: float) -> float:
        """Summon an idle sender if there is a reason to; else return when there will be one (maybe infinity)."""
        if not self._idle or self._summoned:
            return inf
        reason, instant = self._decide(now)
        if reason is None:
            return instant
        self._summoned = True
        reschedule(self._idle.pop())
        return inf

    def _ring_by(self, instant: float) -> None:
        if instant < self._alarm.deadline:
            self._alarm.deadline = instant

    async def keep_time(self) -> None:
        """Strike the deadlines that are kept here, and summon a sender when a rule fires. A task of `open_batcher`."""
        while True:
            now = trio.current_time()
            for request in self._expiries.pop(now):
                self._expired += request.fail(_expired_error)
            with trio.CancelScope(
                deadline=min(self._consider(now), self._expiries.next())
            ) as self._alarm:
                await trio.sleep_forever()

    # ------------------------------------------------------------------------------------------------------- senders

    async def send_rows(self) -> None:
        """Send batch after batch. A task of `open_batcher`."""
        while True:
            now = trio.current_time()
            reason, instant = self._decide(now)
            if reason is None:
                self._ring_by(instant)
                await self._park()
            else:
                await self._carry(self._take(now), reason)

    async def _park(self) -> None:
        task = current_task()

        def abort(_raise_cancel: object) -> Abort:
            self._idle.remove(task)
            return Abort.SUCCEEDED

        self._idle.append(task)
        await wait_task_rescheduled(abort)
        self._summoned = False

    def _take(self, now: float) -> Call:
        call = self._queue.take(
            max_rows=self._policy.max_batch_rows, max_bytes=self._policy.max_batch_bytes
        )
        self._calls.add(call)
        self._working += 1
        self._ring_by(self._consider(now))
        return call

    async def _carry(self, call: Call, reason: str) -> None:
        """Send rows until each has its vector or its error, or stands in the queue again."""
        try:
            error = await self._send(call, reason)
            if isinstance(error, RowRejectedError) and call.rows > 1:
                await self._bisect(call, error)
            elif error is not None:
                self._give_up(call, error)
        finally:
            self._working -= 1
            self._look_for_rest()

    async def _send(self, call: Call, reason: str) -> Exception | None:
        """Send a call; once more if the server could not be reached, for those rows that still can be in time."""
        error = await self._attempt(call, reason)
        if isinstance(error, EmbedderUnavailableError) and self._in_time(call, error):
            error = await self._attempt(call, "retry")
        return error

    async def _attempt(self, call: Call, reason: str) -> Exception | None:
        """Make one call and hand out what it answers.

        Returns:
            What went wrong; None if it was answered, or nobody waits for it any more.
        """
        rows = call.rows
        started = trio.current_time()
        self._reasons[reason] += 1
        self._observer.observe(
            CallStarted(
                rows=rows,
                reason=reason,
                oldest_age_s=started - call.oldest,
                queue_rows=self._queue.rows,
            )
        )
        vectors: Sequence[Vector] = ()
        failure: Exception | None = None
        call.scope = scope = trio.CancelScope()
        try:
            # The scope stands inside: it takes its own Cancelled out of an error group before the error is looked at.
            with scope:
                vectors = await self._embedder.embed(call.texts)
                failure = _check_count(vectors, rows)
        except Exception as error:  # noqa: BLE001 - whatever the embedder raises is answered to each waiting caller
            failure = error
        except BaseException:
            self._observer.observe(CallAbandoned(rows=rows, seconds=trio.current_time() - started))
            raise
        call.scope = None
        seconds = trio.current_time() - started
        if scope.cancelled_caught:
            self._calls.discard(call)
            self._observer.observe(CallAbandoned(rows=rows, seconds=seconds))
            # A server goes on computing for a while: its natural end is when this sender is free again.
            if self._cost.measured:
                await trio.sleep_until(started + self._cost.estimate(rows))
            return None
        if failure is not None:
            self._observer.observe(CallFailed(rows=rows, seconds=seconds, error=failure))
            return failure
        self._busy_answers = 0
        self._cost.learn(rows=rows, seconds=seconds)
        self._soonest_s = self._cost.optimistic(1)
        self._observer.observe(CallDone(rows=rows, seconds=seconds))
        at = 0
        for start in range(0, len(call.parts), _WAKE_SLICE):
            if start:
                await (
                    trio.lowlevel.cancel_shielded_checkpoint()
                )  # others get a turn; the answers are here, no way back
            for part in call.parts[start : start + _WAKE_SLICE]:
                self._answered += part.answer(vectors, at)
                at += part.rows
        call.answered = True
        self._calls.discard(call)
        return None

    async def _bisect(self, call: Call, refusal: RowRejectedError) -> None:
        """Send halves of a refused call again until only guilty rows are left: at most log2(rows) + 1 rounds deep.

        When a first single row is found, the largest part that is left comes next, down to its first row. If that is
        refused in the same words and nothing was accepted in between, the fault is not in the rows: the rest fails
        without being sent (else a wrong setting would cost two calls per row).
        """
        pending: list[Call] = []
        words: str | None = None
        accepted = False
        self._halve(call, pending)
        while pending:
            part = pending.pop()
            if not self._in_time(part, refusal):
                continue
            error = await self._send(part, "bisect")
            if not isinstance(error, RowRejectedError):
                accepted = accepted or part.answered
                if error is not None:
                    self._give_up(part, error)
            elif part.rows > 1:
                refusal = error
                self._halve(part, pending)
            else:
                self._give_up(part, error)
                if words is None:
                    words = str(error)
                    pending.reverse()
                elif words == str(error) and not accepted:
                    for rest in pending:
                        self._give_up(rest, error)
                    return

    def _halve(self, call: Call, pending: list[Call]) -> None:
        call.prune()
        if call.rows:
            pending.append(call)
            if call.rows > 1:
                half = call.split()
                self._calls.add(half)
                pending.append(half)
        else:
            self._calls.discard(call)

    def _in_time(self, call: Call, error: Exception) -> bool:
        """Fail the rows that cannot be answered in time if they are sent again now; return whether any are left."""
        instant = trio.current_time() + self._cost.estimate(call.rows)
        self._failed += call.fail_late(instant, lambda: row_error(error))
        if not call.rows:
            self._calls.discard(call)
        return call.rows > 0

    def _give_up(self, call: Call, error: Exception) -> None:
        """Fail a call's rows. Of a busy server those that can still be in time are queued again, and all wait."""
        if isinstance(error, EmbedderBusyError):
            pause_s = error.retry_after_s
            if pause_s is None:
                pause_s = _FIRST_PAUSE_S * 2 ** min(self._busy_answers, 30)
            self._busy_answers += 1
            instant = trio.current_time() + min(max(pause_s, 0.0), self._policy.patience_s)
            self._paused_until = max(self._paused_until, instant)
            latest_start = self._paused_until + self._cost.estimate(call.rows)
            self._failed += call.fail_late(latest_start, lambda: row_error(error))
            self._queue.put_back(call)
        else:
            self._failed += sum(part.fail(lambda: row_error(error)) for part in call.parts)
        self._calls.discard(call)

    # -------------------------------------------------------------------------------------------------------- ending

    def _look_for_rest(self) -> None:
        if not (self._open or self._working or self._queue.rows):
            self._at_rest.set()

    async def drain(self) -> None:
        """Close the intake and wait, within the grace, until every row is answered. `open_batcher` does this."""
        self._open = False
        self._look_for_rest()
        self._ring_by(self._consider(trio.current_time()))
        with trio.move_on_after(self._policy.grace_s):
            await self._at_rest.wait()

    def end(self, cause: BaseException | None) -> None:
        """Answer whoever still waits with BatcherClosedError, chained to the cause. Only the first time counts."""
        if self._ended:
            return
        self._ended = True
        self._open = False
        self._cause = cause
        entries = [*self._queue, *(part for call in self._calls for part in call.parts)]
        for entry in entries:
            self._failed += entry.request.fail(self._closed_error)

    def _closed_error(self) -> BatcherClosedError:
        cause = self._cause
        if cause is None:
            return BatcherClosedError("the batcher is closed")
        if isinstance(cause, trio.Cancelled):
            return BatcherClosedError("the batcher was cancelled")
        error = BatcherClosedError(f"the batcher ended with {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error


def _expired_error() -> DeadlineExceededError:
    return DeadlineExceededError("the deadline passed while the request was queued or in flight")


def _check_count(vectors: Sequence[Vector], rows: int) -> ProtocolError | None:
    try:
        count = len(vectors)
    except TypeError:
        return ProtocolError(
            f"the embedder answered {rows} texts with {type(vectors).__name__}, not a sequence"
        )
    if count != rows:
        return ProtocolError(f"the embedder answered {rows} texts with {count} vectors")
    return None


@asynccontextmanager
async def open_batcher(
    embedder: Embedder, *, policy: BatchPolicy = DEFAULT_POLICY, observer: Observer | None = None
) -> AsyncIterator[Batcher]:
    """Open a batcher: `async with open_batcher(embedder) as batcher: vector = await batcher.embed(text)`.

    Args:
        embedder: called with lists of texts, by up to `policy.max_in_flight` tasks at once.
        policy: when a batch leaves, and all bounds.
        observer: hears of every call, and of every request if it is `detailed`.

    Leaving the block closes the intake, waits up to `policy.grace_s` for rows that are queued or in flight, and
    answers the rest with BatcherClosedError. Leaving it by an error or a cancellation answers everybody at once.
    What is no Exception (say KeyboardInterrupt) out of the embedder, and what the observer raises, ends the batcher
    and leaves this block as itself.
    """
    batcher = Batcher(embedder, policy=policy, observer=observer or NullObserver())

    async def guard(part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except BaseException as error:
            batcher.end(error)
            raise

    with plain_errors():
        async with trio.open_nursery() as nursery:
            for number in range(policy.max_in_flight):
                nursery.start_soon(guard, batcher.send_rows, name=f"batcher sender {number}")
            nursery.start_soon(guard, batcher.keep_time, name="batcher timekeeper")
            try:
                yield batcher
                await batcher.drain()
            except BaseException as error:
                batcher.end(error)
                raise
            batcher.end(None)
            nursery.cancel_scope.cancel()
