"""What every HTTP server here shares: hypercorn on trio behind a socket of our own, an address line, a clean end.

The end: at the first SIGTERM or SIGINT nothing new is accepted, idle connections are closed and requests in flight get
a grace; at the second everything is cancelled.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import orjson
import trio
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from stationmaster.errors import StationmasterError, plain_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from hypercorn.typing import ASGIFramework
    from starlette.requests import Request
    from starlette.types import ASGIApp

DEFAULT_GRACE_S = 3.0
_BODY_S = 30.0
"""Seconds in which a request's body must have arrived."""
_STALL_MS = 15_000
"""Milliseconds after which the kernel gives up a client that takes nothing of its answer. Without it such a client
outlives every grace: hypercorn shields its sends and sets them no limit."""
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
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALL_MS)
            sock.setblocking(False)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ListenError(f"cannot listen on {host} port {port}: {error}") from error
    return sock


@asynccontextmanager
async def open_server(
    app: ASGIApp, sock: socket.socket, *, grace_s: float = DEFAULT_GRACE_S
) -> AsyncIterator[str]:
    """Serve an app on a bound socket while the block runs; gives the base URL, from when on it listens.

    Leaving the block closes the socket and idle connections at once; requests in flight get `grace_s` seconds. If the
    block raises or is cancelled, they are cancelled.
    """
    config = Config()
    config.errorlog = logging.getLogger(
        "hypercorn.error"
    )  # a logger as it is: no handlers of hypercorn's own
    config.graceful_timeout = grace_s
    config.keep_alive_timeout = _IDLE_S
    config.keep_alive_max_requests = sys.maxsize
    config.h11_max_incomplete_size = 16 * 1024  # all headers of a request together
    stop = trio.Event()
    with sock, plain_errors():
        sock.listen(1024)
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(
                    worker_serve,
                    wrap_app(cast("ASGIFramework", app), wsgi_max_body_size=0, mode="asgi"),
                    config,
                    sockets=Sockets([], [sock], []),
                    shutdown_trigger=stop.wait,
                ),
                name="http server",
            )
            yield _url(sock)
            stop.set()


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
