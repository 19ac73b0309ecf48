"""The replay: it delivers what lies in the outbox, and knows whether the target is down.

Rules:
1. Oldest first, those that failed behind those that were not tried: a batch that the target cannot bear stands in
   nobody's way. At most `connections` at once: it starts with one at a time and widens with every batch that is
   accepted, narrows with every failure. After an hour of outage the target is not trampled, and direct uploads go
   their own way meanwhile.
2. A batch that fails is due again after its own back-off, which stands in its row; the others go on.
3. While the breaker (see `stationmaster.state.breaker`) is open, one batch at a time is the probe: the first in this
   order, and not the same twice if there is another.
4. What became of a batch is written down before anything else is sent: if the disk does not take it, only that is
   tried, about once a second. So this process never sends a batch again that was accepted.
5. A rejected batch is a dead letter first, and then no row any more: a crash in between makes neither none nor two.
6. Bodies are read when they are sent. Times in rows are wall clock; one that lies further ahead than any back-off
   (the clock was put back) is over.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

import attrs
import trio

from stationmaster.abc import Accepted, NullObserver, Rejected, TryAgain
from stationmaster.batch import DeadLetter
from stationmaster.errors import StoreError, plain_errors
from stationmaster.events import (
    DeadLettersKept,
    OutboxDelivered,
    OutboxRejected,
    OutboxRetried,
    UploadAttempted,
    UploadsResumed,
)
from stationmaster.reports import encode_report
from stationmaster.state.bounds import shortened
from stationmaster.state.breaker import Backoff, Breaker
from stationmaster.state.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from stationmaster.abc import DeadLetters, Observer, Unavailable, UploadAnswer
    from stationmaster.batch import BatchReport, KeptBatch
    from stationmaster.events import UploadsDiverted
    from stationmaster.state.outbox import OutboxRows

_LOOK_S: Final = 1.0
"""How often what others do is looked at: rows that are due, what the command line wrote, a disk that failed."""
_CHANGE_S: Final = 2.0
_SEND_S: Final = 60.0
"""A sink's own time-outs are shorter; this is for one that has none."""


