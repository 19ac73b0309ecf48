"""The request batcher: many callers with a text each, few calls to the model server.

Every caller gets a vector or a typed error, whatever happens: what ends a task of the batcher goes through `_end`,
which answers everybody who waits, at once and without a checkpoint, and closes the intake for good.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, overload

import attrs
import trio
from trio.lowlevel import current_task, wait_task_rescheduled

from stationmaster.abc import NullObserver
from stationmaster.batcher.callers import Bulk, Segment, Single, size_of
from stationmaster.batcher.dispatcher import Dispatcher
from stationmaster.batcher.policy import BatchPolicy
from stationmaster.errors import (
    BatcherClosedError,
    BatcherError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    QueueFullError,
    RequestTooLargeError,
    plain_errors,
)
from stationmaster.events import RequestSubmitted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from stationmaster.abc import Embedder, Observer, Vector
    from stationmaster.batcher.callers import Entry

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Unwraps(Protocol[T_co]):
    """What a parked caller is woken with."""

    def __call__(self, raise_cancel: trio.lowlevel.RaiseCancelT, /) -> trio.lowlevel.Abort:
        """Be the abort callback."""
        ...

    def unwrap(self) -> T_co:
        """Return or raise in the caller's task."""
        ...


@attrs.frozen(kw_only=True)
class BatcherStatistics:
    """A look at a batcher. Counters begin when it is opened; their unit is the row."""

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
    """A deadline kept by the batcher passed."""
    cancelled_rows: int
    """Their callers were cancelled."""
    refused_rows: int
    """Never queued: too many, too large, too late, or the batcher was closed."""
    calls: Mapping[str, int]
    """Calls by reason: those of the rule (`SendReason`), `bisect` and `retry`."""
    call_estimate_s: float
    """What a full call is believed to take."""


