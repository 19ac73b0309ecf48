"""What every HTTP server here shares: hypercorn on trio behind a socket of our own, an address line, a clean end.

The end: at the first SIGTERM or SIGINT nothing new is accepted, idle connections are closed and requests in flight get
a grace; at the second everything is cancelled.

Hypercorn's own `worker_serve` is not used: it accepts any number of connections, what it raises for one of them ends
all, and a client that takes nothing of its answer outlives the grace (sends are shielded and have no limit). HTTP/2 is
not spoken: the limits here hold for connections, and one connection would run many requests.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, cast

import attrs
import h11
import orjson
import trio
from hypercorn.config import Config
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from stationmaster.errors import StationmasterError, plain_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from hypercorn.typing import AppWrapper, ASGIFramework
    from starlette.requests import Request
    from starlette.types import ASGIApp

DEFAULT_GRACE_S = 3.0
_LOG = logging.getLogger("hypercorn.error")
_BODY_S = 30.0
"""Seconds in which a request's body must have arrived."""
_STALL_MS = 15_000
"""Milliseconds after which the kernel gives up a client that takes nothing of its answer: hypercorn sets its sends no
limit."""
DEFAULT_MAX_CONNECTIONS = 512
"""Half of the file descriptors that a process commonly has."""
_TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_IDLE_S = 75.0
"""Seconds that an idle connection stays open: longer than any client's pool keeps it, so that the client closes first
and never sends into a closing connection. It is also the time in which the first request's head must arrive."""


class ListenError(StationmasterError):
    """The address to listen on is not to be had; the message says which and why."""


async def bind(host: str, port: int) -> socket.socket:
    """Bind a TCP socket to the first address that `host` stands for; port 0 is any free one.

    Raises:
        ListenError: the name is unknown, or the address is taken or not ours.
    """
    try:
        found = await trio.socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            limit_stalls(sock)
            sock.setblocking(False)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ListenError(f"cannot listen on {host} port {port}: {error}") from error
    return sock


def limit_stalls(sock: socket.socket) -> None:
    """Let the kernel give up clients that take nothing. Accepted connections inherit it from a listening socket."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALL_MS)


@asynccontextmanager
async def open_server(
    app: ASGIApp,
    sock: socket.socket,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    max_connections: int = DEFAULT_MAX_CONNECTIONS,
) -> AsyncIterator[str]:
    """Serve an app on a bound socket while the block runs; gives the base URL, from when on it listens.

    Leaving the block closes the socket and idle connections at once; requests in flight get `grace_s` seconds. If the
    block raises or is cancelled, they are cancelled. A connection beyond `max_connections` is told 503 and closed.
    """
    config = Config()
    config.errorlog = _LOG  # a logger as it is: no handlers of hypercorn's own
    config.include_server_header = False
    config.keep_alive_timeout = _IDLE_S
    config.keep_alive_max_requests = sys.maxsize
    config.h11_max_incomplete_size = 16 * 1024  # all headers of a request together
    connections = _Connections(
        wrap_app(cast("ASGIFramework", app), wsgi_max_body_size=0, mode="asgi"),
        config,
        max_connections,
    )
    with sock, plain_errors():
        sock.listen(1024)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        async with trio.open_nursery() as nursery:
            accepting = await nursery.start(_accept, listener, connections.serve, nursery)
            yield _url(sock)
            accepting.cancel()
            await listener.aclose()
            await connections.end_idle()
            nursery.cancel_scope.deadline = trio.current_time() + grace_s


async def _accept(
    listener: trio.SocketListener,
    serve: Callable[[trio.SocketStream], Awaitable[None]],
    connections: trio.Nursery,
    *,
    task_status: trio.TaskStatus[trio.CancelScope],
) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await trio.serve_listeners(serve, [listener], handler_nursery=connections)


@attrs.define(eq=False)
class _Connections:
    """The connections of a server."""

    app: AppWrapper
    config: Config
    most: int
    _open: set[WorkerContext] = attrs.field(factory=set, init=False)
    """One for each: setting its `terminated` ends a connection as soon as it is idle."""

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end."""
        if len(self._open) >= self.most:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(_TOO_MANY)  # into the empty buffer of a new socket
            await stream.aclose()
            return
        context = WorkerContext(None)
        self._open.add(context)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_close_when_cancelled, stream)
                await _Connection(self.app, self.config, context, ConnectionState({}), stream).run()  # type: ignore[arg-type]
                nursery.cancel_scope.cancel()
        except Exception:  # noqa: BLE001
            # The edge of one connection: a fault in what serves it is no reason to end the others, or the process.
            _LOG.exception("error in a connection")
            await trio.lowlevel.checkpoint()
        finally:
            self._open.remove(context)

    async def end_idle(self) -> None:
        """End those that are idle, and the others when they are."""
        await trio.lowlevel.checkpoint()
        for context in tuple(self._open):
            await context.terminated.set()


