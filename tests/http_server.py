"""A small real HTTP/1.1 server on loopback that answers by a script: also wrongly, late, in part or not at all."""

from __future__ import annotations

import itertools
import socket
import ssl
import struct
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

import attrs
import h11
import trio
from trio_util import AsyncValue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path


@attrs.frozen(kw_only=True)
class Seen:
    """A request that arrived whole."""

    method: str
    target: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    connection: int
    """Which connection it came by, from 0."""


@attrs.frozen(kw_only=True)
class Reply:
    """What to send, how much of it, how, and what becomes of the connection then."""

    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict)
    body: bytes = b""
    raw: bytes | None = None
    """These bytes instead of an answer in HTTP."""
    first: int | None = None
    """Send only the first so many bytes."""
    pause_s: float | None = None
    """Send byte by byte, with this pause after each."""
    end: Literal["keep", "close", "reset", "hang", "ambush"] = "keep"
    """`close` and `reset` come without notice; `hang` waits until the client leaves; `ambush` looks like `keep`, but
    the next request on this connection is answered by a reset."""

    def wire(self) -> bytes:
        if self.raw is not None:
            return self.raw[: self.first]
        headers = {"Content-Length": str(len(self.body)), **self.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
        return (f"HTTP/1.1 {self.status} Scripted\r\n{lines}\r\n".encode() + self.body)[
            : self.first
        ]


HANG = Reply(first=0, end="hang")
RESET = Reply(first=0, end="reset")


@attrs.define(eq=False)
class ScriptedServer:
    """Answers from `script` while it lasts, else by `answer`; remembers what it saw."""

    url: str
    answer: Callable[[Seen], Reply]
    script: deque[Reply] = attrs.field(factory=deque, init=False)
    seen: list[Seen] = attrs.field(factory=list, init=False)
    requests: AsyncValue[int] = attrs.field(factory=lambda: AsyncValue(0), init=False)
    """How many arrived; to wait for."""
    open_connections: AsyncValue[int] = attrs.field(factory=lambda: AsyncValue(0), init=False)
    _numbers: Iterator[int] = attrs.field(factory=itertools.count, init=False)

    @property
    def connections(self) -> list[int]:
        """By which connection each request came."""
        return [request.connection for request in self.seen]

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.open_connections.value += 1
        number = next(self._numbers)
        try:
            await self._converse(stream, number)
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            pass  # the client left in the middle: many tests want just that
        finally:
            self.open_connections.value -= 1
            await trio.aclose_forcefully(stream)

    async def _converse(self, stream: trio.abc.Stream, number: int) -> None:
        rest = b""
        while True:
            request, rest = await _read_request(stream, rest, number)
            if request is None:
                return
            self.seen.append(request)
            self.requests.value += 1
            reply = self.script.popleft() if self.script else self.answer(request)
            await _send(stream, reply)
            if reply.end == "close":
                return
            if reply.end == "hang":
                while await stream.receive_some():
                    pass
                return
            if reply.end == "ambush":
                await stream.receive_some()
            if reply.end in {"reset", "ambush"}:
                _reset_on_close(stream)
                return


async def _read_request(
    stream: trio.abc.Stream, rest: bytes, number: int
) -> tuple[Seen | None, bytes]:
    parser = h11.Connection(h11.SERVER)
    if rest:
        parser.receive_data(rest)
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            seen = Seen(
                method=head.method.decode(),
                target=head.target.decode(),
                headers={name.decode(): value.decode() for name, value in head.headers},
                body=bytes(body),
                connection=number,
            )
            return seen, parser.trailing_data[0]
        else:
            return None, b""


async def _send(stream: trio.abc.Stream, reply: Reply) -> None:
    wire = reply.wire()
    if reply.pause_s is None:
        await stream.send_all(wire)
        return
    for byte in wire:
        await stream.send_all(bytes([byte]))
        await trio.sleep(reply.pause_s)


def _reset_on_close(stream: trio.abc.Stream) -> None:
    """Let closing send RST instead of FIN."""
    while isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    assert isinstance(stream, trio.SocketStream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@asynccontextmanager
async def open_server(
    answer: Callable[[Seen], Reply] = lambda _: Reply(body=b"{}"),
    *,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[ScriptedServer]:
    """Serve on a free port of 127.0.0.1 until the block ends."""
    async with trio.open_nursery() as nursery:
        [tcp] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        scheme = "http" if ssl_context is None else "https"
        listener: trio.abc.Listener[trio.abc.Stream] = (
            tcp if ssl_context is None else trio.SSLListener(tcp, ssl_context)
        )
        server = ScriptedServer(f"{scheme}://127.0.0.1:{tcp.socket.getsockname()[1]}", answer)
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        yield server
        nursery.cancel_scope.cancel()


def closed_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tls_contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's context with a certificate for 127.0.0.1, and that of a client that trusts it."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_text(_CERTIFICATE)
    key.write_text(_KEY)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=certificate)


# Self-signed, for tests alone, good from 2020 to 2120.
_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIBAjAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNTAIl9UBnxHbO7F
j1fTcCSw3kIz2xvSCyyE7BiZkYzzW4ZZtUNn27PViLzS35YopldhE+RnO5L2/EEW
gBuAvEyjXjBcMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBRuU99Sfw+CawEQKQbdCm80e+8UMDAOBgNVHQ8BAf8E
BAMCAoQwCgYIKoZIzj0EAwIDSAAwRQIhALU4OmCK0TSeP2bxgoOW/s4LAg4k4eWN
wdc+oKmMP/LoAiAO4+uSet1+KI4bYUgwS6b3DgD1SS2NVgm5TVhTSlzc5A==
-----END CERTIFICATE-----
"""
_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXe4ikXEecR0djsxF
A/3gt4vkMUdCRLMFwmGAL49UbtuhRANCAATUwCJfVAZ8R2zuxY9X03AksN5CM9sb
0gsshOwYmZGM81uGWbVDZ9uz1Yi80t+WKKZXYRPkZzuS9vxBFoAbgLxM
-----END PRIVATE KEY-----
"""
