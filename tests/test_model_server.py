"""The model server: its door is that of any embedding server, its cost is pretended, its errors name the culprit."""

from __future__ import annotations

import base64
import json
import signal
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import httpx
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.readings import ReadingsModel
from stationmaster.service.asgi import bind, open_server
from stationmaster.service.model_server import MAX_BODY_BYTES, MAX_TEXT_LENGTH, model_app
from tests.http_requests import client_of
from tests.processes import open_part

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.applications import Starlette

TEXTS = ['{"temp": -0.7, "co": 300}', '{"temp": 21}', '[{"pm25": 9}, {"pm25": 11}]']
EXPECTED = [list(ReadingsModel().embed_text(text)) for text in TEXTS]
DOOR = "/v1/embeddings"


def body(**fields: Any) -> dict[str, Any]:
    """A good request, with some fields changed; an Ellipsis leaves the field out."""
    good = {"model": "readings-128", "input": TEXTS}
    return {key: value for key, value in (good | fields).items() if value is not ...}


@asynccontextmanager
async def open_client(app: Starlette | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app behind a real socket."""
    async with open_server(app or model_app(), await bind("127.0.0.1", 0)) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            yield client


def direct_client(app: Starlette) -> httpx.AsyncClient:
    """A client that calls the app without a socket, so that the virtual clock may jump."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://model")


@attrs.frozen(eq=False)
class Listening(ReadingsModel):
    """The model, which remembers what it was asked."""

    texts: list[str] = attrs.field(factory=list)

    def embed_text(self, text: str, /) -> tuple[float, ...]:  # type: ignore[explicit-override]  # 3.12 has typing.override
        self.texts.append(text)
        return super().embed_text(text)


# --------------------------------------------------------------------------------------------------------- the door


async def test_texts_become_vectors_in_their_order() -> None:
    async with open_client() as client:
        answer = await client.post(DOOR, json=body())
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    characters = sum(map(len, TEXTS))
    assert answer.json() == {
        "object": "list",
        "model": "readings-128",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(EXPECTED)
        ],
        "usage": {"prompt_tokens": characters, "total_tokens": characters},
    }


async def test_a_single_text_needs_no_list() -> None:
    async with open_client() as client:
        answer = await client.post(DOOR, json=body(input=TEXTS[0]))
    assert [entry["embedding"] for entry in answer.json()["data"]] == EXPECTED[:1]


async def test_base64_is_little_endian_float32() -> None:
    async with open_client() as client:
        answer = await client.post(DOOR, json=body(encoding_format="base64"))
    for entry, expected in zip(answer.json()["data"], EXPECTED, strict=True):
        vector = struct.unpack("<128f", base64.b64decode(entry["embedding"], validate=True))
        assert vector == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "fields",
    [
        {"encoding_format": "float"},
        {"encoding_format": None},
        {"dimensions": 128},
        {"dimensions": 128.0},
        {"user": "demo"},
    ],
    ids=str,
)
async def test_what_the_form_allows_is_taken(fields: dict[str, Any]) -> None:
    async with open_client() as client:
        answer = await client.post(DOOR, json=body(**fields))
    assert [entry["embedding"] for entry in answer.json()["data"]] == EXPECTED


async def test_as_many_texts_as_the_form_allows_are_taken() -> None:
    async with open_client() as client:
        answer = await client.post(DOOR, json=body(input=TEXTS[1:2] * 2048), timeout=60)
    assert [entry["index"] for entry in answer.json()["data"]] == list(range(2048))


