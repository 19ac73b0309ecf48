from __future__ import annotations

import itertools
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from stationmaster.http import HttpError, open_http_client
from stationmaster.http_words import (
    ERROR_BODY_BYTES,
    MAX_RETRY_AFTER_S,
    bearer,
    error_text,
    parse_retry_after,
)
from stationmaster.testing.server import HANG, RESET, Reply, ScriptedServer, open_server

from .http_server import closed_port, passing_time, tls_contexts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock

    from stationmaster.http import HttpAnswer, HttpClient


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    with trio.fail_after(60):  # a guard
        async with open_server() as scripted:
            yield scripted


# --------------------------------------------------------------------------------------------------- plain requests


async def test_a_post_carries_body_and_headers_and_brings_the_answer(
    server: ScriptedServer,
) -> None:
    server.script.append(Reply(status=201, headers={"X-Word": "yes"}, body=b"made"))
    async with open_http_client(server.url + "/v1", headers={"X-Client": "a"}) as client:
        answer = await client.request("POST", "/things", content=b"body", headers={"X-Call": "b"})
    assert (answer.status, answer.headers["x-word"], answer.body) == (201, "yes", b"made")
    [seen] = server.seen
    assert (seen.method, seen.target, seen.body) == ("POST", "/v1/things", b"body")
    assert (seen.headers["x-client"], seen.headers["x-call"]) == ("a", "b")
    assert seen.headers["user-agent"].startswith("stationmaster/")
    assert seen.headers["accept-encoding"] == "identity"


async def test_a_get_has_no_body(server: ScriptedServer) -> None:
    server.script.append(Reply(body=b"{}"))
    async with open_http_client(server.url) as client:
        answer = await client.request("GET", "/info", max_answer_bytes=2)
    assert answer.body == b"{}"
    assert (server.seen[0].method, server.seen[0].target) == ("GET", "/info")
    assert "content-length" not in server.seen[0].headers


async def test_one_connection_serves_requests_one_after_the_other(server: ScriptedServer) -> None:
    async with open_http_client(server.url, connections=3) as client:
        for _ in range(3):
            await client.request("POST", content=b"")
        assert server.connections == [0, 0, 0]
        assert server.open_connections.value == 1
    await server.open_connections.wait_value(0)


async def test_requests_at_once_have_a_connection_each_and_the_rest_wait(
    server: ScriptedServer,
) -> None:
    server.answer = lambda _: HANG
    async with (
        open_http_client(server.url, connections=2) as client,
        trio.open_nursery() as nursery,
    ):
        for number in range(5):
            nursery.start_soon(_post, client, b"%d" % number)
        await server.requests.wait_value(2)
        await wait_all_tasks_blocked(0.01)
        assert sorted(server.connections) == [0, 1]
        nursery.cancel_scope.cancel()


async def _post(client: HttpClient, content: bytes) -> None:
    await client.request("POST", content=content)


async def test_cookies_are_not_kept(server: ScriptedServer) -> None:
    server.script.append(Reply(headers={"Set-Cookie": "a=b"}))
    async with open_http_client(server.url) as client:
        await client.request("POST", content=b"")
        await client.request("POST", content=b"")
    assert "cookie" not in server.seen[1].headers


async def test_a_redirect_is_an_answer_and_not_followed(server: ScriptedServer) -> None:
    server.script.append(Reply(status=307, headers={"Location": server.url + "/other"}))
    async with open_http_client(server.url) as client:
        answer = await client.request("POST", content=b"", max_answer_bytes=100)
    assert (answer.status, len(server.seen)) == (307, 1)


# ----------------------------------------------------------------------------------------------------- bounded bodies


@pytest.mark.parametrize("length", ["told", "chunked"])
async def test_a_success_longer_than_allowed_is_an_error_and_read_no_further(
    server: ScriptedServer, length: str
) -> None:
    body = b"x" * 10_000_000
    headers = {}
    if length == "chunked":
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        headers = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    server.script.append(Reply(headers=headers, body=body))
    async with open_http_client(server.url) as client:
        with pytest.raises(HttpError, match="more than 1000 bytes") as caught:
            await client.request("POST", content=b"", max_answer_bytes=1000)
        assert caught.value.kind == "too-long"
        await server.open_connections.wait_value(0)
        assert (await client.request("POST", content=b"", max_answer_bytes=1000)).status == 200


