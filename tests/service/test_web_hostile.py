"""Hostile HTTP clients, as bytes on sockets: each is turned away or bounded, and the next honest one is served."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import trio
from hypercorn.trio.tcp_server import TCPServer
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.raw_http import open_raw, read_all, say
from tests.service.test_web import open_bare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """A server that must serve an honest client when the block is over."""
    async with open_bare() as url:
        yield url
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{url}/nowhere")).status_code == 404


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # 1.1 needs a Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nBad Header: 1\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \x00\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x05\x04\x00\x00\x00\x00\x00hello",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        os.urandom(64) + b"\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_closed(request_bytes: bytes) -> None:
    async with serving() as url:
        answer = await say(url, request_bytes)
    assert b" 200 " not in answer[:20]


async def test_an_upgrade_that_nobody_serves_is_refused() -> None:
    websocket = (
        b"GET /api/events HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    async with serving() as url:
        async with open_raw(url) as stream:
            await stream.send_all(websocket)
            with trio.fail_after(30):
                answer = await stream.receive_some()
    assert b" 101 " not in answer[:20]


async def test_ten_megabytes_of_headers_are_refused_early() -> None:
    async with serving() as url, open_raw(url) as stream:
        sent = 0
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        line = b"x-%07d: " + b"y" * 1_000 + b"\r\n"
        try:
            for number in range(10_000):
                await stream.send_all(line % number)
                sent += len(line)
        except trio.BrokenResourceError:
            pass
    assert sent < 8_000_000  # what the kernel took before it heard of the end


async def test_a_very_long_path_is_refused() -> None:
    async with serving() as url:
        answer = await say(url, b"GET /" + b"a" * 17_000)
    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_a_head_that_never_ends_is_given_up(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, heard = trio.SocketStream.receive_some, bytearray()

    async def receive_some(
        self: trio.SocketStream, max_bytes: int | None = None
    ) -> bytes | bytearray:
        chunk = await receive(self, max_bytes)
        heard.extend(chunk)
        return chunk

    async def wait_heard(count: int) -> None:
        """Until the server has read so much, and its tasks have set what limits them: it may be late to see it."""
        while len(heard) < count:
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()

    monkeypatch.setattr(trio.SocketStream, "receive_some", receive_some)
    async with serving() as url, AsyncExitStack() as streams:
        heads = (b"", b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\nx-slow: ")
        opened = [await streams.enter_async_context(open_raw(url)) for _ in heads]
        for stream, head in zip(opened, heads, strict=True):
            if head:
                await stream.send_all(head)
        sent = sum(map(len, heads))
        await wait_heard(sent)  # so the one that says nothing, the first, is accepted, too
        mock_clock.jump(40)
        await opened[-1].send_all(b"y")  # a drop now and then does not prolong it
        await wait_heard(sent + 1)
        mock_clock.jump(36)
        mock_clock.rate = 0.1  # or the guard, of half a minute for us, could never end it
        with trio.fail_after(3):
            for stream in opened:
                assert b" 200 " not in await read_all(stream)
        mock_clock.rate = 0.0


async def test_half_open_connections_beyond_the_limit_are_told_so_and_closed() -> None:
    async with open_bare(max_connections=20) as url, AsyncExitStack() as streams:
        for _ in range(20):
            await streams.enter_async_context(open_raw(url))
        async with open_raw(url) as one_too_many:
            answer = await read_all(one_too_many)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 5\r\n" in answer

        await streams.aclose()
        while True:  # until the server has seen them leave
            answer = await say(url, b"GET /livez HTTP/1.0\r\n\r\n")
            if answer.startswith(b"HTTP/1.1 200 "):
                break


async def test_a_fault_in_one_connection_ends_that_one_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = TCPServer.run
    faults = [RuntimeError("a bug of the server's library")]

    async def run(self: TCPServer) -> None:
        if faults:
            await trio.lowlevel.checkpoint()
            raise faults.pop()
        await broken(self)

    monkeypatch.setattr(TCPServer, "run", run)
    async with serving() as url:
        assert await say(url, b"") == b""
    assert "a bug of the server's library" in caplog.text


async def test_requests_one_behind_the_other_on_one_connection_are_answered_in_order() -> None:
    async with serving() as url:
        one = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        other = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = await say(url, one * 50 + other)
    assert answer.count(b"HTTP/1.1 200 ") == 50
    assert answer.count(b"HTTP/1.1 404 ") == 1
    assert answer.index(b"404") > answer.rindex(b"HTTP/1.1 200 ")


async def test_http_1_0_is_served_and_closed() -> None:
    async with serving() as url:
        answer = await say(url, b"GET /livez HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer.lower()


async def test_clients_that_vanish_in_the_middle_are_forgotten() -> None:
    async with serving() as url:
        for path in (b"/", b"/metrics", b"/api/status", b"/api/events"):
            for _ in range(10):
                async with open_raw(url) as stream:
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    await stream.send_all(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with httpx.AsyncClient() as client:
            assert (await client.get(url)).status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/3.0\r\nHost: localhost\r\n\r\n",
    ],
)
async def test_another_http_than_version_1_is_told_so_and_closed(request_bytes: bytes) -> None:
    # The limits hold for connections: a version that runs many requests on one of them would lift them all.
    async with serving() as url:
        answer = await say(url, request_bytes)
    assert answer.startswith(b"HTTP/1.1 505 ")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "upgrade",
    [
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        b"Upgrade: h2c\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    ],
)
async def test_an_upgrade_is_ignored_and_the_request_answered(upgrade: bytes) -> None:
    first = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n"
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    async with serving() as url:
        answer = await say(url, first + last)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 200 ") == 2
