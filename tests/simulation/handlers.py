"""Handlers of every kind that do what the dice say, and what must hold for each of their jobs."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from stationmaster.errors import (
    BatcherError,
    EmbedderBusyError,
    EmbedderError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from tests.simulation.counterparts import BAD_TEXT
from tests.simulation.dice import Dice, Fault
from tests.simulation.scheduling import sleep_in_thread
from tests.simulation.watch import value_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stationmaster.abc import Handler, Report
    from stationmaster.batch import Batch, StationInput, StationResult
    from stationmaster.batcher import Batcher
    from tests.simulation.counterparts import ModelServer
    from tests.simulation.watch import Opened, Watch

CLEAN_UP_S: Final = 0.2
_NONSENSE: Final[tuple[Any, ...]] = (
    17,
    [("of", 1)],
    {"of": object()},
    {"of": "\ud800"},
    {"of": 2**80},
    {"of": "x" * 2_000},  # more than result_bytes
)
_STATION: Final = (
    (Fault.HANDLER_HANGS, 0.02),
    (Fault.HANDLER_SLOW, 0.04),
    (Fault.HANDLER_RAISES, 0.03),
    (Fault.HANDLER_ANSWERS_NONSENSE, 0.02),
    (Fault.CLEAN_UP_RAISES, 0.03),
    (Fault.CLEAN_UP_SHIELDED, 0.03),
    (Fault.ANSWER_AT_DEADLINE, 0.04),
    (Fault.HELPER_FALLS, 0.01),
)


_FAILURES: Final = {
    Fault.HANDLER_RAISES,
    Fault.HANDLER_ANSWERS_NONSENSE,
    Fault.CLEAN_UP_RAISES,
    Fault.HELPER_FALLS,
}


@attrs.define(eq=False)
class Staff:
    """The handlers of one life."""

    dice: Dice
    watch: Watch
    batcher: Batcher
    model: ModelServer
    kind: str
    """station, blocking or batch."""
    dead: frozenset[str]
    """Stations that never answer in this life."""
    threads: int
    jobs: int = 0
    asked: int = 0
    """Rows that the batcher was asked for."""
    waiting: int = 0
    """Rows of callers who wait for the batcher now."""
    in_threads: int = 0
    running: set[tuple[object, str]] = attrs.field(factory=set)
    """Jobs: the row of batches in which they stand (see `_row`), and their stations."""
    last: dict[tuple[object, str], int] = attrs.field(factory=dict)
    """The number of a station's last batch in a row."""
    helper_fell: dict[str, float] = attrs.field(factory=dict)
    heard: set[tuple[int, str]] = attrs.field(factory=set)

    @property
    def handler(self) -> Handler:
        """The one to open a pipeline with."""
        kinds: dict[str, Handler] = {
            "station": self.handle,
            "blocking": self.block,
            "batch": self.handle_batch,
        }
        return kinds[self.kind]

    # -------------------------------------------------------------------------------------------------- every job

    @contextmanager
    def _at_work(self, name: str, batch: Batch) -> Iterator[Opened]:
        """Hold one job to what every job is held to."""
        check, now = self.watch.check, self._now()
        opened = self.watch.of(batch)
        check(name in opened.batch.entries, "a job for nobody", name)
        self._in_order(name, opened)
        check(now < batch.deadline, "started after its deadline", name, now - batch.deadline)
        # A thread, or a task of a batch handler, may begin before it hears of what closed its batch in this very tick.
        in_this_tick = self.kind != "station" and opened.ended_at == now
        check(not opened.has_ended or in_this_tick, "started after its batch was closed", name)
        self.jobs += 1
        key = (self._row(opened), name)
        self.running.add(key)
        try:
            yield opened
        finally:
            self.running.remove(key)
            self.watch.note("ran", name, opened.number)

    def _row(self, opened: Opened) -> object:
        """Return in which row the batches of a station stand: of all, of their topic, or each for itself."""
        if self.kind != "batch":
            return "all"
        return opened.batch.topic if self.watch.settings.ordered else opened.number

    def _in_order(self, name: str, opened: Opened) -> None:
        key = (self._row(opened), name)
        self.watch.check(key not in self.running, "two jobs of one station at once", name)
        if not opened.grew:
            in_order = self.last.get(key, -1) < opened.number
            self.watch.check(in_order, "out of order", name, opened.number)
            self.last[key] = opened.number

    def _now(self) -> float:
        return self.watch.now()

    def _action(self, name: str, opened: Opened) -> Fault | None:
        if name in self.dead:
            return Fault.HANDLER_HANGS
        strikes = self.dice.strikes
        action = next((fault for fault, rate in _STATION if strikes(fault, rate)), None)
        if action in _FAILURES:
            self.watch.may_fail.add((opened.number, name))
        return action

    # --------------------------------------------------------------------------------------------------- one station

    async def handle(self, station: StationInput) -> Mapping[str, Any] | None:
        """Be `async def handle(station)`."""
        name, batch, watch = station.station_id, station.batch, self.watch
        now, settings = self._now(), watch.settings
        limit = min(batch.deadline, now + (settings.job_timeout_s or math.inf))
        ambient = trio.current_effective_deadline()
        falls = self.helper_fell.get(name) == now  # in this very tick: it takes the job along
        watch.check(falls or ambient == min(limit, watch.end), "the ambient deadline", ambient)
        with self._at_work(name, batch) as opened:
            try:
                answer: Mapping[str, Any] | None = await self._behave(station, opened)
            except trio.Cancelled:
                now = self._now()
                fell_s = now - self.helper_fell.get(name, -math.inf)
                excused = opened.has_ended or watch.has_left(batch) or now >= min(limit, watch.end)
                watch.check(excused or fell_s <= CLEAN_UP_S + 1e-9, "cancelled for nothing", name)
                raise
            return answer

    async def _behave(self, station: StationInput, opened: Opened) -> Any:
        name, dice = station.station_id, self.dice
        plain = dice.plain
        action = self._action(name, opened)
        if action is Fault.HANDLER_HANGS:
            await trio.sleep_forever()
        elif action is Fault.HANDLER_SLOW:
            await trio.sleep(plain.uniform(0.5, 8))
        elif action is Fault.HANDLER_RAISES:
            await trio.sleep(plain.random() * 0.1)
            raise ValueError(name)
        elif action is Fault.HANDLER_ANSWERS_NONSENSE:
            await trio.lowlevel.checkpoint()
            return plain.choice(_NONSENSE)
        elif action is Fault.CLEAN_UP_RAISES:  # its own nursery fails while it is cancelled
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                try:
                    await trio.sleep(plain.uniform(0.1, 8))
                finally:
                    raise ValueError("clean-up")
        elif action is Fault.CLEAN_UP_SHIELDED:
            try:
                await trio.sleep(plain.uniform(0.1, 8))
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(CLEAN_UP_S)
        elif action is Fault.ANSWER_AT_DEADLINE:  # in its very tick
            await trio.sleep_until(station.deadline)
        elif action is Fault.HELPER_FALLS:
            station.nursery.start_soon(self._fall, name)
            await trio.sleep(plain.random())
        else:
            await self._ask_or_sleep(name, opened)
        return value_of(opened, name) if plain.random() < 0.97 else None

    async def _fall(self, name: str) -> None:
        """Fail, as a helper task of a station."""
        await trio.sleep(self.dice.plain.random() * 2)
        self.helper_fell[name] = self._now()
        self.watch.helpers_fell.add(name)
        raise RuntimeError("a helper fell")

    async def _ask_or_sleep(self, name: str, opened: Opened) -> None:
        plain = self.dice.plain
        text = f"{name} of {opened.number}"
        if plain.random() < 0.5:
            await trio.sleep(plain.random() * 0.2)
            return
        if self.dice.strikes(Fault.MODEL_REFUSES_ROW, 0.05):
            text += BAD_TEXT
        kept_s = plain.choice((math.inf, math.inf, 1.0))
        try:
            vector = await self._ask(text, self._now() + kept_s)
        except (BatcherError, EmbedderError) as error:
            self._failed(error, name, opened)
            raise
        self.watch.check(vector == self.model.vector(text), "the vector of another text", text)
        self.watch.check(BAD_TEXT not in text, "a vector for what was refused", text)

    def _failed(self, error: Exception, name: str, opened: Opened) -> None:
        """Take note of an error that the batcher answered with, and look for its cause."""
        causes = {
            RowRejectedError: Fault.MODEL_REFUSES_ROW,
            EmbedderBusyError: Fault.MODEL_BUSY,
            EmbedderUnavailableError: Fault.MODEL_FAILS,
            ProtocolError: Fault.MODEL_MISCOUNTS,
        }
        cause = causes.get(type(error))
        # What is no error of the embedder is the batcher's own: its queue, or a deadline.
        caused = self.dice.struck[cause] > 0 if cause else type(error) is not EmbedderError
        self.watch.check(caused, "an error without a cause", repr(error))
        self.watch.may_fail.add((opened.number, name))

    async def _ask(self, text: str, deadline: float) -> Any:
        self.asked += 1
        self.waiting += 1
        try:
            return await self.batcher.embed(text, deadline=deadline)
        finally:
            self.waiting -= 1
            late_s = self._now() - deadline
            self.watch.check(late_s <= 0.01 + 1e-9, "answered after its deadline", late_s)

    # ------------------------------------------------------------------------------------------------------ in threads

    def block(self, station: StationInput) -> Mapping[str, Any] | None:
        """Be `def handle(station)`: it runs in a thread."""
        name, plain = station.station_id, self.dice.plain
        self.watch.check(self.in_threads < self.threads, "more threads than places")
        self.in_threads += 1
        try:
            with self._at_work(name, station.batch) as opened:
                action = self._action(name, opened)
                if action is Fault.HANDLER_HANGS:
                    sleep_in_thread(60)
                elif action in (Fault.HANDLER_SLOW, Fault.CLEAN_UP_SHIELDED):
                    sleep_in_thread(plain.uniform(0.5, 8))
                elif action is Fault.ANSWER_AT_DEADLINE:
                    sleep_in_thread(station.deadline - self._now())
                elif action is Fault.HANDLER_RAISES:
                    raise ValueError(name)
                elif action is Fault.HANDLER_ANSWERS_NONSENSE:
                    nonsense: Mapping[str, Any] = plain.choice(_NONSENSE)
                    return nonsense
                else:
                    sleep_in_thread(plain.random() * 0.2)
                return value_of(opened, name) if plain.random() < 0.97 else None
        finally:
            self.in_threads -= 1

    # ---------------------------------------------------------------------------------------------------- whole batches

    async def handle_batch(self, batch: Batch, report: Report) -> None:
        """Be `async def handle_batch(batch, report)`."""
        watch = self.watch
        ambient = trio.current_effective_deadline()
        limit = min(batch.deadline, watch.end)
        watch.check(ambient == limit, "the ambient deadline of a call", ambient, limit)
        names = [*batch.entries]
        if self.dice.plain.random() < 0.5:
            await self._report_many(names, batch, report)
            return
        try:
            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(self._report_one, name, batch, report)
        except* ValueError as group:
            number = watch.of(batch).number
            watch.may_fail.update((number, name) for name in names)  # those that were not reported
            raise ValueError(f"{len(group.exceptions)} of {len(names)}") from None

    async def _report_one(self, name: str, batch: Batch, report: Report) -> None:
        plain, watch = self.dice.plain, self.watch
        with self._at_work(name, batch) as opened:
            action = self._action(name, opened)
            answer: Any = value_of(opened, name)
            if action is Fault.HANDLER_HANGS:
                await trio.sleep_forever()
            elif action is Fault.HANDLER_SLOW:
                await trio.sleep(plain.uniform(0.5, 8))
            elif action is Fault.HANDLER_RAISES:
                await trio.sleep(plain.random())
                if plain.random() < 0.2:
                    raise ValueError(name)
                answer = ValueError(name)
            elif action is Fault.HANDLER_ANSWERS_NONSENSE:
                await trio.lowlevel.checkpoint()
                answer = plain.choice(_NONSENSE)
            elif action in (Fault.CLEAN_UP_SHIELDED, Fault.CLEAN_UP_RAISES):
                try:
                    await trio.sleep(plain.uniform(0.1, 8))
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(CLEAN_UP_S)
                    if action is Fault.CLEAN_UP_RAISES:
                        raise ValueError("clean-up")
            elif action is Fault.ANSWER_AT_DEADLINE:
                await trio.sleep_until(batch.deadline)
            else:
                try:
                    await self._ask_or_sleep(name, opened)
                except (BatcherError, EmbedderError) as error:
                    answer = error
            report(name, answer)
            if action is Fault.HELPER_FALLS:
                try:
                    report(name, answer)
                except ValueError:
                    pass
                else:
                    watch.check(False, "a second report was taken", name)

    async def _report_many(self, names: list[str], batch: Batch, report: Report) -> None:
        """Ask for all texts at once, as the built-in handler does."""
        texts = [f"{name} of {batch.batch_id}" for name in names]
        for number in range(len(texts)):
            if self.dice.strikes(Fault.MODEL_REFUSES_ROW, 0.05):
                texts[number] += BAD_TEXT
        opened = self.watch.of(batch)
        for name in names:
            self._in_order(name, opened)
        self.jobs += len(names)
        self.asked += len(texts)
        self.waiting += len(texts)
        try:
            rows = await self.batcher.embed_many(texts, return_errors=True)
        except BatcherError:
            self.watch.may_fail.update((opened.number, name) for name in names)
            raise
        finally:
            self.waiting -= len(texts)
        for name, text, row in zip(names, texts, rows, strict=True):
            if isinstance(row, Exception):
                self._failed(row, name, opened)
                report(name, row)
            else:
                right = row == self.model.vector(text)
                self.watch.check(right, "the vector of another text", text)
                self.watch.check(BAD_TEXT not in text, "a vector for what was refused", text)
                report(name, value_of(opened, name))

    # ------------------------------------------------------------------------------------------------------- the hook

    async def hear(self, station: StationInput, result: StationResult) -> None:
        """Be the result hook."""
        opened = self.watch.of(station.batch)
        key = (opened.number, station.station_id)
        self.watch.check(key not in self.heard, "a result was told twice", key)
        self.watch.check(result.station_id == station.station_id, "another's result", key)
        self.heard.add(key)
        await trio.sleep(self.dice.choose((0.0, 0.0, 0.05)))
        if self.dice.strikes(Fault.HANDLER_RAISES, 0.02):
            raise ValueError("the hook")