@attrs.define(eq=False)
class Replay:
    """A `stationmaster.abc.Outbox` that delivers; made by `open_outbox`."""

    _rows: OutboxRows
    _send: Callable[[str, bytes], Awaitable[UploadAnswer]]
    _dead_letters: DeadLetters
    _breaker: Breaker
    _connections: int
    _ledger: Ledger
    _observer: Observer
    _clock: Callable[[], float]
    """Wall clock."""
    _under_way: set[str] = attrs.field(factory=set, init=False)
    _width: float = attrs.field(default=1.0, init=False)
    """How many may be sent at once, at present."""
    _last_probe: str = attrs.field(default="", init=False)
    _look_at: float = attrs.field(default=float("-inf"), init=False)
    _is_asked: bool = attrs.field(default=False, init=False)
    """An operator wants to see deliveries tried now."""
    _woken: trio.Event = attrs.field(factory=trio.Event, init=False)
    _changed: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    # --------------------------------------------------------------------------------------------------- the outbox

    @property
    def is_diverting(self) -> bool:
        """See `stationmaster.abc.Outbox`."""
        return self._breaker.is_open

    def note(self, answer: UploadAnswer, /) -> None:
        """See `stationmaster.abc.Outbox`."""
        self._say(self._breaker.note(answer, now=trio.current_time()))

    def holds(self, batch_id: str, /) -> bool:
        """See `stationmaster.abc.Outbox`."""
        return self._rows.holds(batch_id)

    async def put(self, report: BatchReport, /, *, reason: str) -> None:
        """See `stationmaster.abc.Outbox`."""
        batch = report.batch
        await self._rows.put(
            batch.batch_id,
            topic=batch.topic,
            ranges=batch.ranges,
            body=encode_report(report),
            kept_at=self._clock(),
            reason=reason,
        )
        self._woken.set()

    async def wait_change(self) -> None:
        """Wait until a row left, or batches are not diverted any more; at most 2 s."""
        with trio.move_on_after(_CHANGE_S):
            await self._changed.park()

    # --------------------------------------------------------------------------------------------------- the replay

    async def run(self, nursery: trio.Nursery) -> None:
        """Deliver until cancelled, by tasks in this nursery."""
        while True:
            self._woken = trio.Event()
            try:
                await self._work(nursery)
            except StoreError as error:
                self._ledger.say_blocked(error)
                self._leave_it_to_direct_uploads()
            pause = _LOOK_S
            if self._breaker.is_open:
                until_probe = self._breaker.probe_at - trio.current_time()
                pause = min(pause, until_probe) if until_probe > 0 else pause
            with trio.move_on_after(pause):
                await self._woken.wait()

    async def _work(self, nursery: trio.Nursery) -> None:
        """Write down what must be, look around, and start what may be sent now."""
        for batch_id in self._ledger.rest(self._under_way):
            await self._ledger.write(batch_id)
            self._changed.unpark_all()
        if trio.current_time() >= self._look_at:
            self._look_at = trio.current_time() + _LOOK_S
            self._is_asked |= await self._rows.refresh()
        if (
            self._is_asked and not self._under_way
        ):  # a probe that is under way may have begun too early
            self._is_asked = False
            self._breaker.probe_now(trio.current_time())
        candidates = await self._candidates()
        self._ledger.say_unblocked()
        # No checkpoint from here on: the room that is seen is still there when it is taken.
        if not len(self._rows):
            self._leave_it_to_direct_uploads()
        is_probe = self._breaker.is_open
        if is_probe:
            others = [row for row in candidates if row.batch_id != self._last_probe]
            candidates = others or candidates
        for row in candidates[: self._room()]:
            self._under_way.add(row.batch_id)
            if is_probe:
                self._last_probe = row.batch_id
            deliver = partial(self._deliver, row, is_probe=is_probe)
            nursery.start_soon(deliver, name=f"outbox {row.batch_id}")

    async def _candidates(self) -> list[KeptBatch]:
        """Return what may be sent next, as far as there is room for it."""
        if not self._room() or not len(self._rows):
            await trio.lowlevel.checkpoint()
            return []
        now = self._clock()
        found = await self._rows.due(
            now,
            latest=now + self._breaker.backoff.max_s,
            limit=2 * self._connections,  # some of them are under way
        )
        return [row for row in found if row.batch_id not in self._under_way]

    def _room(self) -> int:
        """Return how many more may be sent now."""
        if self._ledger.rest(self._under_way):
            return 0
        if self._breaker.is_open:
            return int(self._may_probe())
        return max(0, int(self._width) - len(self._under_way))

    def _may_probe(self) -> bool:
        return not self._under_way and trio.current_time() >= self._breaker.probe_at

    def _leave_it_to_direct_uploads(self) -> None:
        """There is nothing here to probe with: when the time has come, let them find out."""
        if self._breaker.is_open and self._may_probe():
            self._breaker.try_directly()
            self._changed.unpark_all()

    async def _deliver(self, row: KeptBatch, *, is_probe: bool) -> None:
        """Send one batch once, and write down what became of it."""
        try:
            try:
                body = await self._rows.body(row.batch_id)
            except StoreError as error:
                await self._failed(row, TryAgain(reason=f"it cannot be read: {error}"))
                return
            if body is None:
                return
            answer: UploadAnswer = TryAgain(reason=f"no answer within {_SEND_S:g} s")
            began = trio.current_time()
            with trio.move_on_after(_SEND_S):
                answer = await self._send(row.batch_id, body)
            self._adapt(answer)
            now = trio.current_time()
            self._observer.observe(
                UploadAttempted(
                    batch_id=row.batch_id,
                    status=answer.status,
                    seconds=now - began,
                    from_outbox=True,
                )
            )
            self._say(self._breaker.note(answer, now=now, row=row.batch_id, is_probe=is_probe))
            match answer:
                case Accepted():
                    await self._accepted(row, answer)
                case Rejected():
                    await self._rejected(row, body, answer)
                case _:
                    await self._failed(row, answer)
        finally:
            self._under_way.discard(row.batch_id)
            self._woken.set()

    async def _accepted(self, row: KeptBatch, answer: Accepted) -> None:
        await self._settle(row.batch_id, partial(self._rows.delete, row.batch_id))
        self._observer.observe(
            OutboxDelivered(
                batch_id=row.batch_id,
                attempts=row.attempts + 1,
                waited_s=max(0.0, self._clock() - row.kept_at),
                sent_bytes=answer.sent_bytes,
                rows_left=len(self._rows),
            )
        )

    async def _rejected(self, row: KeptBatch, body: bytes, answer: Rejected) -> None:
        letter = DeadLetter(
            reason="rejected-upload",
            detail=shortened(f"{answer.status}: {answer.answer}"),
            topic=row.topic,
            partition=row.partition,
            offset=row.offset,
            value=body,
            batch_id=row.batch_id,
        )
        try:
            await self._dead_letters.keep([letter])
        except StoreError as error:
            words = f"rejected ({letter.detail}), but no dead letter yet: {error}"
            await self._failed(row, TryAgain(reason=words))
            return
        self._observer.observe(DeadLettersKept(letters=(letter,)))
        await self._settle(row.batch_id, partial(self._rows.delete, row.batch_id))
        self._observer.observe(
            OutboxRejected(batch_id=row.batch_id, status=answer.status, answer=answer.answer)
        )

    async def _failed(self, row: KeptBatch, answer: TryAgain | Unavailable) -> None:
        pause = self._breaker.backoff.pause_s(answer, attempt=row.attempts + 1)
        self._observer.observe(
            OutboxRetried(
                batch_id=row.batch_id,
                attempts=row.attempts + 1,
                reason=answer.reason,
                retry_in_s=pause,
            )
        )
        until = self._clock() + pause
        write = partial(self._rows.postpone, row.batch_id, until=until, reason=answer.reason)
        await self._settle(row.batch_id, write)

    async def _settle(self, batch_id: str, write: Callable[[], Awaitable[None]]) -> None:
        if await self._ledger.settle(batch_id, write):
            self._changed.unpark_all()

    def _adapt(self, answer: UploadAnswer) -> None:
        if isinstance(answer, Accepted | Rejected):
            self._width = min(self._width + 1 / int(self._width), self._connections)
        else:
            self._width = max(self._width / 2, 1.0)

    def _say(self, event: UploadsDiverted | UploadsResumed | None) -> None:
        if event is None:
            return
        if isinstance(event, UploadsResumed):
            self._width = 1.0
            self._changed.unpark_all()
        self._woken.set()
        self._observer.observe(event)


