"""The sink for tests, the real one over a real socket, and that of an example keep the contract."""

from __future__ import annotations

import runpy
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest
from trio.testing import wait_all_tasks_blocked

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.reports import encode_report
from stationmaster.sinks import open_http_sink
from stationmaster.testing import Hang, RecordingSink, Slow
from stationmaster.testing.contracts import RemoteSinkContract, SinkContract
from stationmaster.testing.contracts.running import in_trio
from stationmaster.testing.server import HANG, Reply, Request, open_server
from tests.test_sinks import report_of, succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.abc import Sink, UploadAnswer

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "custom_sink.py"))


class WholeReports(RemoteSinkContract):
    """What our own sinks promise besides: the status, and the very bytes of the first upload."""

    def bodies(self) -> dict[str, bytes]:
        raise NotImplementedError

    async def kept(self) -> list[str]:
        return list(self.bodies())

    @in_trio
    async def test_the_target_holds_the_report_as_it_is_encoded(self) -> None:
        report = report_of(succeeded("S001", level=1.5))
        async with self.open() as sink:
            assert await sink.upload(report) == Accepted(status=200)
            assert self.bodies() == {"t_0_5_1": encode_report(report)}

    @in_trio
    async def test_of_two_uploads_of_one_batch_the_first_one_stays(self) -> None:
        async with self.open() as sink:
            for number in (1, 2):
                report = report_of(succeeded("S001", try_=number))
                assert await sink.upload(report) == Accepted(status=200)
            await self.reached(2)
            [body] = self.bodies().values()
            assert orjson.loads(body)["results"][0]["try_"] == 1, "the first one wins"


class TestRecordingSink(WholeReports):
    @asynccontextmanager
    async def open(self) -> AsyncIterator[Sink]:
        self.sink = RecordingSink()
        yield self.sink

    def bodies(self) -> dict[str, bytes]:
        reports = self.sink.reports.items()
        return {batch_id: encode_report(report) for batch_id, report in reports}

    def will(self, *steps: UploadAnswer | Hang | Slow) -> None:
        self.sink.script.extend(steps)

    async def reached(self, uploads: int) -> None:
        await wait_all_tasks_blocked()
        assert len(self.sink.attempts) == uploads


class TestHttpSink(WholeReports):
    @asynccontextmanager
    async def open(self) -> AsyncIterator[Sink]:
        self.store: dict[str, bytes] = {}
        async with (
            open_server(self._receive) as self.server,
            open_http_sink(self.server.url, connections=2) as sink,
        ):
            yield sink

    def _receive(self, request: Request) -> Reply:
        self.store.setdefault(request.headers["idempotency-key"], request.body)
        return Reply(status=200)

    def bodies(self) -> dict[str, bytes]:
        return self.store

    def will(self, *steps: UploadAnswer | Hang | Slow) -> None:
        self.server.script.extend(map(_reply, steps))

    async def reached(self, uploads: int) -> None:
        await self.server.requests.wait_value(uploads)


class TestSinkOfTheExample(SinkContract):
    """That of `examples/custom_sink.py`: it is what people begin with."""

    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path) -> None:
        self.path = tmp_path / "batches.jsonl"

    def open(self) -> AbstractAsyncContextManager[Sink]:
        sink: AbstractAsyncContextManager[Sink] = EXAMPLE["open_file_sink"](self.path)
        return sink

    async def kept(self) -> list[str]:
        return [orjson.loads(line)["batchId"] for line in self.path.read_bytes().splitlines()]


def _reply(step: UploadAnswer | Hang | Slow) -> Reply:
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
