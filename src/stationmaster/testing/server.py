"""A small real HTTP/1.1 server on loopback that answers by a script: also wrongly, late, in part or not at all.

For tests of an embedder, a sink or a handler that speaks HTTP. It needs the real clock.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NoReturn, cast

import attrs
import h11
import trio
from trio_util import AsyncValue

from stationmaster.errors import plain_errors
from stationmaster.testing.clock import refuse_jumping_clock

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

MAX_REQUEST_BYTES: Final = 64 * 1024 * 1024
"""A request with a larger body is cut off: the connection is closed."""


@attrs.frozen(kw_only=True)
class Request:
    """A request that arrived whole."""

    method: str
    target: str
    """Path and query."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    connection: int
    """Which connection it came by, from 0."""


@attrs.frozen(kw_only=True)
class Reply:
    """What to send, when, how much of it, how, and what becomes of the connection then."""

    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict)
    """`Content-Length` is that of the body, unless it is told here; an empty one is left out."""
    body: bytes = b""
    raw: bytes | None = None
    """These bytes instead of an answer in HTTP."""
    first: int | None = None
    """Send only the first so many bytes."""
    after_s: float = 0.0
    """Wait so many seconds before the first byte."""
    pause_s: float | None = None
    """Send byte by byte, with this pause after each."""
    end: Literal["keep", "close", "reset", "hang", "ambush"] = "keep"
    """`close` and `reset` come without notice; `hang` waits until the client leaves; `ambush` looks like `keep`, but
    the next request on this connection is answered by a reset."""

    def wire(self) -> bytes:
        """Return the bytes to send."""
        if self.raw is not None:
            return self.raw[: self.first]
        headers = {"Content-Length": str(len(self.body)), **self.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
        head = f"HTTP/1.1 {self.status} Scripted\r\n{lines}\r\n".encode()
        return (head + self.body)[: self.first]


HANG: Final = Reply(first=0, end="hang")
"""Never answer."""
RESET: Final = Reply(first=0, end="reset")
"""Reset the connection instead of an answer."""


def _ok(request: Request) -> Reply:
    del request
    return Reply(body=b"{}")


@attrs.define(eq=False)
class ScriptedServer:
    """Answers from `script` while it lasts, else by `answer`; remembers what it saw. Opened by `open_server`."""

    url: str
    """Without a slash at its end."""
    answer: Callable[[Request], Reply]
    script: deque[Reply] = attrs.field(factory=deque, init=False)
    """Each request takes one from the left."""
    seen: list[Request] = attrs.field(factory=list, init=False)
    """Every request, oldest first (it grows without bound)."""
    requests: AsyncValue[int] = attrs.field(factory=lambda: AsyncValue(0), init=False)
    """How many arrived; to wait for: `await server.requests.wait_value(3)`."""
    open_connections: AsyncValue[int] = attrs.field(factory=lambda: AsyncValue(0), init=False)
    """How many are open; to wait for."""
    _numbers: Iterator[int] = attrs.field(factory=itertools.count, init=False)

    @property
    def connections(self) -> list[int]:
        """By which connection each request came."""
        return [request.connection for request in self.seen]

    async def _serve(self, around: trio.Nursery, stream: trio.abc.Stream) -> None:
        self.open_connections.value += 1
        try:
            await self._converse(around, stream, next(self._numbers))
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            pass  # the client left in the middle: many tests want just that
        finally:
            self.open_connections.value -= 1
            await trio.aclose_forcefully(stream)

    async def _converse(self, around: trio.Nursery, stream: trio.abc.Stream, number: int) -> None:
        rest = b""
        while True:
            request, rest = await _read_request(stream, rest, number)
            if request is None:
                return
            self.seen.append(request)
            self.requests.value += 1
            try:
                reply = self.script.popleft() if self.script else self.answer(request)
            except Exception as error:  # noqa: BLE001 - raised in a task of its own
                # Here the closing of the connection would wake the client first, and its error take this one's place.
                around.start_soon(_raise, error)
                await trio.sleep_forever()
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


async def _raise(error: Exception) -> NoReturn:
    await trio.lowlevel.cancel_shielded_checkpoint()
    raise error


async def _read_request(
    stream: trio.abc.Stream, rest: bytes, number: int
) -> tuple[Request | None, bytes]:
    await trio.lowlevel.checkpoint()  # a request may lie in `rest`
    parser = h11.Connection(h11.SERVER)
    if rest:
        parser.receive_data(rest)
    head: h11.Request | None = None
    body = bytearray()
    while True:  # noqa: ASYNC913 - each turn takes from what is there, or waits for more
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_REQUEST_BYTES:
                return None, b""
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            seen = Request(
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
    await trio.sleep(reply.after_s)
    wire = reply.wire()
    if reply.pause_s is None:
        await stream.send_all(wire)
        return
    for byte in wire:
        await stream.send_all(bytes([byte]))
        await trio.sleep(reply.pause_s)


def _reset_on_close(stream: trio.abc.Stream) -> None:
    """Let closing send RST instead of FIN."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    no_linger = struct.pack("ii", 1, 0)
    cast("trio.SocketStream", transport).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)


@asynccontextmanager
async def open_server(
    answer: Callable[[Request], Reply] = _ok, *, ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    """Serve on a free port of 127.0.0.1 until the block ends.

    Args:
        answer: called for each request beyond the script. What it raises ends the block, as itself.
        ssl_context: speak TLS.

    Raises:
        RuntimeError: the clock jumps while an answer is on its way (`MockClock(autojump_threshold=0)`).
    """
    refuse_jumping_clock("what comes through a socket takes real time")
    with plain_errors():
        async with trio.open_nursery() as nursery:
            [tcp] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            scheme = "http" if ssl_context is None else "https"
            listener: trio.abc.Listener[trio.abc.Stream] = (
                tcp if ssl_context is None else trio.SSLListener(tcp, ssl_context)
            )
            server = ScriptedServer(f"{scheme}://127.0.0.1:{tcp.socket.getsockname()[1]}", answer)
            await nursery.start(trio.serve_listeners, partial(server._serve, nursery), [listener])  # noqa: SLF001
            yield server
            nursery.cancel_scope.cancel()
