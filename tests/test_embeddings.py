from __future__ import annotations

import base64
import math
import struct
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from stationmaster.embeddings import open_openai_embedder
from stationmaster.embeddings.answers import _decoded, read_openai_answer
from stationmaster.errors import (
    EmbedderBusyError,
    EmbedderRefusedError,
    EmbedderUnavailableError,
    ProtocolError,
    RowRejectedError,
)
from stationmaster.http_words import MAX_RETRY_AFTER_S
from stationmaster.testing.server import HANG, RESET, Reply, ScriptedServer, open_server

from .http_server import closed_port, passing_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from trio.testing import MockClock


def packed(*numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def form(*embeddings: Any, **fields: Any) -> bytes:
    rows = [{"index": index, "embedding": vector} for index, vector in enumerate(embeddings)]
    return orjson.dumps({"object": "list", "data": rows, "model": "m", **fields})


def answered(*embeddings: Any) -> Reply:
    return Reply(body=form(*embeddings))


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    with trio.fail_after(10):
        async with open_server(lambda _: answered([1.0, 2.0])) as scripted:
            yield scripted


# -------------------------------------------------------------------------------------------------------- the request


async def test_a_call_asks_as_an_openai_server_expects(server: ScriptedServer) -> None:
    server.script.append(answered([1.0], [2.0]))
    async with open_openai_embedder(server.url + "/v1/", model="m", key="sesame") as embedder:
        await embedder.embed(("a", "größer"))
    [seen] = server.seen
    assert (seen.method, seen.target) == ("POST", "/v1/embeddings")
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["authorization"] == "Bearer sesame"
    assert orjson.loads(seen.body) == {
        "model": "m",
        "input": ["a", "größer"],
        "encoding_format": "base64",
    }


async def test_floats_are_asked_for_if_wanted_and_no_key_is_sent_without_one(
    server: ScriptedServer,
) -> None:
    async with open_openai_embedder(server.url, model="m", encoding="float") as embedder:
        await embedder.embed(["a"])
    assert orjson.loads(server.seen[0].body)["encoding_format"] == "float"
    assert "authorization" not in server.seen[0].headers


async def test_a_lone_surrogate_is_refused_by_its_row_and_not_sent(server: ScriptedServer) -> None:
    async with open_openai_embedder(server.url, model="m") as embedder:
        with pytest.raises(RowRejectedError, match="text 1 of 3 has a lone surrogate"):
            await embedder.embed(["a", "b\ud83d", "c"])
        assert list((await embedder.embed(["a"]))[0]) == [1.0, 2.0]
    assert len(server.seen) == 1


async def test_a_text_that_is_none_is_a_bug_of_the_caller(server: ScriptedServer) -> None:
    async with open_openai_embedder(server.url, model="m") as embedder:
        with pytest.raises(TypeError):
            await embedder.embed(["a", b"b"])  # type: ignore[list-item]
    assert server.seen == []


async def test_calls_at_once_have_a_connection_each(server: ScriptedServer) -> None:
    server.answer = lambda _: HANG
    async with open_openai_embedder(server.url, model="m", connections=3) as embedder:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(embedder.embed, ["a"])
            await server.requests.wait_value(3)
            nursery.cancel_scope.cancel()
    assert sorted(server.connections) == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------- the known size


async def test_the_first_answer_fixes_the_dimension(server: ScriptedServer) -> None:
    server.script.extend([answered([]), answered([1.0, 2.0, 3.0]), answered([1.0, 2.0])])
    known: list[int | None] = []
    async with open_openai_embedder(server.url, model="m") as embedder:
        with pytest.raises(ProtocolError, match="vector 0 is empty"):
            await embedder.embed(["a"])
        known.append(embedder.dimensions)
        await embedder.embed(["a"])
        known.append(embedder.dimensions)
        with pytest.raises(
            ProtocolError, match=r"127.0.0.1.*: vector 0 has 2 numbers instead of 3"
        ):
            await embedder.embed(["a"])
        server.script.append(answered(packed(4, 5, 6)))
        assert list((await embedder.embed(["a"]))[0]) == [4, 5, 6]
        known.append(embedder.dimensions)
    assert known == [None, 3, 3]


async def test_a_configured_dimension_holds_from_the_first_answer_on(
    server: ScriptedServer,
) -> None:
    async with open_openai_embedder(server.url, model="m", dimensions=3) as embedder:
        with pytest.raises(ProtocolError, match="vector 0 has 2 numbers instead of 3"):
            await embedder.embed(["a"])
        assert embedder.dimensions == 3
    assert "dimensions" not in orjson.loads(server.seen[0].body)


# -------------------------------------------------------------------------------------------------- refusals, trouble


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (302, EmbedderRefusedError),
        (400, RowRejectedError),
        (401, EmbedderRefusedError),
        (402, EmbedderRefusedError),
        (403, EmbedderRefusedError),
        (404, EmbedderRefusedError),
        (405, EmbedderRefusedError),
        (408, EmbedderUnavailableError),
        (409, EmbedderUnavailableError),
        (413, RowRejectedError),
        (422, RowRejectedError),
        (424, EmbedderUnavailableError),
        (429, EmbedderBusyError),
        (500, EmbedderUnavailableError),
        (502, EmbedderUnavailableError),
        (503, EmbedderBusyError),
        (599, EmbedderUnavailableError),
    ],
)
async def test_a_refusal_is_the_error_of_its_status_with_the_servers_words(
    server: ScriptedServer, status: int, error: type[Exception]
) -> None:
    server.script.append(
        Reply(
            status=status,
            headers={"Location": server.url + "/elsewhere"},
            body=b'{"error": {"message": "the key sesame fits not"}}',
        )
    )
    async with open_openai_embedder(server.url, model="m", key="sesame") as embedder:
        with pytest.raises(
            error, match=rf"/embeddings|127.* answered {status}: the key \*\*\* fits not"
        ) as caught:
            await embedder.embed(["a"])
        assert "sesame" not in str(caught.value) + repr(embedder)
        assert len(await embedder.embed(["a"])) == 1
    assert len(server.seen) == 2


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_server_may_say_how_long(server: ScriptedServer, status: int) -> None:
    past, future = "Sun, 01 Mar 2020 12:00:30 GMT", "Fri, 01 Mar 2120 12:00:30 GMT"
    said = [{}, *({"Retry-After": value} for value in ("7", past, future, "soon"))]
    server.script.extend(Reply(status=status, headers=headers) for headers in said)
    waits: list[float | None] = []
    async with open_openai_embedder(server.url, model="m") as embedder:
        for _ in said:
            with pytest.raises(EmbedderBusyError, match="no words") as caught:
                await embedder.embed(["a"])
            waits.append(caught.value.retry_after_s)
    assert waits == [None, 7.0, 0.0, MAX_RETRY_AFTER_S, None]


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        pytest.param(HANG, EmbedderUnavailableError, "did not answer in time", id="hangs"),
        pytest.param(Reply(pause_s=0.01), EmbedderUnavailableError, "in time", id="drips"),
        pytest.param(
            Reply(first=60, end="hang", body=b"x" * 99),
            EmbedderUnavailableError,
            "in time",
            id="stalls",
        ),
        pytest.param(RESET, EmbedderUnavailableError, "broke the connection", id="resets"),
        pytest.param(
            Reply(first=60, end="reset", body=b"x" * 99),
            EmbedderUnavailableError,
            "broke the connection",
            id="resets in the body",
        ),
        pytest.param(
            Reply(body=b"x" * 10_000_000), ProtocolError, "more than 1000 bytes", id="is endless"
        ),
        pytest.param(
            Reply(headers={"Content-Encoding": "br"}, body=b"x"),
            ProtocolError,
            "compressed",
            id="compresses",
        ),
        pytest.param(
            Reply(body=b"<html>hi</html>"), ProtocolError, "not JSON.*<html>hi", id="speaks HTML"
        ),
        pytest.param(Reply(status=204), ProtocolError, "not JSON", id="says nothing"),
        pytest.param(
            Reply(status=502, body=b"<html>\r\nBad Gateway</html>"),
            EmbedderUnavailableError,
            r"502: <html>\\r\\nBad Gateway",
            id="is a proxy without a server",
        ),
        pytest.param(
            Reply(status=422, body=b'{"detail": "' + b"y" * 10_000_000),
            RowRejectedError,
            "yyy$",
            id="echoes ten megabytes",
        ),
        pytest.param(
            Reply(status=500, body=b"Internal Server Error", end="ambush"),
            EmbedderUnavailableError,
            "Internal Server Error",
            id="hangs up after a 500",
        ),
    ],
)
async def test_trouble_is_a_typed_error_and_harms_no_later_call(
    mock_clock: MockClock, server: ScriptedServer, reply: Reply, error: type[Exception], words: str
) -> None:
    server.script.append(reply)
    async with open_openai_embedder(
        server.url, model="m", connections=1, timeout_s=5.0, max_answer_bytes=1000
    ) as embedder:
        async with passing_time(server, mock_clock):
            with pytest.raises(error, match=words) as caught:
                await embedder.embed(["a"])
        assert len(str(caught.value)) < 500
        assert list((await embedder.embed(["a"]))[0]) == [1.0, 2.0]


