"""A small HTTP/1.1 client of one server, over connections that no two tasks ever share. httpx is imported here only.

Rules:
1. A connection is lent to one request at a time (the one given back last goes first), and is an httpx transport of
   its own. No task ever waits inside an httpx pool: a request that is cancelled there can leave its slot stuck for
   good (httpcore issue 1093).
2. A connection is kept only after an answer that was read to its end, with a status below 500. After anything else
   (an error, a cancellation, a cut answer, a 5xx: servers are known to hang up after one without saying so) it is
   closed before it is given back, and the next request opens a new one.
3. A request that breaks on a kept connection before its status came is sent once more, on a new one: the server may
   have closed the old one meanwhile. Therefore this client is for requests that may arrive twice.
"""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

import attrs
import httpx
import trio

from stationmaster.errors import StationmasterError
from stationmaster.http_words import ERROR_BODY_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping


_BODY_GRACE_S = 1.0
"""How long such a body may take once the status is known."""
_CLOSE_LIMIT_S = 1.0
_KEEPALIVE_S = 60.0
"""Longer than the pause between two batches; a connection the server closed earlier is noticed by rules 1 and 3."""

_USER_AGENT = f"stationmaster/{version('stationmaster')}"

Kind: TypeAlias = Literal["connect", "timeout", "broken", "too-long", "encoding"]


