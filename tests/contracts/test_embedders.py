"""What every embedder must do. Each case runs against each one: that for tests, and the real ones over sockets."""

from __future__ import annotations

import base64
import struct
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import attrs
import orjson
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

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
from stationmaster.testing.embedder import ScriptedEmbedder, hang
from tests.http_server import HANG, Reply, ScriptedServer, Seen, open_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from stationmaster.abc import Embedder
    from stationmaster.embeddings import EndpointStatistics

DIMENSIONS = 4
vector_of = ScriptedEmbedder(dimensions=DIMENSIONS).vector


class Model(Protocol):
    """An embedder, and a hold on what stands behind it."""

    @property
    def embedder(self) -> Embedder: ...

    def will(self, *steps: EmbedderError | Literal["hang"]) -> None:
        """Let the next calls meet these."""

    async def reached(self, calls: int) -> None:
        """Wait until so many calls arrived."""

    async def rested(self) -> None:
        """Wait until it may be asked again after a failure."""


@attrs.frozen
class InMemory:
    embedder: ScriptedEmbedder
    script: list[EmbedderError | Literal["hang"]]

    def will(self, *steps: EmbedderError | Literal["hang"]) -> None:
        self.script.extend(steps)

    async def reached(self, calls: int) -> None:
        await wait_all_tasks_blocked()
        assert len(self.embedder.calls) == calls

    async def rested(self) -> None:
        pass


@attrs.frozen
class OverHttp:
    embedder: Embedder
    server: ScriptedServer
    earlier: int = 0
    """Requests before the first call."""

    def will(self, *steps: EmbedderError | Literal["hang"]) -> None:
        self.server.script.extend(map(_reply, steps))

    async def reached(self, calls: int) -> None:
        await self.server.requests.wait_value(self.earlier + calls)

    async def rested(self) -> None:
        pass


@attrs.frozen
class OverEndpoints:
    """Several servers with one script, in which each call finds what its failure meets elsewhere too."""

    embedder: Endpoints
    servers: Sequence[ScriptedServer]

    def will(self, *steps: EmbedderError | Literal["hang"]) -> None:
        for step in steps:
            is_final = step == "hang" or isinstance(step, RowRejectedError)
            times = 1 if is_final else len(self.servers)
            self.servers[0].script.extend([_reply(step)] * times)

    async def reached(self, calls: int) -> None:
        await self.servers[0].requests.wait_value(calls)

    async def rested(self) -> None:
        await trio.sleep(max(map(_shut_s, self.embedder.statistics())))


def _shut_s(endpoint: EndpointStatistics) -> float:
    return max(endpoint.open_s, endpoint.paused_s)


def _reply(step: EmbedderError | Literal["hang"]) -> Reply:
    match step:
        case "hang":
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


@asynccontextmanager
async def in_memory() -> AsyncIterator[Model]:
    script: list[EmbedderError | Literal["hang"]] = []
    steps = iter(
        lambda: hang if (step := script.pop(0) if script else None) == "hang" else step, object()
    )
    yield InMemory(ScriptedEmbedder(dimensions=DIMENSIONS, script=steps), script)


def _embed(seen: Seen) -> Reply:
    """Answer like a model server that is done with the last text first."""
    if seen.target == "/info":
        return Reply(body=b'{"max_client_batch_size": 7}')
    form = orjson.loads(seen.body)
    if seen.target == "/embed":
        return Reply(body=orjson.dumps([vector_of(text) for text in form["inputs"]]))
    rows = []
    for index, text in enumerate(form["input"]):
        vector: object = vector_of(text)
        if form["encoding_format"] == "base64":
            vector = base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector_of(text))).decode()
        rows.append({"object": "embedding", "index": index, "embedding": vector})
    return Reply(body=orjson.dumps({"object": "list", "data": rows[::-1], "model": "alias"}))


@asynccontextmanager
async def over_http(encoding: Literal["base64", "float"]) -> AsyncIterator[Model]:
    async with open_server(_embed) as server:
        async with open_openai_embedder(
            server.url, model="m", connections=2, encoding=encoding
        ) as embedder:
            yield OverHttp(embedder, server)


