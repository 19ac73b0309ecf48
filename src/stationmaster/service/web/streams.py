"""`/api/events`: the broadcast as server-sent events, to so many clients at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import attrs
import trio
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from stationmaster.service.web.broadcast import Broadcast

DEFAULT_MAX_STREAMS: Final = 256
_RETRY: Final = b"retry: 2000\n\n"
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # a proxy that gathers answers would hold them back
]


@attrs.define(eq=False)
class EventStreams:
    """An ASGI endpoint. Streams end when `closing` is set: by themselves they would take the server's whole grace."""

    broadcast: Broadcast
    closing: trio.Event
    most: int = DEFAULT_MAX_STREAMS
    _open: int = attrs.field(default=0, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one client until it leaves or the service closes."""
        if self._open >= self.most or self.closing.is_set():
            text = f"{self._open} clients read the events already\n"
            headers = {"retry-after": "10", "connection": "close"}
            await PlainTextResponse(text, 503, headers)(scope, receive, send)
            return
        self._open += 1
        self.broadcast.join()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            if scope["method"] == "GET":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_at_closing, self.closing, nursery.cancel_scope)
                    nursery.start_soon(_cancel_at_leaving, receive, nursery.cancel_scope)
                    await self._tell(send)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.broadcast.leave()
            self._open -= 1

    async def _tell(self, send: Send) -> NoReturn:
        async def write(piece: bytes) -> None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        await write(_RETRY)
        seen = self.broadcast.edition
        for piece in self.broadcast.whole():
            await write(piece)
        while True:
            last, seen = seen, await self.broadcast.wait_edition(seen)
            for piece in self.broadcast.pieces(last):
                await write(piece)


async def _cancel_at_closing(closing: trio.Event, scope: trio.CancelScope) -> None:
    await closing.wait()
    scope.cancel()


async def _cancel_at_leaving(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
