"""What every sink must do. Each case runs against each sink, the one for tests and the real one over a real socket."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import attrs
import orjson
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.reports import encode_report
from stationmaster.sinks import open_http_sink
from stationmaster.testing.sink import Hang, RecordingSink, Slow
from tests.http_server import HANG, Reply, ScriptedServer, Seen, open_server
from tests.test_sinks import report_of, succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.abc import Sink, UploadAnswer
    from stationmaster.testing.sink import Step


class Target(Protocol):
    """A sink, and a look behind it."""

    @property
    def sink(self) -> Sink: ...

    def will(self, *steps: Step) -> None:
        """Let the next uploads meet these."""

    def kept(self) -> dict[str, bytes]:
        """Return what the target holds: batch id -> body."""

    async def reached(self, uploads: int) -> None:
        """Wait until so many uploads reached it."""


@attrs.frozen
class InMemory:
    sink: RecordingSink

    def will(self, *steps: Step) -> None:
        self.sink.script.extend(steps)

    def kept(self) -> dict[str, bytes]:
        return {batch_id: encode_report(report) for batch_id, report in self.sink.reports.items()}

    async def reached(self, uploads: int) -> None:
        await wait_all_tasks_blocked()
        assert len(self.sink.attempts) == uploads


@attrs.frozen
class OverHttp:
    sink: Sink
    server: ScriptedServer
    store: dict[str, bytes]

    def will(self, *steps: Step) -> None:
        self.server.script.extend(map(_reply, steps))

    def kept(self) -> dict[str, bytes]:
        return self.store

    async def reached(self, uploads: int) -> None:
        await self.server.requests.wait_value(uploads)


def _reply(step: Step) -> Reply:
    match step:
        case Rejected(status=status, answer=answer):
            return Reply(status=status, body=answer.encode())
        case TryAgain(reason=reason, retry_after_s=None):
            return Reply(status=500, body=reason.encode())
        case TryAgain(reason=reason, retry_after_s=seconds):
            return Reply(status=429, headers={"Retry-After": f"{seconds}"}, body=reason.encode())
        case Unavailable(reason=reason):
            return Reply(status=401, body=reason.encode())
        case Hang(keeps=False):
            return HANG
        case Slow(seconds=seconds):
            return Reply(status=500, pause_s=seconds / 10)
        case _:
            raise NotImplementedError(step)


@asynccontextmanager
async def in_memory() -> AsyncIterator[Target]:
    yield InMemory(RecordingSink())


@asynccontextmanager
async def over_http() -> AsyncIterator[Target]:
    store: dict[str, bytes] = {}

    def receive(seen: Seen) -> Reply:
        store.setdefault(seen.headers["idempotency-key"], seen.body)
        return Reply(status=200)

    async with open_server(receive) as server, open_http_sink(server.url, connections=2) as sink:
        yield OverHttp(sink, server, store)


@pytest.fixture(params=[in_memory, over_http])
async def target(request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    with trio.fail_after(10):
        async with request.param() as opened:
            yield opened


async def test_an_accepted_batch_stands_in_the_target(target: Target) -> None:
    report = report_of(succeeded("S001", level=1.5))
    answer = await target.sink.upload(report)
    assert answer == Accepted(status=200)
    assert target.kept() == {"t_0_5_1": encode_report(report)}


async def test_the_same_batch_again_is_accepted_and_not_kept_twice(target: Target) -> None:
    first, second = report_of(succeeded("S001", try_=1)), report_of(succeeded("S001", try_=2))
    assert await target.sink.upload(first) == Accepted(status=200)
    assert await target.sink.upload(second) == Accepted(status=200)
    await target.reached(2)
    [body] = target.kept().values()
    assert orjson.loads(body)["results"][0]["try_"] == 1, "the first one wins"


async def test_several_tasks_upload_at_once(target: Target) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(target.sink.upload, report_of(batch_id=f"b{number}"))
    assert set(target.kept()) == {f"b{number}" for number in range(20)}


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
async def test_a_refusal_is_an_answer_and_the_batch_may_come_again(
    target: Target, answer: UploadAnswer
) -> None:
    target.will(answer)
    met = await target.sink.upload(report_of())
    assert type(met) is type(answer)
    match answer, met:
        case (Rejected(), Rejected()):
            assert met == answer
        case (TryAgain(), TryAgain()):
            assert answer.reason in met.reason
            assert met.retry_after_s == answer.retry_after_s
        case (Unavailable(), Unavailable()):
            assert answer.reason in met.reason
        case _:
            pytest.fail(f"{met} for {answer}")
    assert target.kept() == {}
    assert await target.sink.upload(report_of()) == Accepted(status=200)
    assert set(target.kept()) == {"t_0_5_1"}


async def test_an_upload_that_hangs_holds_up_no_other_and_can_be_cancelled(target: Target) -> None:
    target.will(Hang())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(target.sink.upload, report_of(batch_id="stuck"))
        await target.reached(1)
        for number in range(3):
            await target.sink.upload(report_of(batch_id=f"b{number}"))
        nursery.cancel_scope.cancel()
    assert set(target.kept()) == {"b0", "b1", "b2"}
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(target.sink.upload, report_of(batch_id=f"c{number}"))
    assert len(target.kept()) == 13, "the cancelled upload left a slot unusable"


async def test_a_callers_deadline_ends_a_slow_upload(target: Target) -> None:
    target.will(Slow(5.0))
    with trio.move_on_after(0.05) as scope:
        await target.sink.upload(report_of())
    assert scope.cancelled_caught
    assert await target.sink.upload(report_of()) == Accepted(status=200)


async def test_an_upload_checkpoints(target: Target) -> None:
    with assert_checkpoints():
        await target.sink.upload(report_of())