@asynccontextmanager
async def open_outbox(
    rows: OutboxRows,
    *,
    send: Callable[[str, bytes], Awaitable[UploadAnswer]],
    dead_letters: DeadLetters,
    max_backoff_s: float = 30.0,
    connections: int = 4,
    failures: int = 5,
    observer: Observer | None = None,
    clock: Callable[[], float] = time.time,
    jitter: Random | None = None,
) -> AsyncIterator[Replay]:
    """Open the outbox over these rows, and deliver what lies in them until the block is left.

    Args:
        rows: `State.outbox`.
        send: sends a body once (`stationmaster.abc.BodySink.send`); what it raises is a bug and ends the block.
        dead_letters: take what the target rejects.
        max_backoff_s: the longest pause between attempts, for one batch and for probes of the target.
        connections: how many batches may be sent (and be in memory) at once.
        failures: so many passing failures in a row mean that the target is down.
        observer: hears the outbox's events, and when the target goes and comes.
        clock: wall clock, seconds since the epoch.
        jitter: a seeded source for tests.

    Leaving cancels what is being sent; its rows stay.
    """
    observer = observer or NullObserver()
    backoff = Backoff(max_s=max_backoff_s, jitter=jitter or Random())  # noqa: S311 - spreads retries, guards nothing
    replay = Replay(
        rows,
        send,
        dead_letters,
        Breaker(failures=failures, backoff=backoff),
        connections,
        Ledger(observer),
        observer,
        clock,
    )
    with plain_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replay.run, nursery, name="outbox replay")
            yield replay
            nursery.cancel_scope.cancel()
