"""Model servers at their worst: what they answer, when, and what they are made to leak. Over real sockets."""

from __future__ import annotations

import base64
import math
import socket
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import trio

from stationmaster.batcher import open_batcher
from stationmaster.embeddings import (
    Endpoints,
    TeiBudget,
    open_endpoints,
    open_openai_embedder,
    open_tei_embedder,
)
from stationmaster.embeddings import tei as tei_module
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.events import EndpointPaused
from stationmaster.service.log_lines import line_of
from stationmaster.testing import RecordingObserver, ScriptedEmbedder
from stationmaster.testing.server import HANG, RESET, Reply, Request, ScriptedServer, open_server
from tests.http_server import passing_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from stationmaster.events import Event

KEY = "s3same-0pen-" * 8


def vectors(seen: Request) -> Reply:
    """Answer like a sound server of either kind."""
    if seen.target.endswith("/info"):
        return Reply(body=b"{}")
    form = orjson.loads(seen.body)
    if seen.target.endswith("/embed"):
        return Reply(body=orjson.dumps([[float(len(text)), 1.0] for text in form["inputs"]]))
    rows = [
        {"index": row, "embedding": [float(len(text)), 1.0]}
        for row, text in enumerate(form["input"])
    ]
    return Reply(body=orjson.dumps({"data": rows, "model": "m"}))


def rows_of(*embeddings: Any) -> Reply:
    rows = [{"index": row, "embedding": one} for row, one in enumerate(embeddings)]
    return Reply(body=orjson.dumps({"data": rows}))


@asynccontextmanager
async def two_servers() -> AsyncIterator[tuple[ScriptedServer, ScriptedServer]]:
    with trio.fail_after(20):
        async with open_server(vectors) as first, open_server(vectors) as second:
            yield first, second


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    with trio.fail_after(20):
        async with open_server(vectors) as scripted:
            yield scripted