async def test_a_success_that_is_too_long_but_already_here_is_an_error_too(
    server: ScriptedServer,
) -> None:
    server.script.append(Reply(body=b"x" * 1001))
    async with open_http_client(server.url) as client:
        with pytest.raises(HttpError, match="more than 1000 bytes"):
            await client.request("POST", content=b"", max_answer_bytes=1000)


async def test_a_success_of_just_the_allowed_length_is_fine(server: ScriptedServer) -> None:
    server.script.append(Reply(body=b"x" * 1000))
    async with open_http_client(server.url) as client:
        assert len((await client.request("POST", content=b"", max_answer_bytes=1000)).body) == 1000


@pytest.mark.parametrize(
    ("status", "max_answer_bytes"), [(422, 100_000_000), (422, None), (200, None), (500, 10)]
)
async def test_a_body_that_decides_nothing_is_read_to_its_first_16_kib(
    server: ScriptedServer, status: int, max_answer_bytes: int | None
) -> None:
    server.script.append(Reply(status=status, body=b"x" * 10_000_000))
    async with open_http_client(server.url) as client:
        answer = await client.request("POST", content=b"", max_answer_bytes=max_answer_bytes)
        assert (answer.status, len(answer.body)) == (status, ERROR_BODY_BYTES)
        await server.open_connections.wait_value(0)
        await client.request("POST", content=b"")


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_status_stands_although_its_body_breaks(server: ScriptedServer, end: str) -> None:
    half = b"HTTP/1.1 400 Bad\r\nContent-Length: 1000\r\n\r\nbecause"
    server.script.append(Reply(raw=half, end=end))  # type: ignore[arg-type]
    async with open_http_client(server.url) as client:
        answer = await client.request("POST", content=b"", max_answer_bytes=1000)
        assert (answer.status, answer.body) in [(400, b"because"), (400, b"")]
        await client.request("POST", content=b"")
    assert server.connections == [0, 1]


async def test_a_status_stands_although_its_body_hangs(
    mock_clock: MockClock, server: ScriptedServer
) -> None:
    server.script.append(Reply(raw=b"HTTP/1.1 202 OK\r\nContent-Length: 9\r\n\r\nhalf", end="hang"))
    async with open_http_client(server.url) as client, passing_time(server, mock_clock):
        answer = await client.request("POST", content=b"")
    assert (answer.status, answer.body) == (202, b"half")


async def test_a_compressed_answer_nobody_asked_for_is_refused(server: ScriptedServer) -> None:
    server.script.extend(
        [
            Reply(status=status, headers={"Content-Encoding": "gzip"}, body=b"\x1f")
            for status in (200, 400)
        ]
    )
    async with open_http_client(server.url) as client:
        with pytest.raises(HttpError) as caught:
            await client.request("POST", content=b"", max_answer_bytes=100)
        assert caught.value.kind == "encoding"
        answer = await client.request("POST", content=b"", max_answer_bytes=100)
        assert (answer.status, answer.body) == (400, b"")


# ------------------------------------------------------------------------------------------------------------ trouble


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        pytest.param(HANG, "timeout", "did not answer in time", id="hangs"),
        pytest.param(
            Reply(first=60, end="hang"), "timeout", "did not end its answer", id="hangs in the body"
        ),
        pytest.param(Reply(pause_s=1.0), "timeout", "in time", id="drips, each byte in time"),
        pytest.param(RESET, "broken", "broke the connection", id="resets"),
        pytest.param(Reply(first=0, end="close"), "broken", "disconnected", id="hangs up"),
        pytest.param(
            Reply(first=20, end="close"), "broken", "disconnected", id="hangs up in the headers"
        ),
        pytest.param(
            Reply(first=60, end="close"), "broken", "closed connection", id="hangs up in the body"
        ),
        pytest.param(
            Reply(first=60, end="reset"), "broken", "broke the connection", id="resets in the body"
        ),
        pytest.param(Reply(raw=b"SSH-2.0-x\r\n\r\n"), "broken", "illegal", id="is no HTTP server"),
    ],
)
async def test_trouble_is_an_error_of_its_kind_and_leaves_a_clean_slot(
    mock_clock: MockClock, server: ScriptedServer, reply: Reply, kind: str, words: str
) -> None:
    server.script.append(attrs.evolve(reply, body=b"x" * 40))
    async with open_http_client(server.url, connections=1, timeout_s=5.0) as client:
        async with passing_time(server, mock_clock):
            with pytest.raises(HttpError, match=words) as caught:
                await client.request("POST", "/path?secret=1", content=b"", max_answer_bytes=1000)
        assert caught.value.kind == kind
        assert "secret" not in str(caught.value)
        assert (await client.request("POST", content=b"", max_answer_bytes=1000)).status == 200
    assert server.connections == [0, 1]


