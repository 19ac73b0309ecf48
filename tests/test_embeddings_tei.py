from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
import trio

from stationmaster.embeddings import TeiBudget, open_tei_embedder
from stationmaster.embeddings.answers import read_tei_answer
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.testing.server import RESET, Reply, Request, ScriptedServer, open_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# As text-embeddings-inference answers it, with some fields left out.
INFO = {
    "model_id": "BAAI/bge-small-en-v1.5",
    "max_concurrent_requests": 512,
    "max_input_length": 512,
    "max_batch_tokens": 16384,
    "max_batch_requests": None,
    "max_client_batch_size": 3,
    "auto_truncate": False,
    "version": "1.7.0",
}


def answer(seen: Request) -> Reply:
    if (seen.method, seen.target) == ("GET", "/info"):
        return Reply(body=orjson.dumps(INFO))
    assert (seen.method, seen.target) == ("POST", "/embed")
    return Reply(
        body=orjson.dumps([[len(text), 1.5] for text in orjson.loads(seen.body)["inputs"]])
    )


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    with trio.fail_after(10):
        async with open_server(answer) as scripted:
            yield scripted


def targets(server: ScriptedServer) -> list[str]:
    return [seen.target for seen in server.seen]


async def test_a_call_asks_as_the_server_expects(server: ScriptedServer) -> None:
    async with open_tei_embedder(server.url + "/", key="sesame") as embedder:
        vectors = await embedder.embed(["a", "größer"])
    assert [list(vector) for vector in vectors] == [[1, 1.5], [6, 1.5]]
    info, embed = server.seen
    assert info.target == "/info"
    assert embed.headers["authorization"] == "Bearer sesame"
    assert embed.headers["content-type"] == "application/json"
    assert orjson.loads(embed.body) == {"inputs": ["a", "größer"]}


async def test_its_limits_are_asked_for_once_and_calls_are_split_by_them(
    server: ScriptedServer,
) -> None:
    async with open_tei_embedder(server.url) as embedder:
        before = embedder.budget
        vectors = await embedder.embed(["x" * length for length in range(1, 8)])
        assert before is None
        assert embedder.budget == TeiBudget(max_rows=3, max_tokens=16384, max_row_tokens=512)
        await embedder.embed(["a"])
    assert [list(vector) for vector in vectors] == [[length, 1.5] for length in range(1, 8)]
    assert targets(server) == ["/info", "/embed", "/embed", "/embed", "/embed"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=404),
        Reply(body=b"<html>"),
        Reply(body=b"[]"),
        Reply(body=b'{"max_client_batch_size": 0}'),
        Reply(body=b'{"max_client_batch_size": "32"}'),
        Reply(body=b'{"max_client_batch_size": true}'),
    ],
    ids=["404", "HTML", "a list", "zero", "a text", "a boolean"],
)
async def test_a_server_without_usable_limits_is_asked_in_one_call(
    server: ScriptedServer, reply: Reply
) -> None:
    server.script.append(reply)
    async with open_tei_embedder(server.url) as embedder:
        assert len(await embedder.embed(["a"] * 50)) == 50
        assert embedder.budget == TeiBudget()
        await embedder.embed(["a"])
    assert targets(server) == ["/info", "/embed", "/embed"]


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (Reply(status=404, body=b"nothing here"), ProtocolError, "no limits.*404: nothing here"),
        (Reply(body=b"<html>"), ProtocolError, r"127.0.0.1.*/info is not JSON.*<html>"),
        (Reply(body=b"[]"), ProtocolError, "not an object"),
        (
            Reply(body=b'{"max_batch_tokens": -1}'),
            ProtocolError,
            "max_batch_tokens is not a number of at least 1: -1",
        ),
        (Reply(status=503), EmbedderBusyError, "503"),
    ],
)
async def test_whoever_asks_for_the_limits_hears_what_is_wrong(
    server: ScriptedServer, reply: Reply, error: type[EmbedderError], words: str
) -> None:
    server.script.append(reply)
    async with open_tei_embedder(server.url) as embedder:
        with pytest.raises(error, match=words):
            await embedder.learn()
        assert embedder.budget is None
        assert (await embedder.learn()).max_rows == 3