async def test_the_model_is_listed() -> None:
    async with open_client() as client:
        answer = await client.get("/v1/models")
    (model,) = answer.json().pop("data")
    assert model == {
        "id": "readings-128",
        "object": "model",
        "created": 0,
        "owned_by": "stationmaster",
    }


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": ...}, 400, "model", "missing_required_parameter"),
        ({"input": ...}, 400, "input", "missing_required_parameter"),
        ({"model": None}, 400, "model", "invalid_type"),
        ({"model": "MiniLM"}, 404, "model", "model_not_found"),
        ({"temperature": 1}, 400, "temperature", "unknown_parameter"),
        ({"user": 7}, 400, "user", "invalid_type"),
        ({"user": None}, 400, "user", "invalid_type"),
        ({"dimensions": 64}, 400, "dimensions", "invalid_value"),
        ({"dimensions": 0}, 400, "dimensions", "invalid_value"),
        ({"dimensions": "128"}, 400, "dimensions", "invalid_value"),
        ({"dimensions": None}, 400, "dimensions", "invalid_value"),
        ({"encoding_format": "int8"}, 400, "encoding_format", "invalid_value"),
        ({"encoding_format": ["float"]}, 400, "encoding_format", "invalid_value"),
        ({"encoding_format": ""}, 400, "encoding_format", "invalid_value"),
        ({"input": None}, 400, "input", "invalid_type"),
        ({"input": {}}, 400, "input", "invalid_type"),
        ({"input": []}, 400, "input", "invalid_size"),
        ({"input": TEXTS[:1] * 2049}, 400, "input", "invalid_size"),
        ({"input": ""}, 400, "input", "empty_string"),
        ({"input": [TEXTS[0], ""]}, 400, "input[1]", "empty_string"),
        ({"input": [1, 2]}, 400, "input[0]", "invalid_type"),
        ({"input": [[1, 2]]}, 400, "input[0]", "invalid_type"),
        ({"input": [TEXTS[0], None]}, 400, "input[1]", "invalid_type"),
        ({"input": ["x" * (MAX_TEXT_LENGTH + 1)]}, 400, "input[0]", "string_too_long"),
        ({"input": "PM2.5 is 9"}, 400, "input", "invalid_readings"),
        ({"input": [*TEXTS, '{"co": null}']}, 400, "input[3]", "invalid_readings"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_bad_request_is_refused_in_the_usual_form(
    fields: dict[str, Any], status: int, param: str, code: str
) -> None:
    async with open_client() as client:
        answer = await client.post(DOOR, json=body(**fields))
        assert answer.status_code == status
        (error,) = answer.json().values()
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            param,
            code,
        )
        assert "input" in error["message"] or param in error["message"]
        # The next call by the same connection is none the worse for it.
        assert (await client.post(DOOR, json=body())).status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": "\\ud83d"}', b'{"model": NaN}']
)
async def test_a_body_that_is_no_json_object_is_refused(content: bytes) -> None:
    async with open_client() as client:
        headers = {"content-type": "application/json"}
        answer = await client.post(DOOR, content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


async def test_an_answer_repeats_little_of_what_was_sent() -> None:
    async with open_client() as client:
        for fields in ({"model": "m" * 100_000}, {"k" * 100_000: 1}):
            answer = await client.post(DOOR, json=body(**fields))
            assert "mmm" in answer.text or "kkk" in answer.text
            assert len(answer.content) < 1000


async def test_refusals_by_path_method_length_and_type_have_the_usual_form_too() -> None:
    async with open_client() as client:
        answers = [
            await client.get("/v2/embeddings"),
            await client.get(DOOR),
            await client.post(DOOR, json=body(input="x" * MAX_BODY_BYTES)),
            await client.post(DOOR, content=json.dumps(body())),
        ]
    assert [answer.status_code for answer in answers] == [404, 405, 413, 415]
    for answer in answers:
        error = answer.json()["error"]
        assert error["message"]
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            None,
            None,
        )


async def test_a_bug_in_the_model_is_a_server_error(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ReadingsModel):
        def embed_text(self, text: str, /) -> tuple[float, ...]:  # type: ignore[explicit-override]  # 3.12 has typing.override
            raise ZeroDivisionError(text)

    async with open_client(model_app(model=Broken())) as client:
        answers = [await client.post(DOOR, json=body()) for _ in range(2)]
        assert (await client.get("/health")).json()["running"] == 0
    assert [answer.status_code for answer in answers] == [500, 500]
    assert answers[0].json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in caplog.text


# -------------------------------------------------------------------------------------------------- pretended costs


async def test_a_call_costs_a_fixed_time_and_more_for_each_text(autojump_clock: MockClock) -> None:
    async with direct_client(model_app(pretend_s=0.025, pretend_per_text_s=0.004)) as client:
        for count in (1, 3):
            started = trio.current_time()
            await client.post(DOOR, json=body(input=TEXTS[:count]))
            assert trio.current_time() - started == pytest.approx(0.025 + 0.004 * count)


