"""The embedder for tests, and the real ones over sockets, keep the contract."""

from __future__ import annotations

import base64
import struct
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Literal

import orjson
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.embeddings import (
    Endpoints,
    open_endpoints,
    open_openai_embedder,
    open_tei_embedder,
)
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.testing import Hang, ScriptedEmbedder
from stationmaster.testing.contracts import RemoteEmbedderContract
from stationmaster.testing.embedder import hang
from stationmaster.testing.server import HANG, Reply, Request, ScriptedServer, open_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from stationmaster.abc import Embedder
    from stationmaster.embeddings import EndpointStatistics
    from stationmaster.testing.embedder import Step

DIMENSIONS = 4
vector_of = ScriptedEmbedder(dimensions=DIMENSIONS).vector


class KnownVectors(RemoteEmbedderContract):
    """Behind each of ours stands the same model: its vectors are known."""

    tolerance = 0.0

    async def check(self, embedder: Embedder, texts: Sequence[str]) -> None:
        vectors = await embedder.embed(texts)
        assert len(vectors) == len(texts)
        for vector, text in zip(vectors, texts, strict=True):
            assert list(vector) == pytest.approx(vector_of(text), abs=1e-6)


class TestScriptedEmbedder(KnownVectors):
    @asynccontextmanager
    async def open(self) -> AsyncIterator[Embedder]:
        self.script: list[EmbedderError | Hang] = []
        steps = iter(self._step, object())
        self.embedder = ScriptedEmbedder(dimensions=DIMENSIONS, script=steps)
        yield self.embedder

    def _step(self) -> Step:
        step = self.script.pop(0) if self.script else None
        return hang if isinstance(step, Hang) else step

    def will(self, *steps: EmbedderError | Hang) -> None:
        self.script.extend(steps)

    async def reached(self, calls: int) -> None:
        await wait_all_tasks_blocked()
        assert len(self.embedder.calls) == calls


class OverHttp(KnownVectors):
    """One server behind it."""

    server: ScriptedServer
    earlier = 0
    """Requests before the first call."""

    def will(self, *steps: EmbedderError | Hang) -> None:
        self.server.script.extend(map(_reply, steps))

    async def reached(self, calls: int) -> None:
        await self.server.requests.wait_value(self.earlier + calls)


class TestOpenAIEmbedder(OverHttp):
    encoding: Literal["base64", "float"] = "base64"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Embedder]:
        async with (
            open_server(_embed) as self.server,
            open_openai_embedder(
                self.server.url, model="m", connections=2, encoding=self.encoding
            ) as embedder,
        ):
            yield embedder


class TestOpenAIEmbedderOfFloats(TestOpenAIEmbedder):
    encoding = "float"


class TestTeiEmbedder(OverHttp):
    earlier = 1

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Embedder]:
        async with (
            open_server(_embed) as self.server,
            open_tei_embedder(self.server.url, connections=2) as embedder,
        ):
            await embedder.learn()
            yield embedder


class TestOneEndpoint(KnownVectors):
    """Servers with one script, in which each call finds what its failure meets elsewhere too."""

    count = 1

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Embedder]:
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(open_server(_embed)) for _ in range(self.count)
            ]
            for server in servers[1:]:
                server.script = servers[0].script
                server.requests = servers[0].requests
            self.first = servers[0]
            urls = [server.url for server in servers]
            async with open_endpoints(
                urls, model="m", max_in_flight=2, breaker_probe_s=0.01
            ) as self.endpoints:
                yield self.endpoints

    endpoints: Endpoints

    def will(self, *steps: EmbedderError | Hang) -> None:
        for step in steps:
            is_final = isinstance(step, Hang | RowRejectedError)
            times = 1 if is_final else self.count
            self.first.script.extend([_reply(step)] * times)

    async def reached(self, calls: int) -> None:
        await self.first.requests.wait_value(calls)

    async def rested(self) -> None:
        await trio.sleep(max(map(_shut_s, self.endpoints.statistics())))


class TestThreeEndpoints(TestOneEndpoint):
    count = 3


def _shut_s(endpoint: EndpointStatistics) -> float:
    return max(endpoint.open_s, endpoint.paused_s)


def _reply(step: EmbedderError | Hang) -> Reply:
    match step:
        case Hang():
            return HANG
        case EmbedderBusyError(retry_after_s=seconds):
            return Reply(status=429, headers={"Retry-After": f"{seconds}"}, body=str(step).encode())
        case ProtocolError():
            return Reply(body=str(step).encode())
        case _:
            status = {
                RowRejectedError: 422,
                EmbedderRefusedError: 401,
                EmbedderUnavailableError: 500,
            }
            return Reply(status=status[type(step)], body=str(step).encode())


def _embed(request: Request) -> Reply:
    """Answer like a model server that is done with the last text first."""
    if request.target == "/info":
        return Reply(body=b'{"max_client_batch_size": 7}')
    form = orjson.loads(request.body)
    if request.target == "/embed":
        return Reply(body=orjson.dumps([vector_of(text) for text in form["inputs"]]))
    rows = []
    for index, text in enumerate(form["input"]):
        vector: object = vector_of(text)
        if form["encoding_format"] == "base64":
            vector = base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector_of(text))).decode()
        rows.append({"object": "embedding", "index": index, "embedding": vector})
    return Reply(body=orjson.dumps({"object": "list", "data": rows[::-1], "model": "alias"}))