# ------------------------------------------------------------------------------------------------- answers, one by one


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        pytest.param(
            Reply(body=b'{"data": [', headers={"Content-Length": "10"}),
            ProtocolError,
            "not JSON",
            id="JSON that ends too early",
        ),
        pytest.param(
            Reply(body=b'{"data": [', headers={"Content-Length": "99"}, end="close"),
            EmbedderUnavailableError,
            "broke the connection",
            id="less than it announced",
        ),
        pytest.param(
            Reply(
                body=b"ffff\r\n{}", headers={"Content-Length": "", "Transfer-Encoding": "chunked"}
            ),
            EmbedderUnavailableError,
            "in time",
            id="a chunk without its end",
        ),
        pytest.param(rows_of("AAAA"), ProtocolError, "3 bytes", id="base64 of a wrong length"),
        pytest.param(
            rows_of(base64.b64encode(b"\x00\x00\x80\x7f" * 2).decode()),
            ProtocolError,
            "not finite",
            id="base64 of infinity",
        ),
        pytest.param(
            Reply(body=b'{"data": [{"index": 0, "embedding": [1e999]}]}'),
            ProtocolError,
            "JSON",
            id="a number beyond all numbers",
        ),
        pytest.param(
            Reply(body=b'{"data": [{"index": -1, "embedding": [1]}]}'),
            ProtocolError,
            "indexes are not 0 to 0",
            id="a negative index",
        ),
        pytest.param(
            Reply(body=b'{"data": ' + b"[" * 100_000),
            ProtocolError,
            "not JSON",
            id="nesting without end",
        ),
        pytest.param(
            Reply(status=400, body=b'{"detail": ' + b"[" * 500 + b"]" * 500 + b"}"),
            RowRejectedError,
            r"400: \{\"detail\": \[\[",
            id="a deeply nested refusal",
        ),
        pytest.param(
            Reply(status=500, body=b"\xff\xfe\x00\x1b[31m\xe2\x80\xae"),
            EmbedderUnavailableError,
            r"500: \\xff\\xfe\\x00\\x1b\[31m\\u202e$",
            id="bytes that steer a terminal",
        ),
        pytest.param(
            Reply(raw=b"HTTP/1.1 200\r\n" + b"X: y\r\n" * 50_000),
            EmbedderUnavailableError,
            "broke the connection",
            id="headers without end",
        ),
        pytest.param(
            Reply(raw=b"SSH-2.0-OpenSSH_9.6\r\n", end="close"),
            EmbedderUnavailableError,
            "broke the connection",
            id="another protocol",
        ),
        pytest.param(
            Reply(status=200, first=40, body=b"x" * 99, end="hang"),
            EmbedderUnavailableError,
            "in time",
            id="headers and then nothing",
        ),
    ],
)
async def test_the_call_fails_with_a_typed_error_and_the_next_one_works(
    mock_clock: MockClock,
    server: ScriptedServer,
    reply: Reply,
    error: type[EmbedderError],
    words: str,
) -> None:
    server.script.append(reply)
    async with open_openai_embedder(
        server.url, model="m", connections=1, timeout_s=5.0
    ) as embedder:
        async with passing_time(server, mock_clock):
            with pytest.raises(error, match=words) as caught:
                await embedder.embed(["a"])
        assert len(str(caught.value)) < 1000
        assert list((await embedder.embed(["abc"]))[0]) == [3.0, 1.0]


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("-5", None),
        ("1e9", None),
        ("nan", None),
        ("9" * 4000, 3600.0),
        ("2.5", 2.5),
        ("5, 5", None),
    ],
)
async def test_a_time_to_wait_is_taken_if_it_is_one_and_bounded(
    server: ScriptedServer, value: str, wait_s: float | None
) -> None:
    server.script.append(Reply(status=429, headers={"Retry-After": value}))
    async with open_openai_embedder(server.url, model="m") as embedder:
        with pytest.raises(EmbedderBusyError) as caught:
            await embedder.embed(["a"])
    assert caught.value.retry_after_s == wait_s


async def test_a_connection_whose_server_keeps_resetting_costs_one_more_attempt_and_no_more(
    server: ScriptedServer,
) -> None:
    async with open_openai_embedder(server.url, model="m", connections=1) as embedder:
        await embedder.embed(["a"])
        server.script.extend([RESET] * 5)
        with pytest.raises(EmbedderUnavailableError):
            await embedder.embed(["a"])
    assert server.connections == [0, 0, 1]


# --------------------------------------------------------------------------------------------------------- what leaks


@pytest.mark.parametrize("lead", range(240, 300, 7))
@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("api", ["openai", "tei", "info"])
async def test_no_part_of_the_key_is_shown_wherever_its_echo_is_cut(
    server: ScriptedServer, lead: int, status: int, api: str
) -> None:
    echo = {"pad": "x" * lead, "headers": {"authorization": KEY}}
    body = orjson.dumps(echo if api == "tei" else [echo])  # what each of them can do nothing with
    server.script.append(Reply(status=status, body=body))
    async with AsyncExitStack() as stack:
        tei = await stack.enter_async_context(open_tei_embedder(server.url, key=KEY))
        tei.budget = TeiBudget()
        openai = await stack.enter_async_context(
            open_openai_embedder(server.url, model="m", key=KEY)
        )
        asks = {"openai": partial(openai.embed, ["a"]), "tei": partial(tei.embed, ["a"])}
        with pytest.raises(EmbedderError) as caught:
            await asks.get(api, tei.learn)()
    assert KEY[:6] not in str(caught.value)


@pytest.mark.parametrize("url", ["http://user:pass@host/v1", "https://tok3n@host"])
@pytest.mark.parametrize("opens", [open_openai_embedder, open_endpoints])
async def test_a_url_with_a_secret_is_refused_without_showing_it(url: str, opens: Any) -> None:
    with pytest.raises(ValueError, match="user or a password") as caught:
        async with opens([url] if opens is open_endpoints else url, model="m"):
            pass
    assert "pass@" not in str(caught.value)
    assert "tok3n" not in str(caught.value)