async def test_calls_at_once_run_one_after_another_in_their_order(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    done: list[tuple[int, float]] = []

    async def call(number: int) -> None:
        assert (await client.post(DOOR, json=body(input=TEXTS[:1]))).status_code == 200
        done.append((number, trio.current_time()))

    async with direct_client(model_app(pretend_s=1.0)) as client:
        started = trio.current_time()
        async with trio.open_nursery() as calls:
            for number in range(4):
                calls.start_soon(call, number)
                await wait_all_tasks_blocked()
    assert [number for number, _ in done] == [0, 1, 2, 3]
    assert [at - started for _, at in done] == pytest.approx([1.0, 2.0, 3.0, 4.0])


async def test_a_refused_text_frees_the_accelerator_at_once(autojump_clock: MockClock) -> None:
    async with direct_client(model_app(pretend_s=1.0)) as client:
        started = trio.current_time()
        assert (await client.post(DOOR, json=body(input="{}"))).status_code == 400
        assert trio.current_time() == started
        assert (await client.get("/health")).json() == {"status": "ok", "running": 0, "waiting": 0}


async def test_more_calls_than_may_wait_are_told_to_come_again(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with direct_client(model_app(pretend_s=1.0, max_waiting=2)) as client:
        async with trio.open_nursery() as calls:
            for _ in range(3):
                calls.start_soon(lambda: client.post(DOOR, json=body()))
            await wait_all_tasks_blocked()
            assert (await client.get("/health")).json() == {
                "status": "ok",
                "running": 1,
                "waiting": 2,
            }
            answer = await client.post(DOOR, json=body())
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "server_error"
        assert (await client.post(DOOR, json=body())).status_code == 200


async def test_a_cancelled_call_gives_its_turn_to_the_next(autojump_clock: MockClock) -> None:
    async with direct_client(model_app(pretend_s=1.0)) as client:
        for give_up_after_s in (0.5, 1.5):  # in work, and in the queue
            async with trio.open_nursery() as calls:
                calls.start_soon(lambda: client.post(DOOR, json=body()))
                await wait_all_tasks_blocked()
                with trio.move_on_after(give_up_after_s) as scope:
                    await client.post(DOOR, json=body())
                assert scope.cancelled_caught
        with trio.fail_after(1.5):
            assert (await client.post(DOOR, json=body())).status_code == 200


async def test_a_call_whose_client_leaves_is_dropped_while_it_waits_but_not_while_it_runs(
    mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    # Real sockets under a clock that stands still until it is told to jump.
    model = Listening()

    async def wait_for_health(**wanted: int) -> None:
        told: object = None
        for _ in range(1000):  # each is a round trip: enough for the server to notice anything
            told = (await client.get("/health")).json()
            if told == {"status": "ok"} | wanted:
                return
        raise AssertionError(told)

    async def call(text: str, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            async with httpx.AsyncClient(base_url=client.base_url) as mine:
                assert (await mine.post(DOOR, json=body(input=text))).status_code == 200

    async with open_client(model_app(pretend_s=1.0, model=model)) as client:
        async with trio.open_nursery() as calls:
            running: trio.CancelScope = await calls.start(call, TEXTS[0])
            await wait_for_health(running=1, waiting=0)
            waiting: trio.CancelScope = await calls.start(call, TEXTS[1])
            await wait_for_health(running=1, waiting=1)
            await calls.start(call, TEXTS[2])
            await wait_for_health(running=1, waiting=2)

            waiting.cancel()
            await wait_for_health(running=1, waiting=1)
            running.cancel()
            await wait_all_tasks_blocked()
            assert model.texts == [TEXTS[0]]
            await wait_for_health(running=1, waiting=1)

            mock_clock.jump(1.0)
            await wait_for_health(running=1, waiting=0)
            mock_clock.jump(1.0)
    assert model.texts == [TEXTS[0], TEXTS[2]]
    assert caplog.records == []


# ------------------------------------------------------------------------------------------------------ the process


async def test_the_process_serves_and_ends_cleanly_at_sigterm() -> None:
    async with open_part("model-server", "--pretend-ms", "1", "--pretend-ms-per-text", "1") as part:
        url = (await part.wait_line("listening on ")).removeprefix("listening on ")
        async with client_of(url) as client:
            answer = await client.post(DOOR, json=body())
            assert [entry["embedding"] for entry in answer.json()["data"]] == EXPECTED
            part.process.send_signal(signal.SIGTERM)
            assert await part.ends() == 0
    assert part.lines == [f"listening on {url}"]


async def test_the_process_ends_with_its_parent_if_asked() -> None:
    async with open_part("model-server", "--end-with-parent") as part:
        await part.wait_line("listening on ")
        assert part.process.stdin is not None
        await part.process.stdin.aclose()
        assert await part.ends() == 0
