"""The hand-over between the pump's thread and trio: this side of it runs in trio's thread only.

Rules:
1. A record is handed out when `poll` returns it, not before: what waits here when its generation ends is dropped and
   comes again at the partition's next owner.
2. What is accounted for under an older generation is dropped.
3. Who watches withdrawals hears of every generation that ends, after its drain; no record of it is returned after
   that. Once the source is being left there is nobody to hear it.
4. Who watches also hears at the beginning of a drain, and gives back what it has not begun: that comes again at the
   partition's next owner, as does what waits here.
5. Callbacks from the pump never raise (there it would end trio itself): an error of the observer is kept, and raised
   by the next `poll` or when the source is left. After closing, polls that still arrive are dropped and counted.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from queue import SimpleQueue

    from stationmaster.abc import Observer, Withdrawn
    from stationmaster.batch import OffsetRange, Record
    from stationmaster.events import Event
    from stationmaster.kafka.assignment import Drain, Holding, Key
    from stationmaster.offsets import Lease


class Command(enum.Enum):
    """What trio asks of the pump."""

    MORE = enum.auto()
    """One more poll."""
    STOP = enum.auto()
    """Commit what is accounted for, and close."""


@attrs.define(eq=False)
class Handover:
    """Polls that wait, the partitions that are held, and those that drain."""

    observer: Observer
    commands: SimpleQueue[Command]
    holdings: dict[Key, Holding] = attrs.field(factory=dict, init=False)
    on_withdrawn: Callable[[Withdrawn], None] | None = attrs.field(default=None, init=False)
    on_leaving: Callable[[Withdrawn], Sequence[OffsetRange]] | None = attrs.field(
        default=None, init=False
    )
    dropped_polls: int = attrs.field(default=0, init=False)
    has_ended: trio.Event = attrs.field(factory=trio.Event, init=False)
    _error: Exception | None = attrs.field(default=None, init=False)
    _error_was_raised: bool = attrs.field(default=False, init=False)
    _waiting: deque[list[Record]] = attrs.field(factory=deque, init=False)
    _arrived: trio.Event = attrs.field(factory=trio.Event, init=False)
    _drains: list[Drain] = attrs.field(factory=list, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    # ----------------------------------------------------------------------------------------------- for the source

    async def poll(self) -> list[Record]:
        """Return the next poll; see `KafkaSource.poll`."""
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self._error is not None:
                self._error_was_raised = True
                raise self._error
            if self._closed:
                raise trio.ClosedResourceError
            self._arrived = trio.Event()
            await self._arrived.wait()
        # From here to the return there is no checkpoint: a poll is taken whole, or waits for the next call.
        records = self._waiting.popleft()
        partition = generation = -1
        topic, lease = "", None
        for record in records:
            if (
                record.partition != partition  # they come in runs
                or record.generation != generation
                or record.topic != topic
            ):
                topic, partition, generation = record.topic, record.partition, record.generation
                lease = self._find_lease((topic, partition), generation)
            if lease is not None:
                lease.hand_out(record.offset)
        self.commands.put(Command.MORE)
        return records

    def account(self, offsets: OffsetRange) -> None:
        """Move the lease on; the pump reads its watermark."""
        lease = self._find_lease((offsets.topic, offsets.partition), offsets.generation)
        if lease is None:
            return
        lease.account(offsets.first, offsets.last)
        if self._drains:
            self._look_at_drains()

    def raise_what_nobody_saw(self) -> None:
        """Raise the error that no `poll` has raised."""
        if self._error is not None and not self._error_was_raised:
            raise self._error

    def close(self) -> None:
        """Drop what waits, let no revoke wait any longer, and stop the pump."""
        self._closed = True
        self.dropped_polls += len(self._waiting)
        self._waiting.clear()
        self._arrived.set()
        self._look_at_drains()
        self.commands.put(Command.STOP)

    # ------------------------------------------------------------------------------------------------- for the pump

    def polled(self, records: list[Record]) -> None:
        """Take the records of one poll; it used up one credit."""
        if self._closed:
            self.dropped_polls += 1
            return
        self._waiting.append(records)
        self._arrived.set()

    def assigned(self, holdings: Sequence[Holding]) -> None:
        """Records of these come from now on; one that is here already begins a new generation."""
        old = [self.holdings[holding.key] for holding in holdings if holding.key in self.holdings]
        if old:
            self.left(old)
        self.holdings.update((holding.key, holding) for holding in holdings)

    def revoking(self, drain: Drain) -> None:
        """Set `drain.done` as soon as nothing of these is outstanding."""
        self._drop({holding.key for holding in drain.holdings})
        self._ask_back(drain.holdings)
        self._drains.append(drain)
        self._look_at_drains()

    def left(self, holdings: Sequence[Holding]) -> None:
        """Forget these partitions."""
        self._drop({holding.key for holding in holdings})
        for holding in holdings:
            del self.holdings[holding.key]
        if self.on_withdrawn is None or self._closed or not holdings:
            return
        try:
            self.on_withdrawn(_generations(holdings))
        except Exception as error:  # noqa: BLE001 (see `happened`)
            self.failed(error)

    def _ask_back(self, holdings: Sequence[Holding]) -> None:
        if self.on_leaving is None or self._closed or not holdings:
            return
        try:
            for given in reversed(self.on_leaving(_generations(holdings))):
                self.holdings[given.topic, given.partition].lease.give_back(given.first)
        except Exception as error:  # noqa: BLE001 (see `happened`)
            self.failed(error)

    def happened(self, event: Event) -> None:
        """Tell the observer."""
        try:
            self.observer.observe(event)
        except Exception as error:  # noqa: BLE001 (kept and raised by the next poll: here it would end trio itself)
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """The source cannot go on: the first error counts."""
        self._error = self._error or error
        self._arrived.set()

    def ended(self) -> None:
        """The client is closed; the pump says nothing after this."""
        self.has_ended.set()

    def _find_lease(self, key: Key, generation: int) -> Lease | None:
        holding = self.holdings.get(key)
        return holding.lease if holding and holding.lease.generation == generation else None

    def _drop(self, keys: set[Key]) -> None:
        """Drop what waits of these partitions: it was not handed out, so nobody has to finish it."""
        waiting, self._waiting = self._waiting, deque()
        for records in waiting:
            left = [record for record in records if (record.topic, record.partition) not in keys]
            if left:
                self._waiting.append(left)
            else:
                self.commands.put(Command.MORE)

    def _look_at_drains(self) -> None:
        for drain in self._drains:
            if self._closed or drain.is_empty:
                drain.done.set()
        self._drains = [drain for drain in self._drains if not drain.done.is_set()]


def _generations(holdings: Sequence[Holding]) -> Withdrawn:
    return [(*holding.key, holding.lease.generation) for holding in holdings]