class HttpError(StationmasterError):
    """No usable answer came.

    Attributes:
        kind: `connect`: no connection, nothing was sent. `timeout`: no answer within the limit. `broken`: reset or
            closed before the answer's end, or what came is not HTTP. `too-long`: more than the caller takes.
            `encoding`: compressed, which was not asked for.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        self.kind: Kind = kind
        super().__init__(message)


@attrs.frozen(kw_only=True)
class HttpAnswer:
    """What the server said. Redirects are answers like any other."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class _Body(httpx.AsyncByteStream):
    """A request's body in one piece.

    httpx's own is an async generator: one whose sending is cancelled waits for the garbage collector, and trio warns.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._sent = False

    def __aiter__(self) -> Self:  # type: ignore[explicit-override]  # typing.override came with Python 3.12
        self._sent = False
        return self

    async def __anext__(self) -> bytes:
        if self._sent:
            raise StopAsyncIteration
        self._sent = True
        return self._content  # noqa: ASYNC910 -- it is sent at once, which is a checkpoint


@attrs.define(eq=False)
class _Connection:
    """One httpx transport with room for one connection, made when needed and thrown away by rule 2."""

    _make_transport: Callable[[], httpx.AsyncHTTPTransport]
    _transport: httpx.AsyncHTTPTransport | None = attrs.field(default=None, init=False)

    async def exchange(
        self, request: httpx.Request, deadline: float, max_answer_bytes: int | None
    ) -> HttpAnswer:
        """Send a request and receive its answer, by the rules above; deadline is on trio's clock."""
        response: httpx.Response | None = None
        try:
            with trio.move_on_at(deadline):
                response = await self._send_by_rule_3(request)
            if response is None:
                raise HttpError("timeout", f"{_where(request)} did not answer in time")
            return await self._receive(response, request, deadline, max_answer_bytes)
        except httpx.TransportError as error:
            raise _http_error(request, error) from error

    async def _send_by_rule_3(self, request: httpx.Request) -> httpx.Response:
        kept = self._transport is not None
        try:
            return await self._send(request)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            if not kept:
                raise
        return await self._send(request)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        if self._transport is None:
            self._transport = self._make_transport()
        try:
            return await self._transport.handle_async_request(request)
        except BaseException:
            with trio.move_on_after(_CLOSE_LIMIT_S, shield=True):
                await self.close()
            raise

    async def _receive(
        self,
        response: httpx.Response,
        request: httpx.Request,
        deadline: float,
        max_answer_bytes: int | None,
    ) -> HttpAnswer:
        status = response.status_code
        # A body that decides nothing is read as far as it comes at once: the status stands, whatever happens to it.
        limit = max_answer_bytes if status < 400 else None
        decided = limit is None
        if limit is None:
            limit, deadline = ERROR_BODY_BYTES, trio.current_time() + _BODY_GRACE_S
        body = bytearray()
        size = 0
        whole = False
        try:
            with trio.move_on_at(deadline) as reading:
                # What is too much is given up by cancelling the read: httpcore's nested generators end cleanly by an
                # exception from within, while leaving the loop would hand them to the garbage collector.
                async for piece in response.aiter_raw():
                    size += len(piece)
                    body += piece[: limit - len(body)]
                    if size > limit:
                        reading.cancel()
                whole = True
        except httpx.TransportError:
            if not decided:
                raise
        finally:
            if not whole or status >= 500:
                with trio.move_on_after(_CLOSE_LIMIT_S, shield=True):
                    await self.close()
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            if not decided:
                raise HttpError("encoding", f"{_where(request)} compressed its answer unasked")
            body.clear()
        if not decided and size > limit:
            raise HttpError("too-long", f"{_where(request)} answered with more than {limit} bytes")
        if not decided and not whole:
            raise HttpError("timeout", f"{_where(request)} did not end its answer in time")
        answer = HttpAnswer(status=status, headers=dict(response.headers), body=bytes(body))
        return answer  # noqa: ASYNC910, RET504 -- sending the request was the checkpoint

    async def close(self) -> None:
        """Close the connection, if there is one; the next request opens another."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()
        await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class HttpClient:
    """POST and GET to one server; made by `open_http_client`. Many tasks may use it at once."""

    where: str
    """The URL without its query, which may hold a secret; for messages."""
    _url: str = attrs.field(repr=False)
    _headers: Mapping[str, str] = attrs.field(repr=False)
    _timeout_s: float
    _connect_timeout_s: float
    _idle: list[_Connection] = attrs.field(repr=False)
    _limiter: trio.CapacityLimiter = attrs.field(repr=False)
    _closed: bool = attrs.field(default=False, init=False)

    async def request(
        self,
        method: str,
        path: str = "",
        *,
        content: bytes = b"",
        headers: Mapping[str, str] | None = None,
        max_answer_bytes: int | None = None,
    ) -> HttpAnswer:
        """Send a request that may arrive twice (rule 3), or although an error is raised.

        Args:
            method: POST or GET.
            path: what follows the client's URL.
            content: the body, sent as it is.
            headers: beside those of the client.
            max_answer_bytes: a success longer than this is an error. None: the status is all that counts; of the
                body, as of every answer from 400 on, only the first 16 KiB are read, and neither a lack nor an excess
                of them is an error.

        Returns:
            The answer, whatever its status.

        Raises:
            HttpError: no usable answer came.
            trio.ClosedResourceError: the client is closed.

        Waits for a free connection under the caller's cancel scopes only; the client's time-out begins then.
        Cancelled, it closes its connection: so the server hears of it.
        """
        connect_s = self._connect_timeout_s
        request = httpx.Request(
            method,
            self._url + path,
            headers={**self._headers, **(headers or {})},
            content=content,
            # Nobody waits for a pool (rule 1): if ever one had to, a time-out of nothing turns that into an error.
            extensions={"timeout": {"connect": connect_s, "read": None, "write": None, "pool": 0}},
        )
        request.stream = _Body(content)
        async with self._limiter:
            self._check_open()
            connection = self._idle.pop()
            try:
                deadline = trio.current_time() + self._timeout_s
                return await connection.exchange(request, deadline, max_answer_bytes)
            finally:
                self._idle.append(connection)
                if self._closed:
                    with trio.move_on_after(_CLOSE_LIMIT_S, shield=True):
                        await connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"the HTTP client for {self.where} is closed")

    async def _close(self) -> None:
        self._closed = True
        for connection in self._idle:
            await connection.close()
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_http_client(
    url: str,
    *,
    connections: int = 4,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
    connect_timeout_s: float = 5.0,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[HttpClient]:
    """Open a client for one server. No connection is made before the first request.

    Args:
        url: http or https, without user, password and fragment.
        connections: how many requests may be under way at once, each on a connection of its own.
        headers: sent with every request; never shown.
        timeout_s: for one request, from having a connection's slot to the end of the answer.
        connect_timeout_s: for connecting, and again for the TLS handshake.
        ssl_context: whom to trust; the system's certificate authorities if None. Never nobody.

    Raises:
        ValueError: an argument is wrong.

    The environment (proxies, .netrc) is not read. A request that is under way when the client closes goes on to its
    end; those that wait for a connection are refused.
    """
    check_url(url)
    if connections < 1:
        raise ValueError(f"connections must be at least 1, not {connections}")
    if ssl_context is None:
        # Reading the system's certificates takes 35 ms: only where they are needed. The other context trusts nobody.
        secure = url.lower().startswith("https:")
        ssl_context = (
            ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        )

    def make_transport() -> httpx.AsyncHTTPTransport:
        # The transport, not httpx's client on top: no cookies, redirects, credentials or log lines to switch off.
        return httpx.AsyncHTTPTransport(
            verify=ssl_context,
            trust_env=False,
            http2=False,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=_KEEPALIVE_S),
        )

    client = HttpClient(
        where=url.partition("?")[0],
        url=url,
        headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **(headers or {})},
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        idle=[_Connection(make_transport) for _ in range(connections)],
        limiter=trio.CapacityLimiter(connections),
    )
    await trio.lowlevel.checkpoint()
    try:
        yield client
    finally:
        with trio.move_on_after(_CLOSE_LIMIT_S, shield=True):
            await client._close()  # noqa: SLF001


def check_url(url: str) -> None:
    """Refuse a URL that cannot work or that holds a secret which would be shown.

    Raises:
        ValueError: it is not http or https, or has no host, a user, a password or a fragment.
    """
    try:
        parsed = httpx.URL(url)
        host = parsed.host
        # Looking it up does the same, where nobody maps the error.
        parsed.raw_host.decode().encode("idna")
    except (httpx.InvalidURL, TypeError, UnicodeError) as error:
        if isinstance(url, str) and "@" in url:
            raise ValueError("not a URL") from None  # the words may quote a piece of a password
        raise ValueError(f"not a URL: {error}") from None
    if parsed.userinfo:
        raise ValueError(
            f"the URL for {host} holds a user or a password: they would be shown; use a token"
        )
    if parsed.scheme not in {"http", "https"} or not host or parsed.fragment:
        raise ValueError(
            f"{url.partition('?')[0]!r} is not of the form http://host/path or https://host/path"
        )


def _where(request: httpx.Request) -> str:
    return str(request.url.copy_with(query=None))


def _http_error(request: httpx.Request, error: httpx.TransportError) -> HttpError:
    where = _where(request)
    told: BaseException = error
    while not str(told) and (cause := told.__cause__ or told.__context__):
        told = cause  # httpx leaves some errors without words; those of TLS stand further down
    words = str(told) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return HttpError("connect", f"{where} cannot be reached: {words}")
    return HttpError("broken", f"{where} broke the connection: {words}")
