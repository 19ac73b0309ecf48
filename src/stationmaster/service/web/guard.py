"""What every request must pass before it is looked at, and what every answer says to browsers.

1. Only GET and HEAD, without a body: nothing can be changed here.
2. With a token: `Authorization: Bearer TOKEN`, or `Basic` with the token as password, which is what a browser can ask
   its user for. `/livez` stays open: who watches processes has no secrets.
3. Without a token only loopback is served, and the request must name an address or localhost: else a page from
   anywhere could read this one in its visitor's browser, by a name of its own that it lets point here.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from typing import TYPE_CHECKING, Final

import attrs
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OPEN_PATH: Final = "/livez"
_ALWAYS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@attrs.define(eq=False)
class Guard:
    """An ASGI app around another."""

    app: ASGIApp
    token: bytes | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope["method"], scope["path"], Headers(scope=scope))
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, method: str, path: str, headers: Headers) -> Response | None:
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if method not in {"GET", "HEAD"} or has_body:
            # The body is not read: the connection cannot go on.
            allow = {"allow": "GET, HEAD", "connection": "close"}
            return PlainTextResponse("only GET and HEAD, without a body\n", 405, allow)
        if path == _OPEN_PATH:
            return None
        if self.token is None:
            if not _names_an_address(headers.get("host", "")):
                text = "without a token this is only served under an address or localhost\n"
                return PlainTextResponse(text, 421)
            return None
        if not _carries(self.token, headers.get("authorization", "")):
            refusal = PlainTextResponse("a token is needed\n", 401)
            for challenge in ("Bearer", 'Basic realm="stationmaster"'):
                refusal.headers.append("www-authenticate", challenge)
            return refusal
        return None


def _carries(token: bytes, authorization: str) -> bool:
    scheme, _, rest = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            given = rest.strip().encode()
        case "basic":
            try:
                given = base64.b64decode(rest.strip().encode(), validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        case _:
            return False
    return hmac.compare_digest(given, token)


def _names_an_address(host: str) -> bool:
    """Tell whether a Host header (`[::1]:8080`, `localhost`) is one that no foreign page can have brought here."""
    name = host[: host.rfind("]") + 1] or host.partition(":")[0]
    if name.lower().rstrip(".") in {
        "localhost",
        "",
    }:  # none at all: HTTP/1.0, which no browser speaks
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
