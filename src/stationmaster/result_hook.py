"""The result hook: hears of each station's outcome beside the upload, for an older output that goes on meanwhile.

`async def on_result(station, result)` is called
1. once per station and batch, right after its outcome counted: succeeded, no output, failed, rejected, or timed out by
   its job's own limit. Not for what came late, and not for stations that were cut by the closing of their batch or are
   missing: they have no result, only a place in the report.
2. with the result as the handler gave it. If the report turns out too large (`limits.report_bytes`), the upload names
   that station failed all the same.
3. in a task of its own, one call at a time, in the order of the outcomes: no station, deadline or upload waits for it.
4. under bounds: 10,000 results wait, and so many bytes, those of their batches included; a call may take so long. What
   is beyond is dropped and told (`ResultHookTrouble`), as are its errors. At the end what waits has the time of one
   call to go out, all together.

MemoryError, and whatever is no Exception, ends the pipeline, as with handlers.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

import trio

from stationmaster.batch import StationInput
from stationmaster.events import ResultHookTrouble
from stationmaster.outcomes import is_cancellation, is_fatal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stationmaster.abc import Observer, ResultHook
    from stationmaster.batch import Batch, StationResult
    from stationmaster.outcomes import Collecting

_CAPACITY = 10_000  # results: a batch of the largest message by default


class HookQueue:
    """What waits for the hook. Opened by `open_result_hook`."""

    def __init__(
        self, on_result: ResultHook, *, max_bytes: int, limit_s: float, observer: Observer
    ) -> None:
        self._on_result = on_result
        self._bytes_left = max_bytes
        self._limit_s = limit_s
        self._observer = observer
        self._send, self._receive = trio.open_memory_channel[_Heard](_CAPACITY)
        self._in_time = trio.CancelScope()
        self._at_hand: _Heard | None = None
        # An entry lives as long as somebody holds its value: a job, or a result that waits.
        self._overheard: WeakValueDictionary[Collecting, _Overheard] = WeakValueDictionary()

    def overhear(self, collecting: Collecting) -> Collecting:
        """Return this open batch as one whose outcomes the hook hears: the same again for those that join it."""
        overheard = self._overheard.get(collecting)
        if overheard is None:
            overheard = self._overheard[collecting] = _Overheard(collecting, self)
        return overheard

    def put(self, heard: _Heard) -> None:
        """Let a result wait for the hook, or drop it. Never waits."""
        batch, _, result = heard
        batch_bytes = batch.size_bytes  # more than was charged when others joined it
        size = len(result.encoded) + batch_bytes - batch.charged
        if size <= self._bytes_left:
            try:
                self._send.send_nowait(heard)
            except trio.WouldBlock:
                pass
            except trio.BrokenResourceError:  # "stop now" was heard here first
                self._tell(heard, "closing")
                return
            else:
                batch.waiting += 1
                batch.charged = batch_bytes
                self._bytes_left -= size
                return
        self._tell(heard, "full")

    def close(self) -> None:
        """Take no more; what waits has the time of one call."""
        self._send.close()
        self._in_time.deadline = trio.current_time() + self._limit_s

    async def run(self) -> None:
        """Call the hook until it is closed."""
        try:
            with self._in_time:
                async for heard in self._receive:
                    self._at_hand = heard
                    await self._call(heard)
                    self._leave(heard)
                    self._at_hand = None
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Tell what is not heard any more."""
        if self._at_hand is not None:
            self._tell(self._at_hand, "closing")
        with self._receive, suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                self._tell(self._receive.receive_nowait(), "closing")

    async def _call(self, heard: _Heard) -> None:
        _, station, result = heard
        with trio.move_on_after(self._limit_s) as scope:  # noqa: ASYNC912
            try:
                await self._on_result(station, result)
            except Exception as error:
                if is_fatal(error):
                    raise
                self._tell(heard, "error", error)
            except BaseExceptionGroup as group:
                errors, rest = group.split(Exception)
                if errors is not None and is_fatal(errors):
                    raise
                if errors is not None:
                    self._tell(heard, "error", errors)
                if rest is not None:
                    raise rest from None
        if scope.cancelled_caught:
            self._tell(heard, "timeout")
        await trio.lowlevel.checkpoint()  # a hook that never waits has company

    def _leave(self, heard: _Heard) -> None:
        batch, _, result = heard
        batch.waiting -= 1
        self._bytes_left += len(result.encoded)
        if not batch.waiting:
            self._bytes_left += batch.charged
            batch.charged = 0

    def _tell(self, heard: _Heard, reason: str, error: Exception | None = None) -> None:
        station = heard[1]
        self._observer.observe(
            ResultHookTrouble(
                batch_id=station.batch_id,
                station_id=station.station_id,
                reason=reason,
                error=error,
            )
        )


class _Overheard:
    """An open batch that passes on the outcomes that count."""

    __slots__ = (
        "__weakref__",
        "_collecting",
        "_known",
        "_queue",
        "begin",
        "begin_call",
        "charged",
        "end",
        "end_call",
        "waiting",
    )

    def __init__(self, collecting: Collecting, queue: HookQueue) -> None:
        self._collecting = collecting
        self._queue = queue
        self._known: set[str] = set()
        self.begin = collecting.begin
        self.begin_call = collecting.begin_call
        self.end = collecting.end
        self.end_call = collecting.end_call
        self.waiting = 0
        """Results of it that wait for the hook."""
        self.charged = 0
        """Bytes of the batch that count while they do."""

    @property
    def batch(self) -> Batch:
        return self._collecting.batch

    @property
    def size_bytes(self) -> int:
        return self._collecting.size_bytes

    @property
    def closed(self) -> bool:
        return self._collecting.closed

    @property
    def opened(self) -> float:
        return self._collecting.opened

    @property
    def deadline(self) -> float:
        return self._collecting.deadline

    def settle(self, result: StationResult) -> None:
        collecting, station_id = self._collecting, result.station_id
        counts = not collecting.closed and station_id not in self._known
        collecting.settle(result)
        if counts:
            self._known.add(station_id)
            batch = collecting.batch
            station = StationInput(
                station_id, batch.entries[station_id], batch, batch.last_message[station_id]
            )
            self._queue.put((self, station, result))


_Heard: TypeAlias = tuple[_Overheard, StationInput, "StationResult"]


@asynccontextmanager
async def open_result_hook(
    on_result: ResultHook,
    *,
    max_bytes: int,
    limit_s: float,
    on_crash: Callable[[], None],
    observer: Observer,
) -> AsyncIterator[HookQueue]:
    """Own the task that calls the hook; leaving the block lets what waits go out, for `limit_s` at most.

    Args:
        on_result: see above.
        max_bytes: bound of the results that wait, and of their batches.
        limit_s: how long one call may take.
        on_crash: called before an error that ends the pipeline takes everything down.
        observer: hears of what the hook did not take.
    """
    queue = HookQueue(on_result, max_bytes=max_bytes, limit_s=limit_s, observer=observer)

    async def run() -> None:
        try:
            await queue.run()
        except BaseException as error:
            if not is_cancellation(error):
                on_crash()
            raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, name="result hook")
        yield queue
        queue.close()
