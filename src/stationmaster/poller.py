"""The poller: polls the source, parses, cuts drafts of batches, and opens each when there is room.

Rules:
1. It never waits on a station. It waits for room (`Intake`): a free slot, free bytes, and a queue short enough that
   the stations can still answer. A deadline begins only at opening, so catching up after an outage times nobody out.
2. What is polled and not yet opened is bounded: there is no next poll before all of this one is opened. Only where
   batches are cut by timestamp polling goes on, up to `max_parked_bytes` and one poll: what an open batch still lacks
   may stand behind what waits for a slot. Joining an open batch takes no slot.
3. A record that is refused goes to the dead letters; it waits with the poller only while too many are on their way.
   If their store takes nothing for long there is no further poll.
4. Topics of high priority come first (`Parked`); the order within a partition is kept.
5. Parsing, and joining what was parsed, is cut into slices of `_SLICE_BYTES`; a larger message is parsed in steps.
6. Between the last look at what waits and waiting for a change there is no checkpoint: no change is missed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from stationmaster.batch import OffsetRange, Refusal
from stationmaster.drafts import Draft, draft_batch
from stationmaster.messages import parse_in_steps
from stationmaster.parked import Parked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from stationmaster.abc import Source, Withdrawn
    from stationmaster.batch import Message, Record
    from stationmaster.intake import Intake
    from stationmaster.settings import PipelineSettings

_SLICE_BYTES = 32_768  # parsed between two checkpoints: about a millisecond


class Poller:
    """Runs from the first poll to the end of the source."""

    def __init__(
        self,
        source: Source,
        intake: Intake,
        *,
        settings: PipelineSettings,
        may_open: Callable[[Draft], bool],
        may_join: Callable[[Draft], bool],
        open_batch: Callable[[Draft], Awaitable[None]],
        refuse: Callable[[Record, Refusal], Awaitable[None]],
        until_pollable: Callable[[], Awaitable[None]],
    ) -> None:
        """Join the poller to its neighbours.

        Args:
            source: is polled by this task alone.
            intake: slots and bytes.
            settings: where each topic's batches end, and how much may wait.
            may_open: whether the stations can take this draft now.
            may_join: whether an open batch takes it.
            open_batch: opens it, or lets it join; returns when it is handed to the stations.
            refuse: takes a record that is no usable message; its offset is no more the poller's business.
            until_pollable: returns at once, or when polling makes sense again.
        """
        self._source = source
        self._intake = intake
        self._settings = settings
        self._may_open = may_open
        self._may_join = may_join
        self._open_batch = open_batch
        self._refuse = refuse
        self._until_pollable = until_pollable
        self._parked = Parked()
        self._has_urgent = any(rules.is_urgent for rules in settings.all_rules())
        self._polls_on = any(rules.by == "timestamp" for rules in settings.all_rules())
        self._previous: dict[tuple[str, int], tuple[int, int]] = {}
        """Topic and partition -> generation and offset of its last record."""
        self._parsed_bytes = 0
        """Since the last slice ended."""
        self._ended = False

    @property
    def parked_bytes(self) -> int:
        """Bytes of messages that wait for room."""
        return self._parked.size_bytes

    def reconfigure(self, settings: PipelineSettings) -> None:
        """Go by other rules from now on; what waits already keeps its row."""
        self._settings = settings
        self._has_urgent = any(rules.is_urgent for rules in settings.all_rules())

    def give_back(self, leaving: Withdrawn) -> list[OffsetRange]:
        """Give up what waits as a record and is of these generations; see `Source.watch_withdrawals`."""
        given = [
            OffsetRange(
                topic=record.topic,
                partition=record.partition,
                first=record.offset,
                last=record.offset,
                generation=record.generation,
            )
            for record in self._parked.remove(frozenset(leaving))
        ]
        self._intake.ease()  # what waited behind them may have its turn now
        return given

    async def run(self) -> None:
        """Poll until the source ends. Cancel it to stop: what is not opened yet stays uncommitted."""
        limit = self._settings.max_parked_bytes if self._polls_on else 0
        while True:  # noqa: ASYNC913 - every turn but the last waits or polls, and every source's poll is a checkpoint
            await self._open_what_has_room()
            records: Sequence[Record] = ()
            if not self._parked:
                if self._ended:
                    return  # noqa: ASYNC910
                records = await self._poll()
            elif self._ended or self._parked.size_bytes >= limit:
                await self._intake.wait_change()
            else:
                with self._intake.until_change(self._head_with_room):
                    records = await self._poll()
            await self._park(records)

    async def _poll(self) -> Sequence[Record]:
        await self._until_pollable()
        try:
            return await self._source.poll()
        except trio.EndOfChannel:
            self._ended = True
            return ()  # noqa: ASYNC910 - every source's poll is a checkpoint

    # --------------------------------------------------------------------------------------------------- polled records

    async def _park(  # noqa: ASYNC910 - a batch by message is parsed when its turn comes
        self, records: Sequence[Record]
    ) -> None:
        """Sort the records of one poll into what waits for room."""
        rules = self._settings.rules
        if self._has_urgent:
            records = sorted(records, key=lambda record: not rules(record.topic).is_urgent)
        polled: dict[str, list[Message]] = {}
        drafts: dict[str, Draft] = {}
        others: list[Record] = []
        # In one step, before any is parsed: what is given back (`give_back`) is the last of what was polled.
        for record in records:
            if rules(record.topic).by == "message":
                self._parked.add(record, urgent=rules(record.topic).is_urgent)
            else:
                others.append(record)
        for record in others:
            parsed = await self._parse(record, follows=self._follow(record))
            if isinstance(parsed, Refusal):
                await self._refuse(record, parsed)
            elif rules(record.topic).by == "poll":
                polled.setdefault(record.topic, []).append(parsed)
            else:
                await self._sort_by_time(parsed)
            if self._ends_slice(record):
                self._join(polled, drafts)
                await trio.lowlevel.checkpoint()
        self._join(polled, drafts)
        for topic, draft in drafts.items():
            self._parked.add(draft, urgent=rules(topic).is_urgent)

    def _join(self, polled: dict[str, list[Message]], drafts: dict[str, Draft]) -> None:
        """Move the messages of a slice into the drafts of their topics."""
        for topic, messages in polled.items():
            if topic in drafts:
                drafts[topic].add(messages)
            else:
                drafts[topic] = self._draft(messages)
        polled.clear()

    async def _parse(self, record: Record, *, follows: int | None = None) -> Message | Refusal:
        steps = parse_in_steps(record, self._settings.limits, follows=follows)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                parsed: Message | Refusal = end.value
                return parsed  # noqa: ASYNC910 - what is small is parsed at once
            await trio.lowlevel.checkpoint()

    def _ends_slice(self, record: Record) -> bool:
        """Take note of what was parsed; tell whether others should run now."""
        self._parsed_bytes += len(record.value or b"")
        if self._parsed_bytes < _SLICE_BYTES:
            return False
        self._parsed_bytes = 0
        return True

    def _follow(self, record: Record) -> int | None:
        """Return the offset of the record before this one in its partition, as polled."""
        key = record.topic, record.partition
        generation, offset = self._previous.get(key, (None, None))
        self._previous[key] = record.generation, record.offset
        return offset if generation == record.generation else None

    async def _sort_by_time(self, message: Message) -> None:
        """Let a message join the open batch of its time, or wait with others of its time."""
        waiting = self._parked.find((message.topic, message.timestamp))
        if waiting is not None:  # even if this one could join: the order is kept
            waiting.add([message])
            self._parked.grew(message.size_bytes)
            await trio.lowlevel.checkpoint()
            return
        draft = self._draft([message])
        joins = self._may_join(draft)
        if joins and self._intake.has_bytes(draft.size_bytes):
            await self._open_batch(draft)
            return
        urgent = self._settings.rules(message.topic).is_urgent
        self._parked.add_timed(draft, urgent=urgent, joins=joins)
        await trio.lowlevel.checkpoint()

    def _draft(self, messages: Sequence[Message]) -> Draft:
        settings = self._settings
        by = settings.rules(messages[0].topic).by
        return draft_batch(messages, by=by, group_id=settings.group_id)

    # ---------------------------------------------------------------------------------------------------------- opening

    async def _open_what_has_room(self) -> None:  # noqa: ASYNC910, ASYNC911 - see rule 6
        while True:
            for record, urgent in self._parked.records():
                await self._parse_first(record, urgent=urgent)
                break
            else:
                draft = self._choose()
                if draft is None:
                    return
                self._parked.take(draft)
                await self._open_batch(draft)

    async def _parse_first(  # noqa: ASYNC910 - what is small is parsed at once
        self, record: Record, *, urgent: bool
    ) -> None:
        """Parse the first record of a row: its turn has come."""
        if self._ends_slice(record):
            await trio.lowlevel.checkpoint()
        parsed = await self._parse(record)
        if isinstance(parsed, Refusal):
            await self._refuse(record, parsed)
            self._parked.parsed(None, urgent=urgent)
        else:
            self._parked.parsed(self._draft([parsed]), urgent=urgent)

    def _choose(self) -> Draft | None:
        """Return what can be opened, or join, now."""
        intake = self._intake
        for draft in self._parked.joining():
            if not self._may_join(draft):
                urgent = self._settings.rules(draft.topic).is_urgent
                self._parked.join_no_more(draft, urgent=urgent)
            elif intake.has_bytes(draft.size_bytes):
                return draft
        return self._head_with_room()

    def _head_with_room(self) -> Draft | None:
        """Return what can be opened now."""
        intake = self._intake
        for draft in self._parked.heads():
            if not intake.in_flight:
                return draft
            if not intake.has_room(draft.size_bytes):
                return None  # nobody overtakes: a large one would never find the bytes
            if self._may_open(draft):
                return draft
        return None
