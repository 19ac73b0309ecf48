"""What every sink must do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import assert_checkpoints

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.batch import Batch, BatchReport, ClosedBy, OffsetRange, Outcome, StationResult
from stationmaster.testing.contracts.running import Contract, in_trio
from stationmaster.testing.sink import Hang, Slow

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextlib import AbstractAsyncContextManager

    from stationmaster.abc import Sink, UploadAnswer

_NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)


def _report(batch_id: str = "air_0_5_1704110400") -> BatchReport:
    """A closed batch of two stations, one of which failed."""
    results = (
        StationResult(
            "S001",
            Outcome.SUCCEEDED,
            value={"level": 1.5},
            encoded=b'{"stationId":"S001","level":1.5}',
        ),
        StationResult("S002", Outcome.FAILED, reason="ValueError: no data"),
    )
    outcomes = [result.outcome for result in results]
    return BatchReport(
        batch=Batch(
            batch_id=batch_id,
            topic="air",
            opened_at=_NOON,
            deadline=5.0,
            ranges=(OffsetRange(topic="air", partition=0, first=5, last=5),),
            entries={},
            last_message={},
        ),
        closed_by=ClosedBy.COMPLETE,
        closed_at=_NOON,
        duration_s=0.5,
        results=results,
        counts={outcome: outcomes.count(outcome) for outcome in Outcome},
    )


class SinkContract(Contract):
    """What every `stationmaster.abc.Sink` must do whose target takes everything."""

    def open(self) -> AbstractAsyncContextManager[Sink]:
        """Open the sink before an empty target."""
        raise NotImplementedError

    async def kept(self) -> Collection[str]:
        """Return the ids of the batches that the target holds, each as often as it stands there."""
        raise NotImplementedError

    @in_trio
    async def test_an_accepted_batch_stands_in_the_target(self) -> None:
        async with self.open() as sink:
            assert isinstance(await sink.upload(_report("b1")), Accepted)
            assert list(await self.kept()) == ["b1"]

    @in_trio
    async def test_the_same_batch_again_is_accepted_and_not_kept_twice(self) -> None:
        async with self.open() as sink:
            for _ in range(2):
                assert isinstance(await sink.upload(_report("b1")), Accepted)
            assert list(await self.kept()) == ["b1"]

    @in_trio
    async def test_several_tasks_upload_at_once(self) -> None:
        ids = [f"b{number}" for number in range(20)]
        async with self.open() as sink:
            async with trio.open_nursery() as nursery:
                for batch_id in ids:
                    nursery.start_soon(sink.upload, _report(batch_id))
            assert sorted(await self.kept()) == sorted(ids)

    @in_trio
    async def test_a_cancelled_upload_may_come_again_and_harms_no_other(self) -> None:
        async with self.open() as sink:
            with trio.CancelScope() as scope:
                scope.cancel()
                await sink.upload(_report("b1"))
            assert scope.cancelled_caught
            for batch_id in ("b2", "b1"):
                assert isinstance(await sink.upload(_report(batch_id)), Accepted)
            assert sorted(await self.kept()) == ["b1", "b2"]

    @in_trio
    async def test_an_upload_checkpoints(self) -> None:
        async with self.open() as sink:
            with assert_checkpoints():
                await sink.upload(_report())


class RemoteSinkContract(SinkContract):
    """What it must do besides if its target can refuse, be slow, or not answer, and the tests can tell it to."""

    def will(self, *steps: UploadAnswer | Hang | Slow) -> None:
        """Let the next uploads meet these: the target's words for such an answer, none at all, or a late one."""
        raise NotImplementedError

    async def reached(self, uploads: int) -> None:
        """Wait until so many uploads of this test reached the target."""
        raise NotImplementedError

    @pytest.mark.parametrize(
        "answer",
        [
            Rejected(status=422, answer="not mine"),
            TryAgain(reason="broken"),
            TryAgain(reason="busy", retry_after_s=2.5),
            Unavailable(reason="who are you"),
        ],
        ids=["rejected", "try again", "try again later", "unavailable"],
    )
    @in_trio
    async def test_a_refusal_is_an_answer_and_the_batch_may_come_again(
        self, answer: UploadAnswer
    ) -> None:
        async with self.open() as sink:
            self.will(answer)
            met = await sink.upload(_report("b1"))
            assert type(met) is type(answer)
            match answer, met:
                case (Rejected(), Rejected()):
                    assert met == answer
                case (TryAgain(), TryAgain()):
                    assert answer.reason in met.reason
                    assert met.retry_after_s == answer.retry_after_s
                case (Unavailable(), Unavailable()):
                    assert answer.reason in met.reason
            assert not await self.kept()
            assert isinstance(await sink.upload(_report("b1")), Accepted)
            assert list(await self.kept()) == ["b1"]

    @in_trio
    async def test_an_upload_that_hangs_holds_up_no_other_and_can_be_cancelled(self) -> None:
        async with self.open() as sink:
            self.will(Hang())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sink.upload, _report("stuck"))
                await self.reached(1)
                for number in range(3):
                    await sink.upload(_report(f"b{number}"))
                nursery.cancel_scope.cancel()
            assert sorted(await self.kept()) == ["b0", "b1", "b2"]
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(sink.upload, _report(f"c{number}"))
            assert len(await self.kept()) == 13, "the cancelled upload left a slot unusable"

    @in_trio
    async def test_a_callers_deadline_ends_a_slow_upload(self) -> None:
        scope = trio.CancelScope()

        async def upload(sink: Sink) -> None:
            with scope:
                await sink.upload(_report())

        async with self.open() as sink:
            self.will(Slow(5.0))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upload, sink)
                await self.reached(1)
                scope.deadline = trio.current_time() + 0.05
            assert scope.cancelled_caught
            assert isinstance(await sink.upload(_report()), Accepted)
