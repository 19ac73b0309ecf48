"""The scripted server does what it is told, so that tests of clients mean something."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.testing import server as module
from stationmaster.testing.server import HANG, RESET, Reply, Request, ScriptedServer, open_server
from tests.http_server import tls_contexts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@asynccontextmanager
async def connected(server: ScriptedServer) -> AsyncIterator[trio.SocketStream]:
    port = int(server.url.rpartition(":")[2])
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield stream


async def test_the_script_comes_first_and_then_the_answer_to_each_request() -> None:
    def echo(request: Request) -> Reply:
        return Reply(body=request.body, headers={"X-Target": request.target})

    async with open_server(echo) as server, httpx.AsyncClient(base_url=server.url) as client:
        server.script.append(Reply(status=429, headers={"Retry-After": "3"}, body=b"busy"))
        first = await client.post("/v1?a=b", content=b"one")
        second = await client.post("/v1?a=b", content=b"two")

    assert (first.status_code, first.headers["retry-after"], first.text) == (429, "3", "busy")
    assert (second.status_code, second.headers["x-target"], second.text) == (200, "/v1?a=b", "two")
    assert [request.body for request in server.seen] == [b"one", b"two"]
    assert server.seen[0].method == "POST"
    assert server.connections == [0, 0]
    assert server.requests.value == 2
    assert server.open_connections.value == 0


async def test_without_an_answer_every_request_gets_an_empty_object() -> None:
    async with open_server() as server, httpx.AsyncClient() as client:
        assert (await client.get(server.url)).json() == {}


async def test_a_hanging_reply_waits_until_the_client_leaves() -> None:
    async with open_server() as server, httpx.AsyncClient() as client:
        server.script.append(HANG)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.get, server.url)
            await server.requests.wait_value(1)
            await wait_all_tasks_blocked()
            assert server.open_connections.value == 1
            nursery.cancel_scope.cancel()
        await server.open_connections.wait_value(0)


async def test_a_reset_is_no_answer_and_the_next_request_is_served() -> None:
    async with open_server() as server, httpx.AsyncClient() as client:
        server.script.append(RESET)
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await client.get(server.url)
        assert (await client.get(server.url)).status_code == 200
    assert server.connections == [0, 1]


async def test_a_late_reply_can_be_given_up_and_comes_when_it_is_waited_for() -> None:
    async with open_server() as server, httpx.AsyncClient() as client:
        server.script += [Reply(after_s=60), Reply(after_s=0.001, body=b"late")]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.get, server.url)
            await server.requests.wait_value(1)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert (await client.get(server.url)).text == "late"


async def test_bytes_that_are_no_http_and_half_a_body_come_as_they_are() -> None:
    async with open_server() as server, httpx.AsyncClient() as client:
        server.script.append(Reply(raw=b"what?\r\n\r\n", end="close"))
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(server.url)
        whole = Reply(body=b"0123456789")
        server.script.append(Reply(body=whole.body, first=len(whole.wire()) - 4, end="close"))
        with pytest.raises(httpx.RemoteProtocolError, match="body"):
            await client.get(server.url)


async def test_a_reset_is_one_under_tls_too(tmp_path: Path) -> None:
    tls, trusting = tls_contexts(tmp_path)
    async with (
        open_server(ssl_context=tls) as server,
        httpx.AsyncClient(verify=trusting) as client,
    ):
        assert (await client.get(server.url)).status_code == 200
        server.script.append(RESET)
        with pytest.raises(httpx.TransportError):
            await client.get(server.url)


async def test_requests_that_come_at_once_are_answered_one_after_the_other() -> None:
    request = b"GET /%d HTTP/1.1\r\nHost: here\r\n\r\n"
    async with open_server() as server, connected(server) as stream:
        await stream.send_all(request % 1 + request % 2)
        await server.requests.wait_value(2)
        assert [seen.target for seen in server.seen] == ["/1", "/2"]
        server.script.append(HANG)
        await stream.send_all(request % 3)
        await server.requests.wait_value(3)
        await stream.send_all(request % 4)  # whoever hangs reads no more of this
        await wait_all_tasks_blocked()
        assert server.requests.value == 3
        assert server.open_connections.value == 1


async def test_a_request_that_is_no_http_is_not_seen() -> None:
    async with open_server() as server, connected(server) as stream:
        await stream.send_all(b"\x00 what\r\n\r\n")
        assert await stream.receive_some() == b""
    assert server.seen == []


async def test_a_body_beyond_the_bound_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REQUEST_BYTES", 100)
    async with open_server() as server, httpx.AsyncClient() as client:
        assert (await client.post(server.url, content=b"x" * 100)).status_code == 200
        with pytest.raises(httpx.TransportError):
            await client.post(server.url, content=b"x" * 101)
    assert len(server.seen) == 1


async def test_what_the_answer_raises_ends_the_test() -> None:
    def broken(request: Request) -> Reply:
        raise KeyError(request.target)

    async def ask() -> None:
        async with open_server(broken) as server, httpx.AsyncClient() as client:
            await client.get(f"{server.url}/lost")

    with pytest.raises(KeyError, match="/lost"):
        await ask()


async def test_a_clock_that_jumps_is_refused(autojump_clock: MockClock) -> None:
    async def ask() -> ScriptedServer:
        async with open_server() as server:
            return server

    with pytest.raises(RuntimeError, match=r"socket takes real time.*real clock"):
        await ask()