async def test_a_closed_port_is_told_as_such() -> None:
    async with open_http_client(f"http://127.0.0.1:{closed_port()}") as client:
        with pytest.raises(HttpError, match=r"cannot be reached: .*failed") as caught:
            await client.request("POST", content=b"")
    assert caught.value.kind == "connect"


async def test_a_server_that_never_finishes_the_handshake_is_given_up(
    server: ScriptedServer,
) -> None:
    url = server.url.replace("http:", "https:")
    server.answer = lambda _: HANG
    async with open_http_client(url, connect_timeout_s=0.1) as client:
        with pytest.raises(HttpError) as caught:
            await client.request("POST", content=b"")
    assert caught.value.kind == "connect"


async def test_a_reset_on_a_kept_connection_is_tried_once_more_on_a_new_one(
    server: ScriptedServer,
) -> None:
    server.script.extend([Reply(end="ambush")])
    async with open_http_client(server.url) as client:
        await client.request("POST", content=b"first")
        assert (await client.request("POST", content=b"second")).status == 200
    assert [seen.body for seen in server.seen] == [b"first", b"second"]
    assert server.connections == [0, 1]


async def test_it_is_tried_only_once_more(server: ScriptedServer) -> None:
    server.script.extend([Reply(), RESET, RESET])
    async with open_http_client(server.url) as client:
        await client.request("POST", content=b"")
        with pytest.raises(HttpError) as caught:
            await client.request("POST", content=b"")
        assert caught.value.kind == "broken"
    assert server.connections == [0, 0, 1]


@pytest.mark.parametrize("trouble", [RESET, Reply(body=b"x" * 40, first=60, end="reset")])
async def test_a_reset_on_a_new_connection_is_not_tried_again(
    server: ScriptedServer, trouble: Reply
) -> None:
    server.script.extend([trouble, trouble])
    async with open_http_client(server.url, connections=1) as client:
        for _ in range(2):
            with pytest.raises(HttpError):
                await client.request("POST", content=b"", max_answer_bytes=100)
    assert server.connections == [0, 1]


async def test_a_connection_closed_between_requests_is_noticed_before_sending(
    server: ScriptedServer,
) -> None:
    server.script.append(Reply(end="close"))
    async with open_http_client(server.url) as client:
        await client.request("POST", content=b"")
        await server.open_connections.wait_value(0)
        await client.request("POST", content=b"")
    assert server.connections == [0, 1]


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_the_connection_is_dropped_after_a_server_error(
    server: ScriptedServer, status: int
) -> None:
    server.script.append(Reply(status=status, end="ambush"))
    async with open_http_client(server.url) as client:
        assert (await client.request("POST", content=b"")).status == status
        assert (await client.request("POST", content=b"")).status == 200
    assert server.connections == [0, 1]


async def test_the_connection_is_kept_after_a_client_error(server: ScriptedServer) -> None:
    server.script.append(Reply(status=422, body=b"no"))
    async with open_http_client(server.url) as client:
        await client.request("POST", content=b"")
        await client.request("POST", content=b"")
    assert server.connections == [0, 0]


# ------------------------------------------------------------------------------------------------------- cancellation


async def test_a_cancelled_request_closes_its_connection_and_frees_its_slot(
    server: ScriptedServer,
) -> None:
    server.script.append(HANG)
    async with open_http_client(server.url, connections=1) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_post, client, b"given up")
            await server.requests.wait_value(1)
            nursery.cancel_scope.cancel()
        await server.open_connections.wait_value(0)
        assert (await client.request("POST", content=b"")).status == 200


