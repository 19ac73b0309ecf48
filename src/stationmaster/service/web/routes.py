"""The routes: probes, metrics, status, events, the page and its two assets.

/livez /readyz    200 or 503, {"ok": ..., "checks": [{"name": ..., "ok": ..., "detail": ...}]}
/metrics          Prometheus text or OpenMetrics, by the Accept header
/api/status       everything that is known, as JSON
/api/events       the same as it changes, as server-sent events
/                 the page
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from stationmaster.service.asgi import error_handlers, json_response
from stationmaster.service.web.page import Page

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from stationmaster.service.health import Check
    from stationmaster.service.status import StatusBoard

ASSETS: Final = {
    "status.css": "text/css; charset=utf-8",
    "status.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_PICTURE_S: Final = 0.25
"""A picture is asked for again and again: one so old will do."""


class Probes(Protocol):
    """How the service is: `stationmaster.service.health.Health`."""

    def live(self) -> Sequence[Check]:
        """Return what must hold for the process to be worth keeping."""
        ...

    def ready(self) -> Sequence[Check]:
        """Return what must hold for its work to be done."""
        ...


class Exposition(Protocol):
    """The figures: `stationmaster.service.metrics.Metrics`."""

    def render(self, accept: str | None, /) -> tuple[bytes, str]:
        """Return a body and its content type."""
        ...


@attrs.define(eq=False, kw_only=True)
class Endpoints:
    """What the routes answer."""

    health: Probes
    metrics: Exposition
    board: StatusBoard
    page: Page = attrs.field(factory=lambda: Page(versions=_versions()))
    _json: tuple[float, bytes] = attrs.field(default=(-1.0, b""), init=False)
    _html: tuple[float, bytes] = attrs.field(default=(-1.0, b""), init=False)

    async def livez(self, _: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return _answer(self.health.live())

    async def readyz(self, _: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return _answer(self.health.ready())

    async def expose(self, request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        body, content_type = self.metrics.render(request.headers.get("accept"))
        return Response(body, headers={"content-type": content_type})

    async def status(self, _: Request) -> Response:
        await trio.lowlevel.checkpoint()
        now = trio.current_time()
        if now >= self._json[0]:
            answer = json_response(self.board.whole_picture())
            self._json = now + _PICTURE_S, bytes(answer.body)
        return Response(self._json[1], media_type="application/json")

    async def root(self, _: Request) -> Response:
        await trio.lowlevel.checkpoint()
        now = trio.current_time()
        if now >= self._html[0]:
            self._html = now + _PICTURE_S, self.page.render(self.board)
        return Response(self._html[1], media_type="text/html; charset=utf-8")


async def _asset(request: Request) -> Response:
    await trio.lowlevel.checkpoint()
    name = request.path_params["name"]
    if name not in ASSETS:
        return Response("Not Found\n", 404, media_type="text/plain")
    # The page names them with a hash of their content.
    headers = {
        "cache-control": "private, max-age=31536000, immutable",
        "content-type": ASSETS[name],
    }
    return Response(read_asset(name), headers=headers)


def read_asset(name: str) -> bytes:
    """Return a file of the page."""
    return resources.files("stationmaster.service.web").joinpath("assets", name).read_bytes()


def _versions() -> dict[str, str]:
    return {name: hashlib.sha256(read_asset(name)).hexdigest()[:12] for name in ASSETS}


def web_app(endpoints: Endpoints, events: ASGIApp) -> Starlette:
    """Make the ASGI app; `events` is the endpoint of the event streams."""
    app = Starlette(
        routes=[
            Route("/livez", endpoints.livez),
            Route("/readyz", endpoints.readyz),
            Route("/metrics", endpoints.expose),
            Route("/api/status", endpoints.status),
            Route("/api/events", events, methods=["GET"]),
            Route("/static/{name}", _asset),
            Route("/", endpoints.root),
        ],
        exception_handlers=error_handlers(_render),
    )
    app.router.redirect_slashes = False
    return app


def _answer(checks: Sequence[Check]) -> Response:
    ok = all(check.ok for check in checks)
    told = [{"name": one.name, "ok": one.ok, "detail": one.detail} for one in checks]
    return json_response({"ok": ok, "checks": told}, status=200 if ok else 503)


def _render(error: HTTPException) -> Response:
    return Response(
        f"{error.detail}\n", error.status_code, headers=error.headers, media_type="text/plain"
    )