async def test_neither_key_nor_terminal_codes_reach_statistics_events_and_log_lines() -> None:
    observer = RecordingObserver()
    async with two_servers() as (first, second):
        for each in (first, second):
            each.script.extend(
                Reply(status=status, body=f"no {KEY} \x1b[31m".encode())
                for status in (500, 429, 401)
            )
        async with open_endpoints(
            [first.url, second.url], model="m", key=KEY, observer=observer, breaker_failures=1
        ) as endpoints:
            for _ in range(2):
                with pytest.raises(EmbedderError):
                    await endpoints.embed(["a"])
            told = f"{endpoints.statistics()}{endpoints!r}"
    events: list[Event] = list(observer.events)
    assert events
    told += "".join(str(line_of(event).fields) for event in events)
    assert KEY not in told
    assert "\x1b" not in told


# ---------------------------------------------------------------------------------------------------- opening, names


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"http://{'a' * 64}.example/v1", "not a URL"),
        ("http://a..b/v1", "not a URL"),
        ("http://xn--/v1", "not a URL"),
        ("http://", "not of the form"),
    ],
)
async def test_a_host_that_can_never_be_looked_up_is_refused_at_opening(
    url: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        async with open_openai_embedder(url, model="m"):
            pass


async def test_a_host_name_with_umlauts_is_a_name_like_any() -> None:
    with trio.fail_after(20):
        async with open_openai_embedder("http://größe.invalid/v1", model="m") as embedder:
            with pytest.raises(EmbedderUnavailableError, match=r"xn--gre-6ka8i.invalid"):
                await embedder.embed(["a"])


@pytest.mark.parametrize(
    ("urls", "options", "error", "words"),
    [
        ("http://host", {}, TypeError, "a sequence of URLs"),
        (["http://a/v1", "http://a/v1/"], {}, ValueError, "different"),
        (["http://a"], {"api": "cohere"}, ValueError, "api must be openai or tei, not 'cohere'"),
        (["http://a"], {"timeout_s": math.nan}, ValueError, "timeout_s must be a positive"),
        (["http://a"], {"timeout_s": 0.0}, ValueError, "timeout_s must be a positive"),
        (["http://a"], {"key": "line\n"}, ValueError, "a newline in its file"),
    ],
)
async def test_arguments_that_cannot_work_are_refused_at_opening(
    urls: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        async with open_endpoints(urls, model="m", **options):
            pass


# ------------------------------------------------------------------------------------------------- several, in trouble


@pytest.mark.parametrize("api", ["openai", "tei"])
async def test_a_server_whose_first_answer_had_a_wrong_size_is_heard_again_once_it_is_mended(
    api: Any,
) -> None:
    async with (
        two_servers() as (first, second),
        open_endpoints([first.url, second.url], model="m", api=api) as endpoints,
    ):
        await endpoints.embed(["a"])  # by the first: two numbers, from now on
        wrong = rows_of([1.0, 2.0, 3.0]) if api == "openai" else Reply(body=b"[[1, 2, 3]]")
        second.script.append(wrong)
        await endpoints.embed(["a"])  # by the second in vain, then by the first
        await endpoints.embed(["a"])  # by the second, which has proved nothing yet
        looks = endpoints.statistics()
        assert [(look.calls, look.failures) for look in looks] == [(2, 0), (2, 1)]


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_refusal_by_every_one_of_three_names_each_and_what_to_check(status: int) -> None:
    async with two_servers() as (first, second), open_server(vectors) as third:
        servers = (first, second, third)
        for each in servers:
            each.answer = lambda _: Reply(status=status, body=b"no such thing")
        async with open_endpoints([each.url for each in servers], model="m7") as endpoints:
            with pytest.raises(EmbedderRefusedError, match="the key and the model 'm7'"):
                await endpoints.embed(["a"])
            with pytest.raises(EmbedderRefusedError, match="the key and the model 'm7'") as caught:
                await endpoints.embed(["a"])  # asks nobody
        assert all(each.url in str(caught.value) for each in servers)
        assert [len(each.seen) for each in servers] == [1, 1, 1]


async def test_a_busy_server_that_asks_for_no_wait_at_all_is_asked_ever_more_seldom(
    autojump_clock: MockClock,
) -> None:
    """A clock that is late makes every date in `Retry-After` one of the past."""
    model = ScriptedEmbedder(script=[EmbedderBusyError("429", retry_after_s=0.0)] * 1000)
    observer = RecordingObserver()
    async with open_batcher(Endpoints({"A": model}, observer=observer)) as batcher:
        with trio.move_on_after(20), suppress(EmbedderBusyError):
            await batcher.embed("a")
    assert 4 <= len(model.calls) <= 14
    assert all(event.pause_s > 0.04 for event in observer.of(EndpointPaused))


async def test_a_call_that_is_cancelled_while_it_connects_leaves_the_endpoint_usable() -> None:
    with trio.fail_after(20), socket.socket() as listener, socket.socket() as filler:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filler.connect(listener.getsockname())  # the backlog is full: the next one to connect waits
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with open_endpoints([url], model="m", max_in_flight=1) as endpoints:
            for _ in range(5):
                with trio.move_on_after(0.02) as scope:
                    await endpoints.embed(["a"])
                assert scope.cancelled_caught
            [look] = endpoints.statistics()
    assert (look.in_flight, look.calls, look.failures) == (0, 5, 0)


# ------------------------------------------------------------------------------------------------- limits that are lies


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_server_that_rejects_the_question_for_limits_rejects_no_text(
    server: ScriptedServer, status: int
) -> None:
    server.script.append(Reply(status=status, body=b"GET? never"))
    async with open_tei_embedder(server.url) as embedder:
        assert len(await embedder.embed(["a", "b"])) == 2
        assert embedder.budget == TeiBudget()
        server.script.append(Reply(status=status, body=b"GET? never"))
        with pytest.raises(ProtocolError, match=f"no limits to be had.*{status}: GET"):
            await embedder.learn()


async def test_a_server_that_never_tells_its_limits_is_used_without_them(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tei_module, "LEARN_S", 0.1)
    server.script.append(HANG)
    async with open_tei_embedder(server.url) as embedder:
        for _ in range(2):
            assert len(await embedder.embed(["a", "b"])) == 2
    assert [seen.target for seen in server.seen] == ["/info", "/embed", "/embed"]


async def test_a_server_that_hangs_altogether_at_first_is_asked_for_its_limits_again(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tei_module, "LEARN_S", 0.05)
    server.script.extend([HANG, RESET])
    async with open_tei_embedder(server.url) as embedder:
        with pytest.raises(EmbedderUnavailableError):
            await embedder.embed(["a"])
        assert embedder.budget is None
        monkeypatch.setattr(tei_module, "LEARN_S", 5.0)
        await embedder.embed(["a"])
    assert [seen.target for seen in server.seen] == ["/info", "/embed", "/info", "/embed"]


@pytest.mark.parametrize(
    ("told", "most"), [(2**62, 2**62), (10**30, None), (-(2**70), None), (1, 1)]
)
async def test_limits_of_any_size_do_no_harm(
    server: ScriptedServer, told: int, most: int | None
) -> None:
    server.script.append(Reply(body=b'{"max_client_batch_size": %d}' % told))
    async with open_tei_embedder(server.url) as embedder:
        assert len(await embedder.embed(["a", "b", "c"])) == 3
        assert embedder.budget is not None
        assert embedder.budget.max_rows == most