async def test_a_callers_own_deadline_is_not_turned_into_an_error(server: ScriptedServer) -> None:
    server.script.append(HANG)
    async with open_http_client(server.url) as client:
        with trio.move_on_after(0.05) as scope:
            await client.request("POST", content=b"")
        assert scope.cancelled_caught


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope just before the n-th step that any task makes."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self.scope, self.left = scope, step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # type: ignore[explicit-override]
        self.left -= 1
        if self.left == 0:
            self.scope.cancel()


@pytest.mark.parametrize(
    "warm", [False, True], ids=["while connecting too", "on a kept connection"]
)
async def test_a_request_may_be_cancelled_at_any_step_of_the_scheduler(
    server: ScriptedServer, warm: bool
) -> None:
    given_up = 0
    for step in itertools.count(1):
        async with open_http_client(server.url, connections=1, timeout_s=5) as client:
            if warm:
                await client.request("POST", content=b"warm")
            with trio.CancelScope() as scope:
                instrument = CancelAtStep(scope, step)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await client.request("POST", content=b"x" * 100, max_answer_bytes=100)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            given_up += scope.cancelled_caught
            answer = await client.request("POST", content=b"", max_answer_bytes=100)
            assert answer.body == b"{}", f"cancelled at step {step}"
            if not scope.cancel_called:
                break
        await server.open_connections.wait_value(0)
    assert given_up > 5


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_slot_is_lost_when_requests_are_cancelled_under_contention(
    server: ScriptedServer, seed: int
) -> None:
    chance = random.Random(seed)
    replies = [Reply(body=b"{}")] * 6 + [
        Reply(end="close"),
        Reply(body=b"x" * 100, pause_s=0),
        RESET,
        HANG,
    ]
    server.answer = lambda _: chance.choice(replies)
    outcomes = Counter[str]()

    async def cancel(scope: trio.CancelScope) -> None:
        # Counted in turns of the loop, not in time: a busy machine makes no difference.
        for _ in range(chance.randrange(400)):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def hurry(client: HttpClient) -> None:
        for _ in range(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel, nursery.cancel_scope)
                outcome = "cancelled"
                try:
                    await client.request("POST", content=b"x" * 5000, max_answer_bytes=10_000)
                    outcome = "answered"
                except HttpError:
                    outcome = "broken"
                nursery.cancel_scope.cancel()
            outcomes[outcome] += 1

    async with open_http_client(server.url, connections=4) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(hurry, client)
        assert set(outcomes) == {"answered", "broken", "cancelled"}
        await server.open_connections.wait_value(lambda count: count <= 4)
        server.seen.clear()
        await _ask_on_every_connection(server, client, 4)


async def _ask_on_every_connection(
    server: ScriptedServer, client: HttpClient, connections: int
) -> None:
    """Hold all connections at once, then let each one answer."""
    server.answer = lambda _: HANG
    before = server.requests.value
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(_post, client, b"")
        await server.requests.wait_value(before + connections)
        nursery.cancel_scope.cancel()
    assert len(set(server.connections)) == connections
    server.answer = lambda _: Reply(body=b"{}")
    async with trio.open_nursery() as nursery:
        for _ in range(3 * connections):
            nursery.start_soon(_post, client, b"")


async def test_closing_refuses_those_who_wait_and_lets_those_under_way_end(
    server: ScriptedServer,
) -> None:
    server.script.append(Reply(body=b"end", pause_s=0.005))
    answers: list[HttpAnswer] = []

    async def hold(client: HttpClient) -> None:
        answers.append(await client.request("POST", content=b"", max_answer_bytes=3))

    async def wait(client: HttpClient) -> None:
        with pytest.raises(trio.ClosedResourceError, match="is closed"):
            await client.request("POST", content=b"")

    async with trio.open_nursery() as nursery:
        async with open_http_client(server.url, connections=1) as client:
            nursery.start_soon(hold, client)
            await server.requests.wait_value(1)
            nursery.start_soon(wait, client)
            await wait_all_tasks_blocked()
    assert [answer.body for answer in answers] == [b"end"]
    await server.open_connections.wait_value(0)
    await wait(client)


# ---------------------------------------------------------------------------------------------------------------- TLS


