"""The contract suites find parts that break their contract."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stationmaster.abc import Accepted, Rejected, TryAgain
from stationmaster.batch import OffsetRange
from stationmaster.errors import EmbedderUnavailableError, StoreError
from stationmaster.testing import (
    MemoryDeadLetters,
    MemoryOutboxRows,
    MemorySource,
    RecordingSink,
    ScriptedEmbedder,
)
from stationmaster.testing.contracts import EmbedderContract
from tests.contracts import (
    test_dead_letters,
    test_embedders,
    test_outboxes,
    test_sinks,
    test_sources,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from stationmaster.abc import Embedder, Sink, UploadAnswer, Vector
    from stationmaster.batch import BatchReport, DeadLetter, KeptBatch, Record
    from stationmaster.testing.contracts.running import Contract


class Doubling(RecordingSink):
    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        self.deliveries[report.batch.batch_id] += 1
        return await super().upload(report)


class Forgetful(RecordingSink):
    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        await trio.lowlevel.checkpoint()
        return Accepted()


class Hasty(RecordingSink):
    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        self.reports.setdefault(report.batch.batch_id, report)
        return Accepted()


class Hopeful(RecordingSink):
    """Takes a refusal for a passing trouble."""

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        answer = await super().upload(report)
        return TryAgain(reason="422") if isinstance(answer, Rejected) else answer


@attrs.define(eq=False)
class OneAtATime(RecordingSink):
    lock: trio.Lock = attrs.field(factory=trio.Lock, init=False)

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        async with self.lock:
            return await super().upload(report)


class Deaf(RecordingSink):
    """Cannot be cancelled."""

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        with trio.move_on_after(0.1, shield=True):
            return await super().upload(report)
        return Accepted()


@asynccontextmanager
async def opened_sink(self: Any, part: type[RecordingSink]) -> AsyncIterator[Sink]:
    self.sink = part()
    yield self.sink


class SinkAtTest(test_sinks.TestRecordingSink):
    async def kept(self) -> list[str]:
        return [name for name in self.sink.reports for _ in range(self.sink.deliveries[name] or 1)]


SINKS: list[tuple[type[RecordingSink], str, tuple[Any, ...]]] = [
    (Forgetful, "test_an_accepted_batch_stands_in_the_target", ()),
    (Forgetful, "test_several_tasks_upload_at_once", ()),
    (Doubling, "test_the_same_batch_again_is_accepted_and_not_kept_twice", ()),
    (Hasty, "test_an_upload_checkpoints", ()),
    (Hasty, "test_a_cancelled_upload_may_come_again_and_harms_no_other", ()),
    (
        Hopeful,
        "test_a_refusal_is_an_answer_and_the_batch_may_come_again",
        (Rejected(status=422, answer="no"),),
    ),
    (OneAtATime, "test_an_upload_that_hangs_holds_up_no_other_and_can_be_cancelled", ()),
    (Deaf, "test_a_callers_deadline_ends_a_slow_upload", ()),
]


@pytest.mark.parametrize(("part", "test", "arguments"), SINKS)
def test_a_broken_sink_is_found(
    part: type[RecordingSink], test: str, arguments: tuple[Any, ...]
) -> None:
    class Suite(SinkAtTest):
        def open(self) -> Any:
            return opened_sink(self, part)

    assert_found(Suite(), test, arguments, hangs=part is OneAtATime)


class Reversed(ScriptedEmbedder):
    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        return (await super().embed(texts))[::-1]


class Short(ScriptedEmbedder):
    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        vectors = await super().embed(texts)
        return vectors[:-1] if len(texts) > 1 else vectors


class Constant(ScriptedEmbedder):
    def vector(self, text: str) -> list[float]:
        return [0.5] * self.dimensions


class Ragged(ScriptedEmbedder):
    def vector(self, text: str) -> list[float]:
        return super().vector(text)[: 1 + len(text) % 2]


class Drifting(ScriptedEmbedder):
    def vector(self, text: str) -> list[float]:
        return [number + len(self.calls) + len(self.began) for number in super().vector(text)]


class Shielded(ScriptedEmbedder):
    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        with trio.CancelScope(shield=True):
            return await super().embed(texts)
        raise AssertionError("not reached")


class Raw(ScriptedEmbedder):
    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        try:
            return await super().embed(texts)
        except EmbedderUnavailableError as error:
            raise OSError(str(error)) from error


class Sync(ScriptedEmbedder):
    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        return [self.vector(text) for text in texts]


EMBEDDERS: list[tuple[type[ScriptedEmbedder], str, tuple[Any, ...]]] = [
    (Reversed, "test_each_text_gets_its_vector_in_order", ()),
    (Short, "test_each_text_gets_its_vector_in_order", ()),
    (Drifting, "test_several_tasks_ask_at_once_and_each_gets_its_own", ()),
    (Constant, "test_different_texts_get_different_vectors", ()),
    (Ragged, "test_all_vectors_have_one_dimension", ()),
    (Shielded, "test_a_cancelled_call_harms_no_later_one", ()),
    (Sync, "test_a_call_checkpoints", ()),
    (
        Raw,
        "test_a_failed_call_is_a_typed_error_with_the_servers_words",
        (EmbedderUnavailableError("out of memory"),),
    ),
]


@pytest.mark.parametrize(("part", "test", "arguments"), EMBEDDERS)
def test_a_broken_embedder_is_found(
    part: type[ScriptedEmbedder], test: str, arguments: tuple[Any, ...]
) -> None:
    class Suite(test_embedders.TestScriptedEmbedder):
        check = EmbedderContract.check  # without knowing the vectors

        @asynccontextmanager
        async def open(self) -> AsyncIterator[Embedder]:
            self.script = []
            self.embedder = part(script=iter(self._step, object()))
            yield self.embedder

    assert_found(Suite(), test, arguments)


class Unbounded(MemoryOutboxRows):
    async def put(self, batch_id: str, /, **row: Any) -> None:
        self.max_bytes = 10**9
        await super().put(batch_id, **row)


class LastWins(MemoryOutboxRows):
    async def put(self, batch_id: str, /, **row: Any) -> None:
        await super().delete(batch_id)
        await super().put(batch_id, **row)


class Impatient(MemoryOutboxRows):
    async def due(self, now: float, /, *, latest: float, limit: int) -> list[KeptBatch]:
        return await super().due(1e9, latest=latest + 1e9, limit=limit)


class Generous(MemoryOutboxRows):
    async def due(self, now: float, /, *, latest: float, limit: int) -> list[KeptBatch]:
        return await super().due(now, latest=latest, limit=1000)


class Stranded(MemoryOutboxRows):
    async def due(self, now: float, /, *, latest: float, limit: int) -> list[KeptBatch]:
        return await super().due(now, latest=1e12, limit=limit)


class Immortal(MemoryOutboxRows):
    async def delete(self, batch_id: str, /) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("part", "test"),
    [
        (Unbounded, "test_a_row_is_taken_while_it_fits_and_room_comes_back"),
        (Unbounded, "test_a_row_larger_than_the_bound_is_taken_when_nothing_else_is_there"),
        (LastWins, "test_the_first_of_two_rows_with_one_id_stays"),
        (Impatient, "test_a_postponed_row_is_due_at_its_time_and_not_before"),
        (Generous, "test_rows_are_due_oldest_first_as_many_as_asked_for"),
        (Stranded, "test_a_row_that_lies_beyond_any_backoff_is_due"),
        (Immortal, "test_a_deleted_row_is_gone_and_gone_twice_is_fine"),
    ],
)
def test_broken_rows_of_an_outbox_are_found(part: type[MemoryOutboxRows], test: str) -> None:
    class Suite(test_outboxes.TestMemoryOutboxRows):
        @asynccontextmanager
        async def open(self) -> AsyncIterator[MemoryOutboxRows]:
            yield part(max_bytes=self.max_bytes)

    assert_found(Suite(), test)


class Careless(MemoryDeadLetters):
    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        await super().keep([attrs.evolve(letter, headers=()) for letter in letters])


class Twice(MemoryDeadLetters):
    @property
    def letters(self) -> list[DeadLetter]:
        return super().letters * 2


class Partial(MemoryDeadLetters):
    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        await trio.lowlevel.checkpoint()
        for letter in letters:
            await super().keep([letter])


class Strict(MemoryDeadLetters):
    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        await trio.lowlevel.checkpoint()
        if sum(len(letter.value or b"") for letter in letters) > self.max_bytes:
            raise StoreError("full", kind="full")
        await super().keep(letters)


@pytest.mark.parametrize(
    ("part", "test"),
    [
        (Careless, "test_letters_are_kept_whole_and_in_order"),
        (Twice, "test_a_letter_that_comes_again_is_kept_once"),
        (Partial, "test_letters_that_do_not_fit_are_refused_all_together"),
        (Strict, "test_letters_larger_than_the_bound_are_taken_when_nothing_else_is_there"),
    ],
)
def test_a_broken_place_for_dead_letters_is_found(part: type[MemoryDeadLetters], test: str) -> None:
    class Suite(test_dead_letters.TestMemoryDeadLetters):
        @asynccontextmanager
        async def open(self) -> AsyncIterator[MemoryDeadLetters]:
            self.place = part(max_bytes=self.max_bytes)
            yield self.place

    assert_found(Suite(), test)


class Greedy(MemorySource):
    async def poll(self) -> list[Record]:
        self.max_poll_messages = 1000
        return await super().poll()


class Lossy(MemorySource):
    async def poll(self) -> list[Record]:
        records = self._take()
        await trio.lowlevel.checkpoint()
        return records or await super().poll()


class Skipping(MemorySource):
    def account(self, offsets: OffsetRange, /) -> None:
        super().account(offsets)
        self.committed[offsets.topic, offsets.partition] = offsets.last + 1


class Early(MemorySource):
    async def poll(self) -> list[Record]:
        records = await super().poll()
        for record in records:
            self.account(span(record))
        return records


class Eager(MemorySource):
    """Withdraws before the drain."""

    async def revoke(self, partitions: Sequence[tuple[str, int]]) -> bool:
        self.drain_timeout_s = 0.0
        return await super().revoke(partitions)


def span(record: Record) -> OffsetRange:
    return OffsetRange(
        topic=record.topic,
        partition=record.partition,
        first=record.offset,
        last=record.offset,
        generation=record.generation,
    )


@pytest.mark.parametrize(
    ("part", "test"),
    [
        (Greedy, "test_records_come_in_order_and_each_once"),
        (Lossy, "test_a_cancelled_poll_raises_and_loses_no_record"),
        (Skipping, "test_a_hole_holds_the_commit_back"),
        (Early, "test_nothing_is_committed_before_it_is_accounted_for"),
        (Eager, "test_what_a_rebalance_takes_away_is_withdrawn_once_and_only_after_its_drain"),
    ],
)
def test_a_broken_source_is_found(part: Callable[..., MemorySource], test: str) -> None:
    suite = test_sources.TestMemorySource()
    suite.source = part(max_poll_messages=suite.at_most)
    suite.partitions = set()
    assert_found(suite, test, hangs=part is Lossy)


def assert_found(
    suite: Contract, test: str, arguments: tuple[Any, ...] = (), *, hangs: bool = False
) -> None:
    """Let a test of a suite fail in the way in which such a part makes it fail."""
    ways: tuple[type[BaseException], ...] = (trio.TooSlowError,)
    if hangs:
        suite.patience_s = 0.3
    else:
        ways = AssertionError, pytest.fail.Exception, StoreError, OSError, ValueError
    found = False
    try:
        getattr(suite, test)(*arguments)
    except* ways:  # also where several tasks of a test failed
        found = True
    assert found
