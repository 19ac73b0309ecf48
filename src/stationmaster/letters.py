"""The way of what cannot be used: it waits, bounded, until the store of dead letters has it; then its offset counts.

Rules:
1. A refused record waits in a channel of `_WAITING`; the poller waits when that is full, so a flood of refused records
   pauses consumption by itself.
2. One task keeps them, as many at once as are there (up to `_GROUP`): a flood costs one write per group.
3. A store that takes nothing is asked again, after a pause that grows to `_LONGEST_PAUSE_S`; nothing is dropped. For
   `_PATIENCE_S` the good messages behind go on, then nothing further is polled: none of their offsets can be committed,
   so what has to be remembered, and comes again after a crash, would grow without end.
4. Without a store a refused record is only told to the observer, and counts at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from stationmaster.batch import DeadLetter, OffsetRange
from stationmaster.blockage import Blockage
from stationmaster.errors import StoreError
from stationmaster.events import DeadLettersKept, MessageRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stationmaster.abc import DeadLetters, Observer
    from stationmaster.batch import Record, Refusal

_WAITING = 32
_GROUP = 64
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
_PATIENCE_S = 10.0


class Letters:
    """Takes refused records from the poller, and keeps letters for whoever has one."""

    def __init__(
        self,
        store: DeadLetters | None,
        *,
        account: Callable[[OffsetRange], None],
        observer: Observer,
    ) -> None:
        """Args: `account`: takes note that an offset counts, see `Source.account`."""
        self._store = store
        self._account = account
        self._observer = observer
        self._blockage = Blockage("dead-letters", observer)
        self._sender, self._receiver = trio.open_memory_channel[tuple[DeadLetter, OffsetRange]](
            _WAITING
        )

    @property
    def is_blocked(self) -> bool:
        """Whether a letter waits because the store takes none."""
        return self._blockage.lasts

    async def refuse(self, record: Record, refusal: Refusal) -> None:
        """Take a refused record; waits while too many are on their way to the store."""
        self._observer.observe(
            MessageRefused(record=record, reason=refusal.reason, detail=refusal.detail)
        )
        offsets = OffsetRange(
            topic=record.topic,
            partition=record.partition,
            first=record.offset,
            last=record.offset,
            generation=record.generation,
        )
        if self._store is None:
            self._account(offsets)
            await trio.lowlevel.checkpoint()
        else:
            await self._sender.send((_letter(record, refusal), offsets))

    async def until_pollable(self) -> None:  # noqa: ASYNC910 - the poll behind it is a checkpoint
        """Wait while the store takes nothing, if it has done so for long."""
        if self._blockage.lasted_s >= _PATIENCE_S:
            await self._blockage.wait_over()

    def close(self) -> None:
        """No more will be refused: `run` ends when the last one is kept."""
        self._sender.close()

    async def run(self) -> None:
        """Keep refused records until `close` was called and none is left. If cancelled, those left do not count."""
        async for first in self._receiver:
            group = [first]
            try:
                while len(group) < _GROUP:
                    group.append(self._receiver.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                pass
            await self.keep([letter for letter, _ in group])
            for _, offsets in group:
                self._account(offsets)

    async def keep(self, letters: Sequence[DeadLetter]) -> None:
        """Return when all are durable, however long that takes; at once if there is no store.

        If cancelled, they may or may not be kept.
        """
        if self._store is None:
            await trio.lowlevel.checkpoint()
            return
        pause_s = _FIRST_PAUSE_S
        blocked = False
        try:
            while True:
                try:
                    await self._store.keep(letters)
                except StoreError as error:
                    if not blocked:
                        blocked = True
                        self._blockage.begin(error)
                else:
                    break
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            if blocked:
                self._blockage.end()
        self._observer.observe(DeadLettersKept(letters=tuple(letters)))


def _letter(record: Record, refusal: Refusal) -> DeadLetter:
    return DeadLetter(
        reason=refusal.reason,
        detail=refusal.detail,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        timestamp_ms=record.timestamp_ms,
        headers=record.headers,
        value=record.value,
    )
