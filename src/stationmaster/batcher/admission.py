"""What a batcher takes: sound texts, for which there is room, and which can be answered in time.

What is refused is refused at once: nothing was queued, and nothing is awaited.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import trio

from stationmaster.batcher.callers import size_of
from stationmaster.errors import (
    BatcherClosedError,
    BatcherError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    QueueFullError,
    RequestTooLargeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stationmaster.batcher.dispatcher import Dispatcher
    from stationmaster.batcher.policy import BatchPolicy


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of a text: one per two bytes, which is more than nearly every tokenizer makes of it."""
    return size_of(text) // 2 + 1


class Admission:
    """The door of a batcher: it says when a request is due, or raises."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        policy: BatchPolicy,
        count_tokens: Callable[[str], int] | None,
    ) -> None:
        self._dispatcher = dispatcher
        self._policy = policy
        self._count_tokens = count_tokens
        self._is_open = True
        self._cause: BaseException | None = None
        self.refusals: Counter[str] = Counter()
        """Rows, so far, by the name of the error."""

    def admit(
        self,
        texts: Sequence[str],
        *,
        tokens: Sequence[int] | None,
        now: float,
        deadline: float,
        priority: float,
        first_rows: int,
    ) -> tuple[float, float]:
        """Check a request against everything that stands against it.

        Args:
            texts: its rows, at least one, checked.
            tokens: of each row, if they are counted.
            now: the time.
            deadline: as the caller gave it.
            priority: as the caller gave it.
            first_rows: so many of the rows must be answered in time, or nothing is gained.

        Returns:
            When it is due, and the deadline that is to be kept for it (infinity if its own scopes are as early).

        Raises:
            ValueError: an argument is not what it should be.
            BatcherError: see `Batcher.embed`.
        """
        policy = self._policy
        size_bytes = size_of("".join(texts))
        if math.isnan(deadline):
            raise ValueError("a deadline must not be NaN")
        if not 0 <= priority <= policy.patience_s:
            raise ValueError(
                f"priority must be between 0 and {policy.patience_s:g} s (patience_s), not {priority}"
            )
        ambient = trio.current_effective_deadline()
        due = min(deadline, ambient)
        patient = now + policy.patience_s
        try:
            if not self._is_open:
                raise self.closed_error()
            self._check_size(texts, size_bytes, tokens)
            # A caller that is cancelled already is cancelled as it waits: that is better than an error.
            if now < ambient:
                self._check_time(first_rows, now, due, rank=min(due, patient) - priority)
            self._check_room(len(texts), size_bytes)
        except BatcherError as error:
            self.refusals[type(error).__name__] += len(texts)
            raise
        return min(due, patient), math.inf if ambient <= deadline else deadline

    def count(self, texts: Sequence[str]) -> list[int] | None:
        """Count tokens if the policy has a bound of them. What the callback raises is the caller's."""
        if self._count_tokens is None:
            return None
        counts = [self._count_tokens(text) for text in texts]
        for row, tokens in enumerate(counts):
            if type(tokens) is not int or tokens < 0:
                raise ValueError(
                    f"count_tokens must return a whole number of at least 0, not {tokens!r} (text {row})"
                )
        return counts

    def close(self, cause: BaseException | None = None) -> None:
        """Take nothing more; `cause` is what ended the batcher, if something did."""
        self._is_open = False
        self._cause = cause

    def closed_error(self) -> BatcherClosedError:
        """Make the error of those who come too late, or waited when it ended."""
        cause = self._cause
        if cause is None:
            return BatcherClosedError("the batcher is closed")
        if isinstance(cause, trio.Cancelled):
            return BatcherClosedError("the batcher is closed: it was cancelled")
        error = BatcherClosedError(f"the batcher is closed: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error

    def _check_size(
        self, texts: Sequence[str], size_bytes: int, tokens: Sequence[int] | None
    ) -> None:
        policy = self._policy
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
        if policy.max_batch_tokens is not None and tokens is not None:
            most = max(tokens)
            if most > policy.max_batch_tokens:
                raise RequestTooLargeError(
                    f"a text of {most} tokens can never fit into a call of "
                    f"{policy.max_batch_tokens} tokens; shorten it"
                )

    def _check_time(self, rows: int, now: float, due: float, *, rank: float) -> None:
        """Refuse what would be late even if every call were as quick as calls ever are."""
        if due <= now:
            raise DeadlineExceededError("the deadline had passed when the request was made")
        if due == math.inf:
            return
        dispatcher = self._dispatcher
        policy = self._policy
        begin = max(dispatcher.courier.paused_until, now)
        # An idle batcher tries in any case: else a server that was slow once would never be measured again.
        if dispatcher.carrying:
            cost = dispatcher.cost
            per_round = policy.max_batch_rows * policy.max_in_flight
            ahead = 0 if policy.share_identical else dispatcher.queue.ahead_of(rank)
            rounds = math.ceil((ahead + rows) / per_round)
            begin += (rounds - 1) * cost.optimistic(policy.max_batch_rows)
            begin += cost.optimistic(min(rows, policy.max_batch_rows))
        if due < begin:
            raise DeadlineUnreachableError(
                f"it would be answered in {begin - now:.3g} s at best, the deadline is in {due - now:.3g} s"
            )

    def _check_room(self, rows: int, size_bytes: int) -> None:
        policy = self._policy
        queue = self._dispatcher.queue
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
        dispatcher = self._dispatcher
        excess = max(dispatcher.queue.rows + rows - policy.max_queue_rows, 1)
        rounds = math.ceil(excess / (policy.max_batch_rows * policy.max_in_flight))
        return dispatcher.paused_s() + rounds * dispatcher.cost.estimate(policy.max_batch_rows)


def check_texts(texts: Sequence[str]) -> int:
    """Refuse what no model server could be sent; return the size in bytes.

    Raises:
        TypeError, ValueError: a text is none, is empty, or is no Unicode.
    """
    try:
        size_bytes = size_of("".join(texts))
    except (TypeError, UnicodeEncodeError) as error:
        raise _text_error(texts) from error
    if not all(texts):
        raise ValueError("an empty text cannot be embedded")
    return size_bytes


def _text_error(texts: Sequence[object]) -> Exception:
    row, text = next(each for each in enumerate(texts) if not _is_unicode(each[1]))
    if isinstance(text, str):
        return ValueError(f"text {row} has a lone surrogate, which no JSON can hold")
    return TypeError(f"texts are str, not {type(text).__name__} (text {row})")


def _is_unicode(text: object) -> bool:
    return isinstance(text, str) and not any("\ud800" <= char <= "\udfff" for char in text)