async def test_an_absent_server_is_unavailable() -> None:
    async with open_openai_embedder(f"http://127.0.0.1:{closed_port()}", model="m") as embedder:
        with pytest.raises(EmbedderUnavailableError, match="cannot be reached"):
            await embedder.embed(["a"])


# -------------------------------------------------------------------------------------------------------- the answer


def read(body: bytes, count: int, dimensions: int | None = None) -> list[list[float]]:
    return [list(vector) for vector in read_openai_answer(body, count=count, dimensions=dimensions)]


@pytest.mark.parametrize("vectors", [([1.0, 2.0], [3.0, 4.0]), (packed(1, 2), packed(3, 4))])
def test_lists_and_base64_are_understood(vectors: Sequence[Any]) -> None:
    assert read(form(*vectors), 2) == [[1.0, 2.0], [3.0, 4.0]]


def test_base64_becomes_a_buffer_of_float32() -> None:
    [vector] = read_openai_answer(form(packed(0.1, -2)), count=1, dimensions=2)
    assert isinstance(vector, memoryview)
    assert (vector.format, vector.nbytes, vector.readonly) == ("f", 8, True)


def test_base64_is_little_endian_also_on_a_host_that_is_not() -> None:
    big = base64.b64encode(struct.pack("=2f", 1, 2)).decode()
    swapped = base64.b64encode(
        struct.pack("<2I", *struct.unpack(">2I", struct.pack("<2f", 1, 2)))
    ).decode()
    assert list(_decoded(swapped, 0, swap=True)) == list(_decoded(big, 0, swap=False)) == [1, 2]


