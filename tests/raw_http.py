"""HTTP as bytes on a socket, for what no client library would send."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import httpx
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


_GUARD_S = 20.0
"""Only so that a server that does not close fails its test, and not the whole run."""


@asynccontextmanager
async def open_raw(url: str) -> AsyncIterator[trio.SocketStream]:
    """Connect to a server."""
    parsed = httpx.URL(url)
    assert parsed.port is not None
    async with await trio.open_tcp_stream(parsed.host, parsed.port) as stream:
        yield stream


async def read_all(stream: trio.SocketStream) -> bytes:
    """Read to the end of the connection; a server that closes with unread bytes resets it."""
    answer = b""
    with suppress(trio.BrokenResourceError):
        async for chunk in stream:
            answer += chunk
    return answer


async def say(url: str, request: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes."""
    async with open_raw(url) as stream:
        if request:
            await stream.send_all(request)
        with trio.fail_after(_GUARD_S):
            return await read_all(stream)


async def read_until(stream: trio.SocketStream, wanted: bytes) -> bytes:
    """Read until this has come; return all that came."""
    answer = b""
    with trio.fail_after(_GUARD_S):
        while wanted not in answer:
            chunk = await stream.receive_some()
            assert chunk, f"closed before {wanted!r}: {answer!r}"
            answer += chunk
    return answer