class _Connection(TCPServer):
    """Hypercorn's, but only HTTP/1, and when its client has gone it does not wait for a next request."""

    async def _read_data(self) -> None:  # type: ignore[explicit-override] # Python 3.11 has no `override`
        protocol = self.protocol.protocol
        assert isinstance(protocol, H11Protocol)  # noqa: S101 - without TLS it begins as one
        protocol.connection = _Http1(self.config.h11_max_incomplete_size)
        await super()._read_data()
        await self.context.terminated.set()


class _Http1(h11.Connection):
    """What reads requests, before hypercorn looks whether they ask for another protocol.

    Another version is refused and ends the connection. A wish for an upgrade (h2c, websocket) is not passed on: the
    request is answered as it is.
    """

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=max_head_bytes)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:  # type: ignore[explicit-override]
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        if not event.http_version.startswith(b"1."):
            raise h11.RemoteProtocolError("not a version of HTTP/1", error_status_hint=505)
        if not any(name == b"upgrade" for name, _ in event.headers):
            return event
        return h11.Request(
            method=event.method,
            target=event.target,
            headers=[header for header in event.headers if header[0] != b"upgrade"],
            http_version=event.http_version,
        )


async def _close_when_cancelled(stream: trio.SocketStream) -> None:
    """Wake a send that is shielded, but has nobody who reads."""
    try:
        await trio.sleep_forever()
    finally:
        stream.socket.close()


async def serve_until_told(app: ASGIApp, *, host: str, port: int) -> None:
    """Serve an app as this process's one purpose: say the address on standard output, end on SIGTERM or SIGINT.

    The line is `listening on http://HOST:PORT`, written once, when connections are accepted. Returns when everything
    has ended; a second signal ends the grace. To be called in the main thread.

    Raises:
        ListenError: the address is not to be had.
    """
    sock = await bind(host, port)
    with sock, trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals, plain_errors():
        async with trio.open_nursery() as nursery:
            told = trio.Event()

            async def heed_signals() -> None:
                async for _ in signals:
                    if told.is_set():
                        nursery.cancel_scope.cancel()
                    told.set()

            nursery.start_soon(heed_signals)
            async with open_server(app, sock) as url:
                sys.stdout.write(f"listening on {url}\n")
                sys.stdout.flush()
                await told.wait()
            nursery.cancel_scope.cancel()


async def read_body(request: Request, *, limit_bytes: int) -> bytes:
    """Read a JSON request's body.

    What is too long is read to its end and thrown away: closing a connection with unread bytes resets it, and the
    client would never see the answer.

    Raises:
        HTTPException: 415 another content type, 413 longer than `limit_bytes`, 408 it did not arrive in time.
        ClientDisconnect: the client went away.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    chunks: list[bytes] = []
    size = 0
    with trio.move_on_after(_BODY_S) as scope:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit_bytes:
                chunks.clear()
            else:
                chunks.append(chunk)
    if scope.cancelled_caught:
        raise HTTPException(408, f"the body did not arrive within {_BODY_S:g} s")
    if size > limit_bytes:
        raise HTTPException(413, f"the body is longer than {limit_bytes} bytes")
    if content_type != "application/json":
        raise HTTPException(415, "expected Content-Type: application/json")
    return b"".join(chunks)


def json_response(
    content: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Make a JSON answer."""
    return Response(
        orjson.dumps(content), status_code=status, headers=headers, media_type="application/json"
    )


def error_handlers(
    render: Callable[[HTTPException], Response],
) -> dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]]:
    """Make the `exception_handlers` of a Starlette app whose errors all have one form.

    Args:
        render: gives a refusal that form; a bug comes as a 500 that names nothing but its class (the log has it all).
    """
    # All async: Starlette runs plain functions in threads.

    async def on_refusal(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
        await trio.lowlevel.checkpoint()
        return render(error)

    async def on_bug(_: Request, error: Exception) -> Response:
        await trio.lowlevel.checkpoint()
        return render(HTTPException(500, f"a bug in this server: {type(error).__name__}"))

    async def on_disconnect(_: Request, __: Exception) -> Response:
        await trio.lowlevel.checkpoint()
        return Response(status_code=499)  # nobody is there to read it

    return {HTTPException: on_refusal, ClientDisconnect: on_disconnect, Exception: on_bug}


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"
