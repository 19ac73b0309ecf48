"""Several real HTTP servers behind one embedder: what fails at one is answered by another."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import attrs
import orjson
import pytest
import trio

from stationmaster.batcher import BatchPolicy, open_batcher
from stationmaster.embeddings import Endpoints, open_endpoints
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.events import CallRerouted, EndpointClosed, EndpointOpened
from stationmaster.testing import RecordingObserver
from stationmaster.testing.server import HANG, RESET, Reply, Request, ScriptedServer, open_server

from .http_server import closed_port, passing_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

LONG_S = 60.0


def vector_of(text: str) -> list[float]:
    return [float(len(text)), 1.0]


def answer(seen: Request) -> Reply:
    """Be a model server of both kinds."""
    if seen.target == "/info":
        return Reply(body=orjson.dumps({"max_client_batch_size": 4, "max_batch_tokens": 999}))
    form = orjson.loads(seen.body)
    if seen.target == "/embed":
        if len(form["inputs"]) > 4:
            return Reply(
                status=422, body=b'{"error": "batch size > 4", "error_type": "Validation"}'
            )
        return Reply(body=orjson.dumps([vector_of(text) for text in form["inputs"]]))
    texts = form["input"]
    if any("bad" in text for text in texts):
        return Reply(status=422, body=b'{"detail": "bad text"}')
    rows = [{"index": row, "embedding": vector_of(text)} for row, text in enumerate(texts)]
    return Reply(body=orjson.dumps({"data": rows, "model": "m"}))


@attrs.define(eq=False)
class Setting:
    servers: list[ScriptedServer]
    endpoints: Endpoints
    observer: RecordingObserver

    @property
    def asked(self) -> list[int]:
        return [len(server.seen) for server in self.servers]

    def states(self) -> list[str]:
        return [one.state for one in self.endpoints.statistics()]

    async def embed(self, *texts: str) -> None:
        vectors = await self.endpoints.embed(texts)
        assert [list(vector) for vector in vectors] == list(map(vector_of, texts))


@asynccontextmanager
async def servers(
    count: int = 2, *, api: Literal["openai", "tei"] = "openai", **options: Any
) -> AsyncIterator[Setting]:
    """Open real servers and one embedder for all."""
    observer = RecordingObserver()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[ScriptedServer]) -> None:
                async with open_server(answer) as server:
                    task_status.started(server)
                    await trio.sleep_forever()

            opened: list[ScriptedServer] = [await nursery.start(serve) for _ in range(count)]
            arguments = {"breaker_probe_s": LONG_S, "model": "m", **options}
            async with open_endpoints(
                [server.url for server in opened], api=api, observer=observer, **arguments
            ) as endpoints:
                yield Setting(opened, endpoints, observer)
            nursery.cancel_scope.cancel()


# ------------------------------------------------------------------------------ one call, one fault


@pytest.mark.parametrize(
    ("reply", "error", "is_shut"),
    [
        pytest.param(RESET, EmbedderUnavailableError, False, id="resets"),
        pytest.param(
            Reply(first=60, end="reset", body=b"x" * 99),
            EmbedderUnavailableError,
            False,
            id="resets in the body",
        ),
        pytest.param(Reply(status=500, end="close"), EmbedderUnavailableError, False, id="500"),
        pytest.param(Reply(status=502), EmbedderUnavailableError, False, id="502"),
        pytest.param(HANG, EmbedderUnavailableError, False, id="hangs"),
        pytest.param(
            Reply(status=429, headers={"Retry-After": "60"}), EmbedderBusyError, True, id="429"
        ),
        pytest.param(Reply(status=503), EmbedderBusyError, True, id="503"),
        pytest.param(Reply(status=401), EmbedderRefusedError, True, id="401"),
        pytest.param(Reply(status=403), EmbedderRefusedError, True, id="403"),
        pytest.param(Reply(status=404), EmbedderRefusedError, True, id="404"),
        pytest.param(Reply(body=b"<html>"), ProtocolError, False, id="speaks HTML"),
        pytest.param(
            Reply(body=b'{"data": [{"embedding": [1, 2]}]}'), ProtocolError, False, id="too few"
        ),
        pytest.param(
            Reply(body=b'{"data": [{"embedding": [NaN]}, {"embedding": [1]}]}'),
            ProtocolError,
            False,
            id="NaN",
        ),
        pytest.param(
            Reply(
                body=b'{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}'
            ),
            ProtocolError,
            False,
            id="an index twice",
        ),
    ],
)
async def test_a_call_that_fails_at_one_server_is_answered_by_another(
    mock_clock: MockClock, reply: Reply, error: type[EmbedderError], is_shut: bool
) -> None:
    async with servers(timeout_s=5.0) as s:
        s.servers[0].script.append(reply)
        async with passing_time(s.servers[0], mock_clock):
            await s.embed("a", "größer")
        assert s.asked == [1, 1]
        [moved] = s.observer.of(CallRerouted)
        assert isinstance(moved.error, error)
        assert (moved.endpoint, moved.to) == (s.servers[0].url, s.servers[1].url)
        first, second = s.endpoints.statistics()
        assert (first.state == "open" or first.paused_s > 0) is is_shut
        assert (first.failures, second.failures) == (1, 0)


async def test_another_dimension_than_that_of_the_first_answer_is_asked_for_elsewhere() -> None:
    async with servers() as s:
        await s.embed("a")
        s.servers[1].script.append(Reply(body=b'{"data": [{"embedding": [1, 2, 3]}]}'))
        await s.embed("b")
        assert s.asked == [2, 1]
        [moved] = s.observer.of(CallRerouted)
        assert "3 numbers instead of 2" in str(moved.error)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_refused_texts_are_asked_about_nowhere_else(status: int) -> None:
    async with servers() as s:
        s.servers[0].script.append(Reply(status=status, body=b"too long"))
        with pytest.raises(RowRejectedError, match="too long"):
            await s.embed("a")
        assert s.asked == [1, 0]


async def test_broken_answers_of_two_servers_are_a_protocol_error() -> None:
    async with servers(3) as s:
        for server in s.servers:
            server.script.append(Reply(body=b"{}"))
        with pytest.raises(ProtocolError, match="no list of objects"):
            await s.embed("a")
        assert s.asked == [1, 1, 0]


async def test_the_connection_is_dropped_after_a_500_and_the_next_call_has_a_new_one() -> None:
    async with servers(1) as s:
        await s.embed("a")
        s.servers[0].script.append(Reply(status=500, end="ambush"))
        with pytest.raises(EmbedderUnavailableError):
            await s.embed("b")
        await s.embed("c")
        assert s.servers[0].connections == [0, 0, 1]


async def test_a_reset_of_a_kept_connection_is_tried_again_at_the_same_server() -> None:
    async with servers(1) as s:
        s.servers[0].script.append(attrs.evolve(answer(Request(**_seen("a"))), end="ambush"))
        await s.embed("a")
        await s.embed("b")
        assert s.observer.events == []
        assert s.endpoints.statistics()[0].failures == 0


def _seen(*texts: str) -> dict[str, Any]:
    body = orjson.dumps({"input": texts})
    return {"method": "POST", "target": "/embeddings", "headers": {}, "body": body, "connection": 0}


# ----------------------------------------------------------------------------------------- breakers at work


async def test_a_server_that_is_absent_is_left_alone_after_its_failures() -> None:
    async with servers(1) as s:
        gone = f"http://127.0.0.1:{closed_port()}"
        async with open_endpoints(
            [gone, s.servers[0].url],
            model="m",
            breaker_failures=2,
            breaker_probe_s=LONG_S,
            observer=s.observer,
        ) as endpoints:
            for _ in range(5):
                await endpoints.embed(["a"])
            first, second = endpoints.statistics()
            assert (first.state, first.calls, second.calls) == ("open", 2, 5)
            [told] = s.observer.of(EndpointOpened)
            assert told.endpoint == gone
            assert "cannot be reached" in told.reason


async def test_a_server_that_comes_back_is_found_by_a_probe(mock_clock: MockClock) -> None:
    async with servers(1, breaker_failures=1, breaker_probe_s=5.0) as s:
        s.servers[0].script.append(Reply(status=500))
        with pytest.raises(EmbedderBusyError) as caught:
            await s.embed("a")
        assert caught.value.retry_after_s is not None
        mock_clock.jump(caught.value.retry_after_s)
        await s.embed("a")
        assert s.states() == ["closed"]
        assert s.observer.of(EndpointClosed)


async def test_if_every_server_refuses_the_key_calls_fail_at_once_and_unasked() -> None:
    async with servers(key="sesame") as s:
        for server in s.servers:
            server.script.append(Reply(status=401, body=b'{"error": {"message": "no sesame"}}'))
        for _ in range(3):
            with pytest.raises(EmbedderRefusedError, match=r"401: no \*\*\*"):
                await s.embed("a")
        assert s.asked == [1, 1]
        assert s.states() == ["open", "open"]
        assert "sesame" not in repr(s.endpoints.statistics()) + repr(s.observer.events)


async def test_a_cancelled_call_closes_its_connection_and_the_others_go_on() -> None:
    async with servers(max_in_flight=1) as s:
        s.servers[0].script.append(HANG)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.endpoints.embed, ["stuck"])
            await s.servers[0].requests.wait_value(1)
            await s.embed("a")
            nursery.cancel_scope.cancel()
        await s.servers[0].open_connections.wait_value(0)
        await s.embed("b")
        assert [seen.in_flight for seen in s.endpoints.statistics()] == [0, 0]


# ------------------------------------------------------------------------------- behind the batcher


async def test_behind_the_batcher_every_text_gets_its_vector_although_servers_fail() -> None:
    async with servers(3, max_in_flight=2, breaker_failures=2, breaker_probe_s=0.02) as s:
        hangs_up = [RESET, Reply(status=500, end="ambush"), Reply(status=502), RESET]
        s.servers[0].script.extend([*hangs_up, Reply(body=b"<html>")])
        s.servers[1].script.extend(hangs_up)
        policy = BatchPolicy(max_in_flight=6, max_batch_rows=8)
        texts = [
            f"{'x' * (number % 50 + 1)}{'bad' if number % 97 == 0 else ''}"
            for number in range(1, 400)
        ]
        async with open_batcher(s.endpoints, policy=policy) as batcher:
            results = await batcher.embed_many(texts, return_errors=True)
        for text, result in zip(texts, results, strict=True):
            if "bad" in text:
                assert isinstance(result, RowRejectedError)
            else:
                assert not isinstance(result, Exception)
                assert list(result) == vector_of(text)
        assert all(one.in_flight == 0 for one in s.endpoints.statistics())


# ------------------------------------------------------------------------------------------- limits


async def test_what_each_tei_server_takes_is_known_when_they_are_open() -> None:
    async with servers(api="tei") as s:
        assert (s.endpoints.max_rows, s.endpoints.max_tokens) == (4, 999)
        await s.embed(*"abcdefghij")
        sizes = [
            len(orjson.loads(seen.body)["inputs"])
            for server in s.servers
            for seen in server.seen
            if seen.target == "/embed"
        ]
        assert sizes == [4, 4, 2]


async def test_a_tei_server_that_is_absent_at_first_does_not_keep_the_others_from_opening() -> None:
    async with servers(1, api="tei") as s:
        gone = f"http://127.0.0.1:{closed_port()}"
        async with open_endpoints([gone, s.servers[0].url], model="m", api="tei") as endpoints:
            assert endpoints.max_rows == 4
            assert [list(one) for one in await endpoints.embed(["abc"])] == [[3.0, 1.0]]
        async with open_endpoints([gone], model="m", api="tei") as endpoints:
            assert endpoints.max_rows is None


async def test_the_same_url_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="must be different"):
        async with open_endpoints(["http://a", "http://a"], model="m"):
            pass


async def test_no_url_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        async with open_endpoints([], model="m"):
            pass
