"""The web ring: opened first and left last, so that health answers while the service drains."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from stationmaster.errors import ConfigError, plain_errors
from stationmaster.service.asgi import DEFAULT_MAX_CONNECTIONS, bind, limit_stalls, open_server
from stationmaster.service.web.broadcast import DEFAULT_INTERVAL_S, Broadcast
from stationmaster.service.web.guard import Guard
from stationmaster.service.web.routes import Endpoints, web_app
from stationmaster.service.web.streams import DEFAULT_MAX_STREAMS, EventStreams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.service.status import StatusBoard
    from stationmaster.service.web.routes import Exposition, Probes

_GRACE_S: Final = 1.0


@asynccontextmanager
async def open_web(
    *,
    host: str,
    port: int,
    token: str | None,
    health: Probes,
    metrics: Exposition,
    board: StatusBoard,
    sock: socket.socket | None = None,
    interval_s: float = DEFAULT_INTERVAL_S,
    max_streams: int = DEFAULT_MAX_STREAMS,
    max_connections: int = DEFAULT_MAX_CONNECTIONS,
) -> AsyncIterator[str]:
    """Serve probes, metrics and status while the block runs; gives the base URL, from when on it listens.

    Args:
        host: where to listen.
        port: 0 is any free one.
        token: asked of every request but `/livez`; needed unless the address is loopback.
        health: what the probes say.
        metrics: what a scrape gets.
        board: what the page shows.
        sock: a TCP socket that is bound already (systemd's), instead of host and port.
        interval_s: between two editions of the event streams.
        max_streams: event streams at the same time.
        max_connections: of every kind.

    Raises:
        ConfigError: without a token this address must not be served, or the socket is none of TCP.
        ListenError: the address is not to be had.
    """
    if sock is None:
        sock = await bind(host, port)
    else:
        await trio.lowlevel.checkpoint()
    with sock, plain_errors():
        _check(sock, token)
        limit_stalls(sock)
        broadcast, closing = Broadcast(board, interval_s), trio.Event()
        endpoints = Endpoints(health=health, metrics=metrics, board=board)
        app = web_app(endpoints, EventStreams(broadcast, closing, max_streams))
        guard = Guard(app, token.encode() if token is not None else None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broadcast.run, name="status broadcast")
            async with open_server(
                guard, sock, grace_s=_GRACE_S, max_connections=max_connections
            ) as url:
                try:
                    yield url
                finally:
                    closing.set()
            nursery.cancel_scope.cancel()


def _check(sock: socket.socket, token: str | None) -> None:
    """Look at where the socket really listens: a name, or systemd, may have chosen."""
    if sock.family not in {socket.AF_INET, socket.AF_INET6} or sock.type != socket.SOCK_STREAM:
        raise ConfigError(
            ["web: the socket that was passed is none of TCP; expected ListenStream=[HOST:]PORT"]
        )
    address = sock.getsockname()[0]
    if token is None and not ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            [
                f"web.token_file: is missing; expected a file that holds a token: {address} is no loopback address"
            ]
        )