def test_rows_are_put_in_order_by_their_index() -> None:
    rows = [{"index": index, "embedding": [float(index)]} for index in (2, 0, 1)]
    assert read(orjson.dumps({"data": rows}), 3) == [[0.0], [1.0], [2.0]]


def test_rows_without_any_index_are_taken_in_their_order() -> None:
    rows = [{"embedding": [5.0]}, {"embedding": [6.0], "index": None}]
    assert read(orjson.dumps({"data": rows}), 2) == [[5.0], [6.0]]


@pytest.mark.parametrize(
    "indexes", [(0, 0), (1, 2), (-1, 0), (0, None), (0, "1"), (False, True), (0, 1.0), (0, 2**63)]
)
def test_indexes_that_are_no_permutation_are_refused(indexes: Sequence[Any]) -> None:
    rows = [{"index": index, "embedding": [1.0]} for index in indexes]
    with pytest.raises(ProtocolError, match="the indexes are not 0 to 1, each once"):
        read(orjson.dumps({"data": rows}), 2)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_vectors_is_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"2 vectors for {count} texts"):
        read(form([1.0], [2.0]), count)


def test_vectors_of_different_sizes_are_refused() -> None:
    with pytest.raises(ProtocolError, match="vector 1 has 3 numbers instead of 2"):
        read(form(packed(1, 2), [1.0, 2.0, 3.0]), 2)