@asynccontextmanager
async def over_tei() -> AsyncIterator[Model]:
    async with open_server(_embed) as server:
        async with open_tei_embedder(server.url, connections=2) as embedder:
            await embedder.learn()
            yield OverHttp(embedder, server, earlier=1)


@asynccontextmanager
async def over_endpoints(count: int) -> AsyncIterator[Model]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(open_server(_embed)) for _ in range(count)]
        for server in servers[1:]:
            server.script = servers[0].script
            server.requests = servers[0].requests
        urls = [server.url for server in servers]
        async with open_endpoints(
            urls, model="m", max_in_flight=2, breaker_probe_s=0.01
        ) as endpoints:
            yield OverEndpoints(endpoints, servers)


@pytest.fixture(
    params=[
        in_memory,
        partial(over_http, "base64"),
        partial(over_http, "float"),
        over_tei,
        partial(over_endpoints, 1),
        partial(over_endpoints, 3),
    ],
    ids=["scripted", "openai base64", "openai float", "tei", "one endpoint", "three endpoints"],
)
async def model(request: pytest.FixtureRequest) -> AsyncIterator[Model]:
    with trio.fail_after(10):
        async with request.param() as opened:
            yield opened


async def check(model: Model, texts: Sequence[str]) -> None:
    """Ask, and compare with what must come."""
    vectors = await model.embedder.embed(texts)
    assert len(vectors) == len(texts)
    for vector, text in zip(vectors, texts, strict=True):
        assert list(vector) == pytest.approx(vector_of(text), abs=1e-6)


async def test_each_text_gets_its_vector_in_order(model: Model) -> None:
    await check(model, ["Dongsi PM2.5 9", "größer 7 µg", "x"])
    await check(model, ("x", "Dongsi PM2.5 9"))
    await check(model, ["x"])


async def test_the_same_text_twice_gets_the_same_vector_twice(model: Model) -> None:
    first, second = await model.embedder.embed(["a", "a"])
    assert list(first) == list(second)


async def test_all_vectors_have_one_dimension(model: Model) -> None:
    vectors = await model.embedder.embed([f"text {number}" for number in range(50)])
    assert {len(vector) for vector in vectors} == {DIMENSIONS}


async def test_several_tasks_ask_at_once_and_each_gets_its_own(model: Model) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(
                check, model, [f"{number} and {row}" for row in range(number % 4 + 1)]
            )


@pytest.mark.parametrize(
    "error",
    [
        RowRejectedError("text too long"),
        EmbedderBusyError("come back", retry_after_s=0.05),
        EmbedderRefusedError("no such key"),
        EmbedderUnavailableError("out of memory"),
        ProtocolError("<html>"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_failed_call_is_a_typed_error_with_the_servers_words(
    model: Model, error: EmbedderError
) -> None:
    model.will(error)
    with pytest.raises(type(error), match=str(error)) as caught:
        await model.embedder.embed(["a", "b"])
    if isinstance(error, EmbedderBusyError):
        assert 0 <= caught.value.retry_after_s <= 0.05  # type: ignore[attr-defined]
    await model.rested()
    await check(model, ["a", "b"])


async def test_a_call_that_hangs_holds_up_no_other_and_can_be_cancelled(model: Model) -> None:
    model.will("hang")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(model.embedder.embed, ["stuck"])
        await model.reached(1)
        for number in range(3):
            await check(model, [f"text {number}"])
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(check, model, [f"text {number}"])


async def test_a_callers_deadline_is_honoured(model: Model) -> None:
    model.will("hang")
    scope = trio.CancelScope()

    async def ask() -> None:
        with scope:
            await model.embedder.embed(["a"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await model.reached(1)
        scope.deadline = trio.current_time() + 0.05
    assert scope.cancelled_caught
    await check(model, ["a"])


async def test_a_call_checkpoints(model: Model) -> None:
    with assert_checkpoints():
        await model.embedder.embed(["a"])
