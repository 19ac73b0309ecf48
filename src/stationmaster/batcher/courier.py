"""What happens to rows that left the queue: the call, and parts of it again where that can help.

| the embedder                     | the rows                                                                         |
| -------------------------------- | -------------------------------------------------------------------------------- |
| answers                          | have their vectors                                                               |
| RowRejectedError, several rows   | halves are sent again until only the guilty rows fail                            |
| EmbedderUnavailableError         | are sent once more if they can still be in time, else fail                       |
| ProtocolError, wrong count       | the same: nothing of such an answer is used                                      |
| EmbedderBusyError                | go back into the queue if they can wait as long as asked, else fail; all pause   |
| any other Exception              | fail                                                                             |
| is cancelled by its last caller  | are nobody's; the server counts as busy for as long as a call usually takes      |

An embedder with several servers may choose another for the second try; it does not try again by itself, or the tries
multiply.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

import trio

from stationmaster.abc import NullObserver
from stationmaster.batcher.callers import row_error
from stationmaster.batcher.calls import hand_out
from stationmaster.errors import (
    DeadlineExceededError,
    EmbedderBusyError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.events import CallAbandoned, CallDone, CallFailed, CallStarted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stationmaster.abc import Embedder, Observer, Vector
    from stationmaster.batcher.callers import Entry, Single
    from stationmaster.batcher.calls import Call
    from stationmaster.batcher.cost import CostModel
    from stationmaster.batcher.policy import BatchPolicy
    from stationmaster.batcher.rows import RowQueue

_WAKE_SLICE: Final = 256  # callers woken before other tasks get a turn
_ONCE_MORE: Final = (EmbedderUnavailableError, ProtocolError)
_WITNESSES: Final = 3
"""Rows that are refused in the same words until that is believed of all others."""
_FEW_ROWS: Final = 8
"""So many are never given up unasked."""
# When a busy server names no time; doubles with each such answer in a row.
_FIRST_PAUSE_S: Final = 0.1


class Courier:
    """Carries calls to the embedder, for several senders at once."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        queue: RowQueue,
        cost: CostModel,
        policy: BatchPolicy,
        observer: Observer,
    ) -> None:
        self._embedder = embedder
        self._queue = queue
        self._cost = cost
        self._policy = policy
        self._observer = observer
        self._is_observed = not isinstance(observer, NullObserver)
        self._clock = trio.lowlevel.current_clock().current_time
        self._busy_answers = 0  # in a row
        self.calls: set[Call] = set()
        """Whose rows are neither answered nor queued: in flight, or waiting for their turn in a bisection."""
        self.paused_until: float = -inf
        """Nothing should be sent until then."""
        self.answered: int = 0
        """Rows, so far."""
        self.failed: int = 0
        """Rows, so far."""
        self.sent: int = 0
        """Texts, so far, each time they were sent."""
        self.shared: int = 0
        """Rows, so far, that got the vector of an identical one."""
        self.abandoned: int = 0
        """Calls, so far, that all their callers left."""
        self.reasons: Counter[str] = Counter()
        """Calls, so far, by their reason."""

    def parts(self) -> list[Entry]:
        """Return what its calls hold that somebody waits for."""
        return [part for call in self.calls for part in call.parts if part.task is not None]

    def admit(self, single: Single) -> bool:
        """Let a caller share an identical row in flight, if there is one; return whether it does."""
        at_most = self._policy.max_queue_rows
        return any(call.admit(single, at_most=at_most) for call in self.calls)

    async def attempt(self, call: Call, reason: str, scope: trio.CancelScope) -> Exception | None:
        """Make one call and hand out what it answers.

        Args:
            call: the rows.
            reason: why they are sent.
            scope: the innermost one around this; the last caller that leaves cancels it.

        Returns:
            What went wrong, to be given to `care`; None if the call was answered.
        """
        rows = call.rows
        texts = call.texts
        started = call.started = self._clock()
        self.calls.add(call)
        self.reasons[reason] += 1
        self.sent += len(texts)
        if self._is_observed:
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
        call.scope = scope
        try:
            # A copy: it may do with its list what it likes.
            answer = await self._embedder.embed(texts.copy())
            vectors = _rows(answer, len(texts))
        except Exception as error:  # noqa: BLE001 - whatever an embedder raises is answered to its callers
            failure = error
            if isinstance(error, EmbedderBusyError):
                self._pause(error)  # at once: another sender may be about to send
        except BaseExceptionGroup as group:
            self._raise_cancelled(call, group)
            raise
        except BaseException:
            self._observer.observe(CallAbandoned(rows=rows, seconds=self._clock() - started))
            raise
        finally:
            call.scope = None
        seconds = self._clock() - started
        if failure is not None:
            self._observer.observe(CallFailed(rows=rows, seconds=seconds, error=failure))
            return failure  # noqa: ASYNC910 - an embedder is a checkpoint
        self._busy_answers = 0
        self._cost.learn(rows=len(texts), seconds=seconds)
        if self._is_observed:
            self._observer.observe(CallDone(rows=rows, seconds=seconds))
        parts = call.parts
        self.shared += call.rows - len(texts)
        vectors = call.expand(vectors)
        answered, at = hand_out(parts[:_WAKE_SLICE], vectors, 0)
        self.answered += answered
        for start in range(_WAKE_SLICE, len(parts), _WAKE_SLICE):
            # Shielded: what is answered is not taken back.
            await trio.lowlevel.cancel_shielded_checkpoint()
            answered, at = hand_out(parts[start : start + _WAKE_SLICE], vectors, at)
            self.answered += answered
        call.answered = True
        # Each of them knows its call: without the cycle they are freed at once, and not by the collector.
        parts.clear()
        self.calls.discard(call)
        return None  # noqa: ASYNC910 - an embedder is a checkpoint

    async def care(self, call: Call, failure: Exception | None) -> None:
        """See a call that is in trouble to its end; `failure` is None if everybody left it."""
        # A server that fails at once must not keep others from running.
        await trio.lowlevel.checkpoint()
        if failure is None:
            await self._wait_out(call)
            return
        if isinstance(failure, _ONCE_MORE) and await self._may_send_again(
            call, partial(row_error, failure)
        ):
            failure = await self._attempt_again(call, "retry")
        if isinstance(failure, RowRejectedError) and len(call.texts) > 1:
            await self._bisect(call, failure)
        elif failure is not None:
            self._give_up(call, failure)

    async def _attempt_again(self, call: Call, reason: str) -> Exception | None:
        failure = None
        with trio.CancelScope() as scope:
            failure = await self.attempt(call, reason, scope)
        if scope.cancelled_caught:
            await self._wait_out(call)
        return failure  # noqa: ASYNC910 - an attempt is a checkpoint

    async def _wait_out(self, call: Call) -> None:
        """Wait until a server that goes on with an abandoned call must be ready with it."""
        self.calls.discard(call)
        if call.answered:
            await trio.lowlevel.checkpoint()
            return
        self.abandoned += 1
        await trio.sleep_until(call.started + self._cost.estimate(len(call.texts)))

    async def _bisect(  # noqa: ASYNC910 - called only with rows to send
        self, call: Call, refusal: RowRejectedError
    ) -> None:
        """Send the halves of a refused call again until only guilty rows are left: log2(rows) + 1 rounds at most.

        After a guilty row the largest part that is left comes next, down to a single row. If the first three single
        rows are refused in the same words and nothing was accepted so far, the fault is not in the rows, and the rest
        fails unsent: a wrong setting would else cost two calls per row. A few rows are all asked for.
        """
        pending: list[Call] = []
        words: list[str] = []
        may_stop = len(call.texts) > _FEW_ROWS
        self._halve(call, pending)
        while pending:
            part = pending.pop()
            if not await self._may_send_again(part, partial(_undecided, refusal)):
                continue
            error = await self._attempt_again(part, "bisect")
            if isinstance(error, _ONCE_MORE) and await self._may_send_again(
                part, partial(row_error, error)
            ):
                error = await self._attempt_again(part, "retry")
            if not isinstance(error, RowRejectedError):
                may_stop = may_stop and not part.answered
                if error is not None:
                    self._give_up(part, error)
            elif len(part.texts) > 1:
                refusal = error
                self._halve(part, pending)
            else:
                self._give_up(part, error)
                words.append(str(error))
                if may_stop and len(words) == _WITNESSES and len(set(words)) == 1:
                    for rest in pending:
                        self._give_up(rest, error)
                    return
                pending.sort(key=lambda rest: len(rest.texts))

    def _halve(self, call: Call, pending: list[Call]) -> None:
        call.prune()
        if not call.rows:
            self.calls.discard(call)
            return
        pending.append(call)
        if len(call.texts) > 1:
            half = call.split()
            self.calls.add(half)
            pending.append(half)

    async def _may_send_again(self, call: Call, make_error: Callable[[], Exception]) -> bool:
        """Sit out a pause that the server asked for meanwhile, and fail the rows that cannot be answered in time then.

        Returns:
            Whether any are left: they may be sent now.
        """
        while True:
            now = self._clock()
            instant = max(now, self.paused_until) + self._cost.estimate(len(call.texts))
            self.failed += call.fail_late(instant, make_error)
            if not call.rows:
                self.calls.discard(call)
                return False  # noqa: ASYNC910 - without a pause there is nothing to wait for
            if self.paused_until <= now:
                return True  # noqa: ASYNC910 - likewise
            await trio.sleep_until(self.paused_until)

    def _give_up(self, call: Call, error: Exception) -> None:
        """Fail a call's rows; if the server was just busy, only those that cannot wait."""
        if isinstance(error, EmbedderBusyError):
            restart = self.paused_until + self._cost.estimate(len(call.texts))
            self.failed += call.fail_late(restart, partial(row_error, error))
            self._queue.put_back(call)
        else:
            self.failed += sum(part.fail(partial(row_error, error)) for part in call.parts)
        self.calls.discard(call)

    def _raise_cancelled(self, call: Call, group: BaseExceptionGroup) -> None:
        """Raise the Cancelled alone out of a group that holds Exceptions besides.

        Nobody waits for those: the observer hears of them. Raised together they would end the batcher.
        """
        cancelled, errors = group.split(trio.Cancelled)
        if cancelled is not None and (errors is None or isinstance(errors, ExceptionGroup)):
            seconds = self._clock() - call.started
            if errors is None:
                self._observer.observe(CallAbandoned(rows=call.rows, seconds=seconds))
            else:
                self._observer.observe(CallFailed(rows=call.rows, seconds=seconds, error=errors))
            raise cancelled from None

    def _pause(self, error: EmbedderBusyError) -> None:
        pause_s = error.retry_after_s
        if (
            pause_s is None or not pause_s > 0
        ):  # to ask at once again, as 0 has it, would be a storm
            pause_s = _FIRST_PAUSE_S * 2 ** min(self._busy_answers, 20)
        self._busy_answers += 1
        instant = self._clock() + min(pause_s, self._policy.patience_s)
        self.paused_until = max(self.paused_until, instant)


def _undecided(refusal: RowRejectedError) -> DeadlineExceededError:
    error = DeadlineExceededError(
        "the row was refused together with others, and there is no time left to ask for it alone"
    )
    error.__cause__ = refusal
    return error


def _rows(answer: Any, count: int) -> Sequence[Vector]:  # noqa: ANN401 - whatever it is
    """Read the rows of an answer, once: what cannot be read must fail here, not half-way through handing out.

    Raises:
        ProtocolError: it is no sequence of that many.
    """
    if type(answer) is list:
        rows = answer
    elif isinstance(answer, str | bytes):
        raise _no_sequence(answer, count)
    else:
        try:
            answer[:0]  # a dict has a length too
            rows = [answer[row] for row in range(len(answer))]
        except Exception as error:
            raise _no_sequence(answer, count) from error
    if len(rows) != count:
        raise ProtocolError(f"the embedder answered {count} texts with {len(rows)} vectors")
    return rows


def _no_sequence(answer: object, count: int) -> ProtocolError:
    kind = type(answer).__name__
    return ProtocolError(f"the embedder answered {count} texts with {kind}, not a list of vectors")