@pytest.mark.parametrize("body", [b"NaN", b"Infinity", b"1e400", b"-1e400"])
def test_lists_with_numbers_that_are_not_finite_are_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not JSON"):
        read(b'{"data": [{"embedding": [0.5, %s]}]}' % body, 1)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_base64_with_a_number_that_is_not_finite_is_refused(number: float, place: int) -> None:
    numbers = [0.5, -0.5, 3e38]
    numbers[place] = number
    with pytest.raises(ProtocolError, match="vector 1 holds a number that is not finite"):
        read(form(packed(1, 2, 3), packed(*numbers)), 2)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_any_base64_is_taken_exactly_if_all_its_numbers_are_finite(words: list[int]) -> None:
    raw = struct.pack(f"<{len(words)}I", *words)
    numbers = struct.unpack(f"<{len(words)}f", raw)
    body = form(base64.b64encode(raw).decode())
    if all(map(math.isfinite, numbers)):
        assert read(body, 1) == [list(numbers)]
    else:
        with pytest.raises(ProtocolError, match="not finite"):
            read(body, 1)


def test_large_finite_numbers_are_fine() -> None:
    assert read(form([1e308, 1e308, 7]), 1) == [[1e308, 1e308, 7]]
    assert read(form(packed(3e38, -3e38)), 1)[0] == pytest.approx([3e38, -3e38])


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        (None, "neither a list nor a text: None"),
        (5, "neither a list nor a text: 5"),
        ({"a": 1}, "neither"),
        ([], "vector 0 is empty"),
        ("", "vector 0 is empty"),
        ([1.0, True], "no number"),
        ([1.0, None], "no number"),
        ([1.0, "2"], "no number"),
        ([[1.0]], "no number"),
        (["x" * 10_000], "no number"),
        ("AAAA", "3 bytes, which is no whole number of float32"),
        ("AAA", "not base64"),
        ("!!!!", "not base64"),
        ("AAAA\nAAA=", "not base64"),
        ("größ", "not base64"),
    ],
)
def test_what_is_no_vector_is_refused(embedding: Any, words: str) -> None:
    with pytest.raises(ProtocolError, match=words) as caught:
        read(form(embedding), 1)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b"{}",
        b'{"data": null}',
        b'{"data": {"0": 1}}',
        b'{"data": [[1.0]]}',
        b'{"error": "odd"}',
    ],
)
def test_an_answer_of_another_shape_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="no list of objects as data"):
        read(body, 1)


def test_the_model_may_have_another_name_but_must_be_a_text() -> None:
    assert read(form([1.0], model="all-MiniLM-L6-v2"), 1) == [[1.0]]
    with pytest.raises(ProtocolError, match="model is not a text"):
        read(form([1.0], model=7), 1)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "http://host/v1?key=x"}, "no query"),
        ({"url": "host/v1"}, "not of the form"),
        ({"dimensions": 0}, "dimensions must be at least 1"),
        ({"encoding": "int8"}, "base64 or float"),
        ({"key": "a\n"}, "visible ASCII"),
        ({"connections": 0}, "connections"),
    ],
)
async def test_wrong_arguments_are_refused_at_opening(options: dict[str, Any], words: str) -> None:
    arguments = {"url": "http://host/v1", "model": "m", **options}
    with pytest.raises(ValueError, match=words):
        async with open_openai_embedder(arguments.pop("url"), **arguments):
            pass