async def test_a_trusted_certificate_is_accepted_and_the_connection_kept(tmp_path: Path) -> None:
    serving, trusting = tls_contexts(tmp_path)
    with trio.fail_after(10):
        async with open_server(ssl_context=serving) as server:
            async with open_http_client(server.url, ssl_context=trusting) as client:
                await client.request("POST", content=b"1")
                await client.request("POST", content=b"2")
            assert server.connections == [0, 0]


async def test_an_unknown_certificate_is_refused(tmp_path: Path) -> None:
    serving, _ = tls_contexts(tmp_path)
    with trio.fail_after(10):
        async with (
            open_server(ssl_context=serving) as server,
            open_http_client(server.url) as client,
        ):
            with pytest.raises(HttpError, match=r"cannot be reached: .*certificate") as caught:
                await client.request("POST", content=b"1")
            assert caught.value.kind == "connect"
            assert server.seen == []


# --------------------------------------------------------------------------------------------------- arguments, texts


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:80",
        "ftp://host/",
        "http://",
        "http:///path",
        "http://host/#part",
        "http://[::1",
        "http://h:x/",
    ],
)
async def test_a_url_that_cannot_work_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|form"):
        async with open_http_client(url):
            pass


@pytest.mark.parametrize("url", ["http://me:hunter2@host/", "http://me:hunter2/slash@host/"])
async def test_a_url_with_a_password_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"a user or a password|not a URL") as caught:
        async with open_http_client(url):
            pass
    assert "hunter2" not in str(caught.value)


async def test_a_client_needs_a_connection() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        async with open_http_client("http://host", connections=0):
            pass


async def test_the_clients_headers_are_not_shown() -> None:
    async with open_http_client("http://host", headers=bearer("hunter2")) as client:
        assert "hunter2" not in repr(client)


@pytest.mark.parametrize("secret", ["", "hunter 2", "hunter2\n", "schlüssel"])
def test_a_secret_that_no_header_can_hold_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII") as caught:
        bearer(secret)
    assert not secret or secret not in str(caught.value)


NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("17", 17.0),
        (" 2.5 ", 2.5),
        ("9" * 5000, MAX_RETRY_AFTER_S),
        ("-5", None),
        ("1e3", None),
        ("nan", None),
        ("inf", None),
        ("٣", None),
        ("soon", None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0.0),
        ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0),
        ("Sun, 01 Mar 2126 12:00:30 GMT", MAX_RETRY_AFTER_S),
        ("Sun, 01 Mar 99999999999 12:00:30 GMT", None),
        ("Sun, 01 Mar 2026 12:00:30 +999999999999", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(
    value: str | None, seconds: float | None
) -> None:
    assert parse_retry_after(value, now=NOW.timestamp()) == seconds


@settings(deadline=None)
@given(
    st.text()
    | st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,9} Mar [0-9]{1,9} [0-9:]{1,9} [-+A-Z0-9]{1,9}")
)
def test_any_retry_after_is_a_bounded_number_or_nothing(value: str) -> None:
    seconds = parse_retry_after(value, now=NOW.timestamp())
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "too long", "type": null, "code": 400}}', "too long"),
        (b'{"error": "no such model"}', "no such model"),
        (b'{"error": {"code": 7}}', '{"code":7}'),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["body"], "msg": "bad"}]}', '[{"loc":["body"],"msg":"bad"}]'),
        (b'{"message": "overloaded", "type": "x"}', "overloaded"),
        (b'{"object": "error"}', '{"object":"error"}'),
        (b"<html>\n<b>502</b>", r"<html>\n<b>502</b>"),
        (b"Internal Server Error\n", "Internal Server Error"),
        (b"\x1b[31mred\x00\xff", r"\x1b[31mred\x00\xff"),
        ("größer".encode(), "größer"),
        (b'{"detail": "cut of', '{"detail": "cut of'),
        (b"", ""),
    ],
)
def test_the_words_of_an_error_are_found(body: bytes, text: str) -> None:
    assert error_text(body) == text


@settings(deadline=None)
@given(st.binary(max_size=2000) | st.text().map(str.encode))
def test_any_error_body_gives_a_short_printable_line(body: bytes) -> None:
    text = error_text(body)
    assert len(text) <= 300
    assert not text or text.isprintable()