async def test_limits_that_are_not_told_are_none(server: ScriptedServer) -> None:
    server.script.append(Reply(body=b'{"max_batch_tokens": 7}'))
    async with open_tei_embedder(server.url) as embedder:
        assert await embedder.learn() == TeiBudget(max_tokens=7)


async def test_a_server_that_is_away_is_asked_for_its_limits_again(server: ScriptedServer) -> None:
    server.script.append(RESET)
    async with open_tei_embedder(server.url) as embedder:
        with pytest.raises(EmbedderUnavailableError):
            await embedder.embed(["a"])
        await embedder.embed(["a"])
    assert targets(server) == ["/info", "/info", "/embed"]


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (413, "Validation", RowRejectedError),
        (422, "Tokenizer", RowRejectedError),
        (424, "Backend", EmbedderUnavailableError),
        (429, "Overloaded", EmbedderBusyError),
        (503, "Unhealthy", EmbedderBusyError),
        (401, "", EmbedderRefusedError),
    ],
)
async def test_its_refusals_are_typed_errors_with_its_words(
    server: ScriptedServer, status: int, kind: str, error: type[EmbedderError]
) -> None:
    async with open_tei_embedder(server.url) as embedder:
        await embedder.learn()
        body = orjson.dumps({"error": "`inputs` must have less", "error_type": kind})
        server.script.append(Reply(status=status, body=body))
        with pytest.raises(error, match=rf"answered {status}: `inputs` must have less"):
            await embedder.embed(["a", "b"])


async def test_a_lone_surrogate_is_refused_and_not_sent(server: ScriptedServer) -> None:
    async with open_tei_embedder(server.url) as embedder:
        with pytest.raises(RowRejectedError, match="text 1 of 2 has a lone surrogate"):
            await embedder.embed(["a", "b\ud83d"])
    assert targets(server) == ["/info"]


async def test_the_first_answer_fixes_the_dimension(server: ScriptedServer) -> None:
    async with open_tei_embedder(server.url) as embedder:
        await embedder.embed(["a"])
        assert embedder.dimensions == 2
        server.script.append(Reply(body=b"[[1, 2, 3]]"))
        with pytest.raises(ProtocolError, match=r"127.0.0.1.*3 numbers instead of 2"):
            await embedder.embed(["a"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b'{"data": []}', "not a list of vectors"),
        (b"[[1.0]]", "1 vectors for 2 texts"),
        (b"[[1.0], [1.0], [1.0]]", "3 vectors for 2 texts"),
        (b"[[1.0], [1.0, 2.0]]", "vector 1 has 2 numbers instead of 1"),
        (b"[[], []]", "vector 0 is empty"),
        (b"[[1.0], [NaN]]", "not JSON"),
        (b"[[1.0], [null]]", "vector 1 holds something that is no number"),
        (b"[[1.0], 1.0]", "vector 1 is neither a list nor a text"),
        (b"[[[1.0]], [[1.0]]]", "vector 0 holds something that is no number"),
    ],
)
def test_an_answer_that_is_no_list_of_vectors_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        read_tei_answer(body, count=2, dimensions=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "http://host/?key=x"}, "no query"),
        ({"dimensions": 0}, "dimensions must be at least 1"),
        ({"connections": 0}, "connections"),
    ],
)
async def test_wrong_arguments_are_refused_at_opening(options: dict[str, Any], words: str) -> None:
    arguments = {"url": "http://host", **options}
    with pytest.raises(ValueError, match=words):
        async with open_tei_embedder(arguments.pop("url"), **arguments):
            pass
