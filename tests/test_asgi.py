"""What our HTTP servers share: the listening socket, the clean end, bounded bodies, one form for all errors."""

from __future__ import annotations

import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import httpx
import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.service import asgi
from stationmaster.service.asgi import (
    ListenError,
    bind,
    error_handlers,
    json_response,
    open_server,
    read_body,
    serve_until_told,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response

LIMIT = 100_000
JSON = {"content-type": "application/json"}


@attrs.define(eq=False)
class Endpoints:
    """An app to be served: `/echo` reads a body, `/gate` waits for the gate, `/flood` answers more than fits."""

    gate: trio.Event = attrs.field(factory=trio.Event)
    entered: trio.Event = attrs.field(factory=trio.Event)
    left_alone: trio.Event = attrs.field(factory=trio.Event)
    cancelled: bool = False

    async def echo(self, request: Request) -> Response:
        self.entered.set()
        try:
            body = await read_body(request, limit_bytes=LIMIT)
        except ClientDisconnect:
            self.left_alone.set()
            raise
        return json_response({"length": len(body)})

    async def wait(self, _: Request) -> Response:
        self.entered.set()
        try:
            await self.gate.wait()
        except trio.Cancelled:
            self.cancelled = True
            raise
        return json_response("through")

    async def flood(self, _: Request) -> Response:
        self.entered.set()
        await trio.lowlevel.checkpoint()
        return json_response("x" * 50_000_000)

    async def bug(self, _: Request) -> Response:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("the password is swordfish")

    def app(self) -> Starlette:
        def render(error: HTTPException) -> Response:
            return json_response(
                {"said": error.detail}, status=error.status_code, headers=error.headers
            )

        return Starlette(
            routes=[
                Route("/echo", self.echo, methods=["POST"]),
                Route("/gate", self.wait),
                Route("/flood", self.flood),
                Route("/bug", self.bug),
            ],
            exception_handlers=error_handlers(render),
        )


@asynccontextmanager
async def open_client(endpoints: Endpoints | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the served app."""
    app = (endpoints or Endpoints()).app()
    async with open_server(app, await bind("127.0.0.1", 0)) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            yield client


def address(client: httpx.AsyncClient) -> tuple[str, int]:
    assert client.base_url.port is not None
    return client.base_url.host, client.base_url.port


# ----------------------------------------------------------------------------------------------------------- socket


async def test_a_taken_port_is_an_error_that_names_it() -> None:
    with await bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ListenError, match=rf"127\.0\.0\.1 port {port}: .*in use"):
            await bind("127.0.0.1", port)


async def test_a_name_that_is_none_is_an_error() -> None:
    with pytest.raises(ListenError, match="cannot listen on xxx"):
        await bind("x" * 70, 0)


async def test_the_address_of_ipv6_has_brackets() -> None:
    try:
        sock = await bind("::1", 0)
    except ListenError as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with open_server(Endpoints().app(), sock) as url, httpx.AsyncClient() as client:
        assert url.startswith("http://[::1]:")
        assert (await client.get(f"{url}/nowhere")).status_code == 404


# ------------------------------------------------------------------------------------------------------ a clean end


async def test_leaving_the_block_finishes_what_is_in_flight_and_closes_the_rest(
    mock_clock: MockClock,
) -> None:
    # The clock stands still: the grace cannot end, and no idle connection can time out.
    endpoints, answers = Endpoints(), []
    async with (
        httpx.AsyncClient() as idle,
        httpx.AsyncClient() as busy,
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            answers.append(await busy.get(f"{url}/gate"))

        async def open_gate_when_closed() -> None:
            while True:
                try:
                    stream = await trio.open_tcp_stream(*listening)
                except OSError:
                    break
                await stream.aclose()
            endpoints.gate.set()

        async with open_server(endpoints.app(), await bind("127.0.0.1", 0)) as url:
            listening = (httpx.URL(url).host, httpx.URL(url).port or 0)
            assert (await idle.get(f"{url}/nowhere")).status_code == 404
            nursery.start_soon(ask)
            await endpoints.entered.wait()
            nursery.start_soon(open_gate_when_closed)
    assert [answer.json() for answer in answers] == ["through"]
    assert not endpoints.cancelled


async def test_what_is_still_in_flight_at_the_end_of_the_grace_is_cancelled() -> None:
    endpoints = Endpoints()
    async with httpx.AsyncClient() as client, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(f"{url}/gate")

        sock = await bind("127.0.0.1", 0)
        async with open_server(endpoints.app(), sock, grace_s=0.01) as url:
            nursery.start_soon(ask)
            await endpoints.entered.wait()
    assert endpoints.cancelled


async def test_an_error_in_the_block_cancels_what_is_in_flight_and_leaves_as_itself(
    mock_clock: MockClock,
) -> None:
    endpoints = Endpoints()
    sock = await bind("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            async with httpx.AsyncClient() as client:
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.get(f"{url}/gate")

        with pytest.raises(ValueError, match="mine"):  # noqa: PT012 - the block is what is tested
            async with open_server(endpoints.app(), sock) as url:
                nursery.start_soon(ask)
                await endpoints.entered.wait()
                raise ValueError("mine")
    assert endpoints.cancelled
    assert sock.fileno() == -1


async def test_a_client_that_takes_nothing_cannot_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi, "_STALL_MS", 300)
    endpoints = Endpoints()
    async with open_server(endpoints.app(), await bind("127.0.0.1", 0), grace_s=0.01) as url:
        stream = await trio.open_tcp_stream(httpx.URL(url).host, httpx.URL(url).port or 0)
        await stream.send_all(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        await endpoints.entered.wait()
        await wait_all_tasks_blocked()  # the answer fills the kernel's buffers
    await stream.aclose()


async def test_the_process_says_one_line_and_ends_at_the_first_signal(
    capsys: pytest.CaptureFixture[str], nursery: trio.Nursery
) -> None:
    ended = trio.Event()

    async def serve() -> None:
        await serve_until_told(Endpoints().app(), host="127.0.0.1", port=0)
        ended.set()

    nursery.start_soon(serve)
    await wait_all_tasks_blocked()
    said, url = capsys.readouterr().out.rsplit(" ", 1)
    assert said == "listening on"
    assert url.endswith("\n")
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{url.strip()}/nowhere")).status_code == 404
    signal.raise_signal(signal.SIGTERM)
    await ended.wait()
    assert capsys.readouterr().out == ""


async def test_a_second_signal_ends_the_grace(
    capsys: pytest.CaptureFixture[str], nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    # The clock stands still: the grace would never end by itself.
    endpoints, ended = Endpoints(), trio.Event()

    async def serve() -> None:
        await serve_until_told(endpoints.app(), host="127.0.0.1", port=0)
        ended.set()

    async def ask() -> None:
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(f"{url}/gate")

    nursery.start_soon(serve)
    await wait_all_tasks_blocked()
    url = capsys.readouterr().out.split()[-1]
    nursery.start_soon(ask)
    await endpoints.entered.wait()
    signal.raise_signal(signal.SIGINT)
    await wait_all_tasks_blocked()
    assert not ended.is_set()
    assert not endpoints.cancelled
    signal.raise_signal(signal.SIGINT)
    await ended.wait()
    assert endpoints.cancelled


async def test_a_taken_address_is_said_before_anything_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with await bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ListenError):
            await serve_until_told(Endpoints().app(), host="127.0.0.1", port=taken.getsockname()[1])
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------- bodies


async def test_a_body_of_the_longest_allowed_length_is_read() -> None:
    async with open_client() as client:
        answer = await client.post("/echo", content=b"x" * LIMIT, headers=JSON)
    assert (answer.status_code, answer.json()) == (200, {"length": LIMIT})


@pytest.mark.parametrize("size", [LIMIT + 1, 20_000_000])
@pytest.mark.parametrize("declared", [True, False])
async def test_a_longer_body_is_refused_and_its_client_hears_so(size: int, declared: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, size, 1_000_000):
            yield b"x" * min(1_000_000, size - start)

    async with open_client() as client:
        content: Any = b"x" * size if declared else pieces()
        answer = await client.post("/echo", content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json() == {"said": "the body is longer than 100000 bytes"}
        assert (await client.post("/echo", content=b"x", headers=JSON)).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_another_content_type_is_refused(content_type: str) -> None:
    async with open_client() as client:
        answer = await client.post("/echo", content=b"{}", headers={"content-type": content_type})
    assert answer.status_code == 415
    assert answer.json() == {"said": "expected Content-Type: application/json"}


async def test_a_content_type_may_carry_a_charset_and_capitals() -> None:
    async with open_client() as client:
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await client.post("/echo", content=b"{}", headers=headers)).status_code == 200


async def test_a_body_that_does_not_arrive_in_time_is_given_up(mock_clock: MockClock) -> None:
    endpoints = Endpoints()
    async with open_client(endpoints) as client:
        stream = await trio.open_tcp_stream(*address(client))
        async with stream:
            head = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            await stream.send_all(head + b"content-length: 5\r\n\r\nab")
            await endpoints.entered.wait()
            await wait_all_tasks_blocked()
            mock_clock.jump(30)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    endpoints = Endpoints()
    async with open_client(endpoints) as client:
        stream = await trio.open_tcp_stream(*address(client))
        await stream.send_all(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nab")
        await endpoints.entered.wait()
        await stream.aclose()
        await endpoints.left_alone.wait()
        assert (await client.post("/echo", content=b"x", headers=JSON)).status_code == 200
    assert caplog.records == []


async def test_headers_are_bounded() -> None:
    async with open_client() as client:
        stream = await trio.open_tcp_stream(*address(client))
        async with stream:
            await stream.send_all(b"GET /gate HTTP/1.1\r\nx-long: " + b"x" * 17_000)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 431 ")


# ----------------------------------------------------------------------------------------------------------- errors


async def test_errors_of_the_router_have_the_apps_form_and_keep_their_headers() -> None:
    async with open_client() as client:
        missing = await client.get("/nowhere")
        wrong = await client.get("/echo")
    assert (missing.status_code, missing.json()) == (404, {"said": "Not Found"})
    assert (wrong.status_code, wrong.json()) == (405, {"said": "Method Not Allowed"})
    assert wrong.headers["allow"] == "POST"


async def test_a_bug_is_told_by_its_class_only_and_stands_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_client() as client:
        answer = await client.get("/bug")
        assert (answer.status_code, answer.json()) == (
            500,
            {"said": "a bug in this server: RuntimeError"},
        )
        assert (await client.post("/echo", content=b"x", headers=JSON)).status_code == 200
    assert "swordfish" in caplog.text