class Batcher:
    """Gathers rows of many callers into calls. Opened by `open_batcher`."""

    def __init__(self, embedder: Embedder, *, policy: BatchPolicy, observer: Observer) -> None:
        self._policy = policy
        self._observer = observer
        self._detailed = observer.detailed
        self._dispatcher = Dispatcher(embedder, policy=policy, observer=observer)
        self._queue = self._dispatcher.queue
        self._clock = trio.lowlevel.current_clock().current_time  # a third of trio.current_time
        self._open = True
        self._ended = False
        self._cause: BaseException | None = None
        self._refused = 0

    async def embed(self, text: str, *, deadline: float = inf, priority: float = 0.0) -> Vector:
        """Embed one text, in a call shared with others.

        Args:
            text: what to embed, not empty.
            deadline: absolute, on trio's clock. The ambient one (`trio.current_effective_deadline()`) counts as well
                (for rank and refusal only where rows wait longer than 20 ms) and is exact; this one is kept by the
                batcher, needs no scope, and may strike 10 ms late.
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
        now = self._clock()
        queue = self._queue
        policy = self._policy
        size_bytes = len(text) if text.isascii() else len(text.encode())
        if (
            queue.rows < self._dispatcher.quick_rows
            and 0 < size_bytes <= policy.max_batch_bytes
            and queue.size_bytes + size_bytes <= policy.max_queue_bytes
            and deadline == inf
            and not priority
            and not self._detailed
        ):
            due = now + policy.patience_s
            caller = Single(text, size_bytes, current_task(), queue, now, due, due)
            queue.put(caller)
            vector: Vector = await wait_task_rescheduled(caller)
            return vector
        due, deadline = self._admit((text,), size_bytes, deadline, priority, now=now)
        caller = Single(text, size_bytes, current_task(), queue, now, due, due - priority)
        return await self._wait(caller, caller, deadline)

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
            return_errors: put each row's own error in its place instead of raising the first; then what was answered
                before the deadline is not lost. What is refused at once is raised all the same.

        Returns:
            One vector (or error) per text, in order.

        Raises:
            BatcherError: as with `embed`.
            EmbedderError: the first one of any row; the other rows are taken back.
        """
        if isinstance(texts, str):
            raise TypeError("embed_many takes a sequence of texts; for one text there is embed")
        texts = tuple(texts)
        if not texts:
            await trio.lowlevel.checkpoint()
            return []
        now = self._clock()
        size_bytes = size_of("".join(texts))
        due, deadline = self._admit(texts, size_bytes, deadline, priority, now=now)
        caller = Bulk(
            texts,
            task=current_task(),
            home=self._queue,
            arrived=now,
            due=due,
            rank=due - priority,
            return_errors=return_errors,
        )
        segment = Segment(caller, low=0, high=len(texts), size_bytes=size_bytes)
        return await self._wait(caller, segment, deadline)

    async def _wait(self, caller: Unwraps[T], entry: Entry, deadline: float) -> T:
        """Queue a caller's entry and park until it is answered, or until a deadline that is to be kept here."""
        queue = self._queue
        dispatcher = self._dispatcher
        if self._detailed:
            self._observer.observe(
                RequestSubmitted(rows=entry.rows, queue_rows=queue.rows + entry.rows)
            )
        queue.put(entry)
        dispatcher.arrived(entry.rows, entry.arrived)
        result: T
        if deadline == inf:
            result = await wait_task_rescheduled(caller)
            return result
        dispatcher.keep_deadline(deadline, entry.caller)
        try:
            result = await wait_task_rescheduled(caller)
        finally:
            dispatcher.drop_deadline(deadline, entry.caller)
        return result

    def expect(self, rows: int) -> None:
        """Announce rows that are about to come: they leave together, without a wait once all are here.

        Meanwhile what is queued waits for them, up to the policy's `max_wait_s`; then the announcement lapses.
        """
        if rows < 1:
            raise ValueError(f"expect takes a number of rows of at least 1, not {rows}")
        self._dispatcher.expect(rows)

    def flush(self) -> None:
        """Let the rows that are queued now leave as soon as there are free senders. Does not wait for them."""
        self._dispatcher.flush()

    def statistics(self) -> BatcherStatistics:
        """Return a look at the state and the counters."""
        now = self._clock()
        dispatcher = self._dispatcher
        courier = dispatcher.courier
        queue = self._queue
        return BatcherStatistics(
            queued_rows=queue.rows,
            queued_bytes=queue.size_bytes,
            oldest_age_s=now - queue.oldest if queue.rows else 0.0,
            calls_in_flight=sum(call.scope is not None for call in courier.calls),
            rows_in_flight=sum(part.rows for part in courier.parts()),
            paused_s=max(courier.paused_until - now, 0.0),
            answered_rows=courier.answered,
            failed_rows=courier.failed,
            expired_rows=dispatcher.expired,
            cancelled_rows=queue.cancelled,
            refused_rows=self._refused,
            calls=dict(courier.reasons),
            call_estimate_s=dispatcher.cost.estimate(self._policy.max_batch_rows),
        )

    # ----------------------------------------------------------------------------------------------------- admission

    def _admit(
        self,
        texts: Sequence[str],
        size_bytes: int,
        deadline: float,
        priority: float,
        *,
        now: float,
    ) -> tuple[float, float]:
        """Check a request against everything that stands against it.

        Returns:
            When it is due, and the deadline that is to be kept for it (infinity if its own scopes are as early).
        """
        policy = self._policy
        if "" in texts:
            raise ValueError("an empty text cannot be embedded")
        if math.isnan(deadline):
            raise ValueError("a deadline must not be NaN")
        if not 0 <= priority <= policy.patience_s:
            raise ValueError(
                f"priority must be between 0 and {policy.patience_s:g} s (patience_s), not {priority}"
            )
        ambient = trio.current_effective_deadline()
        due = min(deadline, ambient)
        try:
            if not self._open:
                raise self._closed_error()
            if (
                ambient > now
            ):  # else the caller is cancelled as it waits: that is better than an error
                self._check_time(len(texts), due - now)
            self._check_room(texts, size_bytes)
        except BatcherError:
            self._refused += len(texts)
            raise
        return min(due, now + policy.patience_s), inf if ambient <= deadline else deadline

    def _check_time(self, rows: int, remaining_s: float) -> None:
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline had passed when the request was made")
        needed_s = self._dispatcher.cost.optimistic(min(rows, self._policy.max_batch_rows))
        # An idle batcher tries in any case: else a server that was slow once would never be measured again.
        if remaining_s < needed_s and self._dispatcher.carrying:
            raise DeadlineUnreachableError(
                f"a call takes {needed_s:.3g} s at best, the deadline is in {remaining_s:.3g} s"
            )

    def _check_room(self, texts: Sequence[str], size_bytes: int) -> None:
        policy = self._policy
        queue = self._queue
        rows = len(texts)
        if rows > policy.max_queue_rows or size_bytes > policy.max_queue_bytes:
            raise RequestTooLargeError(
                f"{rows} rows of {size_bytes} bytes together can never fit into a queue of "
                f"{policy.max_queue_rows} rows and {policy.max_queue_bytes} bytes; send fewer at a time"
            )
        if size_bytes > policy.max_batch_bytes:
            longest = max(map(size_of, texts))
            if longest > policy.max_batch_bytes:
                raise RequestTooLargeError(
                    f"a text of {longest} bytes can never fit into a call of "
                    f"{policy.max_batch_bytes} bytes; shorten it"
                )
        if (
            queue.rows + rows > policy.max_queue_rows
            or queue.size_bytes + size_bytes > policy.max_queue_bytes
        ):
            raise QueueFullError(
                capacity=policy.max_queue_rows, retry_after_s=self._room_in_s(rows)
            )

    def _room_in_s(self, rows: int) -> float:
        """Estimate when the queue will have room for that many rows."""
        policy = self._policy
        excess = max(self._queue.rows + rows - policy.max_queue_rows, 1)
        rounds = math.ceil(excess / (policy.max_batch_rows * policy.max_in_flight))
        pause_s = max(self._dispatcher.courier.paused_until - self._clock(), 0.0)
        return pause_s + rounds * self._dispatcher.cost.estimate(policy.max_batch_rows)

    # -------------------------------------------------------------------------------------------------------- ending

    async def _drain(self) -> None:
        """Close the intake and wait, within the grace, until every row has its end."""
        self._open = False
        await self._dispatcher.drain(self._policy.grace_s)

    def _end(self, cause: BaseException | None) -> None:
        """Answer whoever still waits with BatcherClosedError, chained to the cause. Only the first time counts."""
        if self._ended:
            return
        self._ended = True
        self._open = False
        self._cause = cause
        self._dispatcher.close()
        courier = self._dispatcher.courier
        for entry in (*self._queue, *courier.parts()):
            courier.failed += entry.caller.fail(self._closed_error)
        courier.calls.clear()

    def _closed_error(self) -> BatcherClosedError:
        cause = self._cause
        if cause is None:
            return BatcherClosedError("the batcher is closed")
        if isinstance(cause, trio.Cancelled):
            return BatcherClosedError("the batcher is closed: it was cancelled")
        error = BatcherClosedError(f"the batcher is closed: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error


@asynccontextmanager
async def open_batcher(
    embedder: Embedder, *, policy: BatchPolicy | None = None, observer: Observer | None = None
) -> AsyncIterator[Batcher]:
    """Open a batcher around a list-in, list-out embedder.

    Args:
        embedder: called with lists of texts, by up to `max_in_flight` tasks at once.
        policy: when a batch leaves, and all bounds; by default `BatchPolicy()`.
        observer: hears of every call, and of every request if it is `detailed`.

    Leaving the block closes the intake, waits up to `grace_s` for what is queued or in flight, and answers the rest
    with BatcherClosedError. Leaving it by an error or a cancellation answers everybody at once. What the embedder
    raises that is no Exception (KeyboardInterrupt, say), and what the observer raises, ends the batcher and leaves
    this block.
    """
    policy = policy or BatchPolicy()
    batcher = Batcher(embedder, policy=policy, observer=observer or NullObserver())
    dispatcher = batcher._dispatcher  # noqa: SLF001 - its own module, here and below

    async def guarded(
        part: Callable[[], Awaitable[None]], *, task_status: trio.TaskStatus[None]
    ) -> None:
        task_status.started()  # before its parent runs again the part stands where it waits for work
        try:
            # Whatever cancels the whole stack reaches inner rings through the block's body: they may want to drain, and
            # need answers for that. The shield ends when the body is left.
            with trio.CancelScope(shield=True) as shield:
                shields.append(shield)
                await part()
        except BaseException as error:
            batcher._end(error)  # noqa: SLF001
            raise

    shields: list[trio.CancelScope] = []
    with plain_errors():
        async with trio.open_nursery() as nursery:
            for number in range(policy.max_in_flight):
                await nursery.start(guarded, dispatcher.send_rows, name=f"batcher sender {number}")
            await nursery.start(guarded, dispatcher.keep_time, name="batcher timekeeper")
            try:
                yield batcher
                await batcher._drain()  # noqa: SLF001
            except BaseException as error:
                batcher._end(error)  # noqa: SLF001
                raise
            else:
                batcher._end(None)  # noqa: SLF001
            finally:
                for shield in shields:
                    shield.cancel()
