"""The request batcher as callers see it: many callers with a text each, few calls to the model server."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, overload

import trio
from trio.lowlevel import current_task, wait_task_rescheduled

from stationmaster.batcher.admission import Admission, check_texts
from stationmaster.batcher.bulks import Bulk, Segment
from stationmaster.batcher.callers import CountedSingle, Single
from stationmaster.batcher.dispatcher import PROMPT_S, Dispatcher
from stationmaster.batcher.statistics import BatcherStatistics
from stationmaster.events import RequestSubmitted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stationmaster.abc import Embedder, Observer, Vector
    from stationmaster.batcher.callers import Entry
    from stationmaster.batcher.policy import BatchPolicy

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_is_ascii = str.isascii


class Unwraps(Protocol[T_co]):
    """What a parked caller is woken with."""

    def __call__(self, raise_cancel: trio.lowlevel.RaiseCancelT, /) -> trio.lowlevel.Abort:
        """Be the abort callback."""
        ...

    def unwrap(self) -> T_co:
        """Return or raise in the caller's task."""
        ...


class Batcher:
    """Gathers rows of many callers into calls. Opened by `open_batcher`.

    One batcher is one lane: rows share calls if, and only if, they may, that is for one model, dimension and encoding.
    For another of these open another batcher, with an embedder of its own.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        policy: BatchPolicy,
        observer: Observer,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        self._policy = policy
        self._observer = observer
        self._dispatcher = Dispatcher(embedder, policy=policy, observer=observer)
        self._queue = self._dispatcher.queue
        self._admission = Admission(self._dispatcher, policy=policy, count_tokens=count_tokens)
        self._clock = trio.lowlevel.current_clock().current_time  # a third of trio.current_time
        self._has_ended = False

    async def embed(self, text: str, *, deadline: float = inf, priority: float = 0.0) -> Vector:
        """Embed one text, in a call shared with others.

        Args:
            text: what to embed, not empty.
            deadline: absolute, on trio's clock. The ambient one (`trio.current_effective_deadline()`) counts as well
                (for rank and refusal only where rows wait longer than 100 ms) and is exact; this one is kept by the
                batcher, needs no scope, and may strike 10 ms late.
            priority: seconds by which it is ranked as though it was due earlier, at most the policy's `patience_s`. A
                head start, not a class: others grow older and come first in the end.

        Returns:
            The vector.

        Raises:
            TypeError, ValueError: at once, it is no text, is empty, or has a lone surrogate.
            QueueFullError: at once, nothing was queued.
            RequestTooLargeError: at once, it can never fit.
            DeadlineUnreachableError: at once; by what calls are known to take, the rows ahead, and a pause that the
                server asked for, even the best case is too late.
            DeadlineExceededError: the deadline passed.
            BatcherClosedError: the batcher is closing, or died (then the cause is chained).
            EmbedderError: what the model server made of it; an instance of the caller's own.

        If cancelled, its row is taken back and harms nobody; the last caller of a call in flight cancels the call.
        """
        queue = self._queue
        fresh = queue.fresh
        try:
            size_bytes = len(text) if _is_ascii(text) else len(text.encode())
        except (TypeError, UnicodeEncodeError):
            size_bytes = 0  # to be refused
        if len(fresh) >= queue.free or not 0 < size_bytes <= queue.fresh_bytes or priority:
            return await self._embed_with_care(text, deadline, priority)
        if deadline == inf:
            if not fresh:
                queue.fresh_since = self._clock()
            single = Single(text, current_task(), queue)
            fresh.append(single)
            if self._dispatcher.alert:
                self._dispatcher.arrived(1, queue.fresh_since)
            vector: Vector = await wait_task_rescheduled(single)
            return vector
        now = self._clock()
        if not deadline > now + PROMPT_S:
            return await self._embed_with_care(text, deadline, priority)
        single = Single(text, current_task(), queue)
        due = min(deadline, now + self._policy.patience_s)
        self._put(single, now, due, due)
        return await self._wait(single, single, deadline)

    async def _embed_with_care(self, text: str, deadline: float, priority: float) -> Vector:
        now = self._clock()
        texts = (text,)
        check_texts(texts)
        tokens = self._admission.count(texts)
        due, deadline = self._admission.admit(
            texts, tokens=tokens, now=now, deadline=deadline, priority=priority, first_rows=1
        )
        queue = self._queue
        single = (
            Single(text, current_task(), queue)
            if tokens is None
            else CountedSingle(text, current_task(), queue, tokens[0])
        )
        single.arrived, single.due, single.rank = now, due, due - priority
        if not (self._policy.share_identical and self._dispatcher.courier.admit(single)):
            self._put(single, now, due, due - priority)
        return await self._wait(single, single, deadline)

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
        queue = self._queue
        size_bytes = check_texts(texts)
        if (
            len(texts) + len(queue.fresh) <= queue.free
            and size_bytes <= queue.fresh_bytes
            and deadline == inf
            and not priority
        ):
            bulk = Bulk(texts, None, current_task(), queue, return_errors)
            due = now + self._policy.patience_s
            self._put(Segment(bulk, 0, len(texts), size_bytes, 0, queue), now, due, due)
            results: list[Vector | Exception] = await wait_task_rescheduled(bulk)
            return results
        tokens = self._admission.count(texts)
        due, deadline = self._admission.admit(
            texts,
            tokens=tokens,
            now=now,
            deadline=deadline,
            priority=priority,
            first_rows=1 if return_errors else len(texts),
        )
        bulk = Bulk(texts, tokens, current_task(), queue, return_errors)
        total = 0 if tokens is None else sum(tokens)
        segment = Segment(bulk, 0, len(texts), size_bytes, total, queue)
        self._put(segment, now, due, due - priority)
        return await self._wait(bulk, segment, deadline)

    def _put(self, entry: Entry, now: float, due: float, rank: float) -> None:
        rows = entry.rows
        queue = self._queue
        if self._dispatcher.is_detailed:
            self._observer.observe(RequestSubmitted(rows=rows, queue_rows=queue.rows + rows))
        queue.put(entry, now, due, rank)
        if self._dispatcher.alert:
            self._dispatcher.arrived(rows, now)

    async def _wait(self, caller: Unwraps[T], entry: Entry, deadline: float) -> T:
        """Park until it is answered, or until a deadline that is to be kept here."""
        result: T
        if deadline == inf:
            result = await wait_task_rescheduled(caller)
            return result
        dispatcher = self._dispatcher
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
        dispatcher = self._dispatcher
        courier = dispatcher.courier
        queue = self._queue
        refusals = self._admission.refusals
        return BatcherStatistics(
            queued_rows=queue.rows,
            queued_bytes=queue.size_bytes,
            queued_tokens=queue.tokens,
            oldest_age_s=self._clock() - queue.oldest if queue.rows else 0.0,
            calls_in_flight=sum(call.scope is not None for call in courier.calls),
            rows_in_flight=sum(part.rows for part in courier.parts()),
            busy_senders=dispatcher.carrying,
            paused_s=dispatcher.paused_s(),
            answered_rows=courier.answered,
            failed_rows=courier.failed,
            expired_rows=dispatcher.expired,
            cancelled_rows=queue.cancelled,
            refused_rows=refusals.total(),
            refusals=dict(refusals),
            sent_texts=courier.sent,
            shared_rows=courier.shared,
            calls=dict(courier.reasons),
            abandoned_calls=courier.abandoned,
            call_estimate_s=dispatcher.cost.estimate(self._policy.max_batch_rows),
        )

    async def drain(self) -> None:
        """Close the intake and wait, within the policy's grace, until every row has its end; for `open_batcher`."""
        self._admission.close()
        await self._dispatcher.drain(self._policy.grace_s)

    def end(self, cause: BaseException | None) -> None:
        """Answer whoever still waits with BatcherClosedError, chained to the cause; for `open_batcher`.

        Without a checkpoint, and only the first time counts.
        """
        if self._has_ended:
            return
        self._has_ended = True
        admission = self._admission
        admission.close(cause)
        self._dispatcher.close()
        courier = self._dispatcher.courier
        for entry in (*self._queue, *courier.parts()):
            courier.failed += entry.caller.fail(admission.closed_error)
        courier.calls.clear()
