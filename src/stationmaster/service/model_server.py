"""`stationmaster model-server`: the built-in model `readings-128` behind the usual door of embedding servers.

    POST /v1/embeddings    the OpenAI form, as float or base64 (little-endian float32); errors in its form, too
    GET  /v1/models        the one model
    GET  /health           {"status": "ok", "running": calls in work (0 or 1), "waiting": calls in the queue}

The model is so cheap that batching would show no gain. Therefore a call may pretend to cost what it costs elsewhere: so
many seconds, and so many more for each text. It models ONE accelerator: calls run one after another, in the order in
which they came. A call that waits is dropped when its client goes away; one that runs goes on to its end, as on real
servers.
"""

from __future__ import annotations

import base64
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import orjson
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from stationmaster.readings import DIMENSIONS, MODEL_NAME, ReadingsError, ReadingsModel
from stationmaster.service.asgi import error_handlers, json_response, read_body, serve_until_told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_TEXTS = 2048
MAX_TEXT_LENGTH = 16 * 1024
"""Characters of one text: about 2,000 fields."""
DEFAULT_MAX_WAITING = 256
_SLICE_CHARACTERS = 4096
"""Work between two looks at other tasks: 3 to 30 ms. Not in a thread: pure Python holds the GIL there as well."""
_KNOWN_KEYS = frozenset({"model", "input", "encoding_format", "dimensions", "user"})


class InvalidRequestError(HTTPException):
    """A request that cannot be served: what the client is told, and about which parameter."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str
    ) -> None:
        super().__init__(status, message)
        self.param = param
        self.code = code


@attrs.frozen(kw_only=True)
class EmbeddingRequest:
    """A request that keeps the rules of the OpenAI form and of this server."""

    texts: tuple[str, ...]
    single: bool
    """`input` was a string, not a list."""
    as_base64: bool = False
    """Vectors as base64 of little-endian float32, not as lists of numbers."""

    def param(self, index: int) -> str:
        """The name of the text at `index`, for error messages."""
        return "input" if self.single else f"input[{index}]"


def parse_request(body: bytes) -> EmbeddingRequest:
    """Read a request's body.

    Raises:
        InvalidRequestError: it breaks a rule; the error names the parameter.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("the body is not a JSON object", code="invalid_json")
    for key in ("model", "input"):
        if key not in content:
            _refuse(key, "is required", code="missing_required_parameter")
    for key in content:
        if key not in _KNOWN_KEYS:
            _refuse(_brief(key), "is not a known parameter", code="unknown_parameter")
    if not isinstance(content["model"], str):
        _refuse("model", "must be a string", code="invalid_type")
    if content["model"] != MODEL_NAME:
        raise InvalidRequestError(
            f"there is no model {_brief(content['model'])!r} here, only {MODEL_NAME!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    if "user" in content and not isinstance(content["user"], str):
        _refuse("user", "must be a string", code="invalid_type")
    dimensions = content.get("dimensions", DIMENSIONS)
    if dimensions != DIMENSIONS:
        _refuse("dimensions", f"must be {DIMENSIONS} for this model", code="invalid_value")
    as_base64 = False
    match content.get("encoding_format"):
        case None | "float":  # a null is how some clients say "not set"
            pass
        case "base64":
            as_base64 = True
        case _:
            _refuse("encoding_format", 'must be "float" or "base64"', code="invalid_value")
    single = isinstance(content["input"], str)
    return EmbeddingRequest(
        texts=_checked_texts(content["input"]), single=single, as_base64=as_base64
    )


def _checked_texts(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - as JSON brings it
    if isinstance(value, str):
        _check_text("input", value)
        return (value,)
    if not isinstance(value, list):
        _refuse("input", "must be a string or a list of strings", code="invalid_type")
    if not 1 <= len(value) <= MAX_TEXTS:
        _refuse("input", f"must hold 1 to {MAX_TEXTS} texts, not {len(value)}", code="invalid_size")
    for index, text in enumerate(value):
        _check_text(f"input[{index}]", text)
    return tuple(value)


def _check_text(param: str, text: object) -> None:
    if not isinstance(text, str):
        _refuse(param, "must be a string: this model takes no token ids", code="invalid_type")
    if not text:
        _refuse(param, "must not be empty", code="empty_string")
    if len(text) > MAX_TEXT_LENGTH:
        _refuse(param, f"is longer than {MAX_TEXT_LENGTH} characters", code="string_too_long")


def _refuse(param: str, rule: str, *, code: str) -> NoReturn:
    raise InvalidRequestError(f"'{param}' {rule}", param=param, code=code)


@attrs.define(eq=False)
class _Server:
    """The endpoints, and the one accelerator they share."""

    model: ReadingsModel
    pretend_s: float
    pretend_per_text_s: float
    max_waiting: int
    _accelerator: trio.Lock = attrs.field(factory=trio.Lock, init=False)

    async def embeddings(self, request: Request) -> Response:
        asked = parse_request(await read_body(request, limit_bytes=MAX_BODY_BYTES))
        waiting = self._accelerator.statistics().tasks_waiting
        if waiting >= self.max_waiting:
            raise HTTPException(503, f"{waiting} calls wait already", headers={"retry-after": "1"})
        async with self._turn(request):
            cost_s = self.pretend_s + self.pretend_per_text_s * len(asked.texts)
            done_at = trio.current_time() + cost_s
            vectors = await self._embed(asked)
            await trio.sleep_until(done_at)
        return json_response(_answer(asked, vectors))

    @asynccontextmanager
    async def _turn(self, request: Request) -> AsyncIterator[None]:
        """Wait for the accelerator and have it while the block runs.

        Raises:
            ClientDisconnect: the client went away before its turn.
        """
        taken = False
        try:
            async with trio.open_nursery() as nursery:

                async def cancel_when_client_is_gone() -> None:
                    # The body was read: all that can still come is http.disconnect.
                    await request.receive()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(cancel_when_client_is_gone)
                await self._accelerator.acquire()
                taken = True
                nursery.cancel_scope.cancel()
            if not taken:  # asked of the state, not of the scope: both can happen in one go
                raise ClientDisconnect
            yield
        finally:
            if taken:
                self._accelerator.release()

    async def _embed(self, asked: EmbeddingRequest) -> list[tuple[float, ...]]:
        vectors: list[tuple[float, ...]] = []
        characters = 0
        for index, text in enumerate(asked.texts):
            characters += len(text)
            if characters > _SLICE_CHARACTERS:
                await trio.lowlevel.checkpoint()
                characters = 0
            try:
                vectors.append(self.model.embed_text(text))
            except ReadingsError as error:
                param = asked.param(index)
                raise InvalidRequestError(
                    f"'{param}': {error}", param=param, code="invalid_readings"
                ) from error
        await trio.lowlevel.checkpoint()
        return vectors

    async def models(self, _: Request) -> Response:
        await trio.lowlevel.checkpoint()
        model = {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "stationmaster"}
        return json_response({"object": "list", "data": [model]})

    async def health(self, _: Request) -> Response:
        await trio.lowlevel.checkpoint()
        lock = self._accelerator.statistics()
        running = int(lock.locked)
        return json_response({"status": "ok", "running": running, "waiting": lock.tasks_waiting})


def model_app(
    *,
    pretend_s: float = 0.0,
    pretend_per_text_s: float = 0.0,
    model: ReadingsModel | None = None,
    max_waiting: int = DEFAULT_MAX_WAITING,
) -> Starlette:
    """Make the ASGI app.

    Args:
        pretend_s: seconds that a call takes at least.
        pretend_per_text_s: seconds that each of its texts adds.
        model: the built-in one, without ranges, if None.
        max_waiting: calls that may wait for the accelerator; the next is told 503.
    """
    server = _Server(
        model=model or ReadingsModel(),
        pretend_s=pretend_s,
        pretend_per_text_s=pretend_per_text_s,
        max_waiting=max_waiting,
    )
    return Starlette(
        routes=[
            Route("/v1/embeddings", server.embeddings, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/health", server.health),
        ],
        exception_handlers=error_handlers(_error),
    )


async def run_model_server(
    host: str, port: int, *, pretend_s: float = 0.0, pretend_per_text_s: float = 0.0
) -> None:
    """Serve the model until SIGTERM or SIGINT; see `stationmaster.service.asgi.serve_until_told`.

    Raises:
        ListenError: the address is not to be had.
    """
    app = model_app(pretend_s=pretend_s, pretend_per_text_s=pretend_per_text_s)
    await serve_until_told(app, host=host, port=port)


def _answer(asked: EmbeddingRequest, vectors: Sequence[Sequence[float]]) -> dict[str, object]:
    characters = sum(map(len, asked.texts))  # the model has no tokens; these are its nearest kin
    return {
        "object": "list",
        "model": MODEL_NAME,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if asked.as_base64 else vector,
            }
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": characters, "total_tokens": characters},
    }


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector)).decode("ascii")


def _brief(text: str) -> str:
    """What a client sent, as far as an answer may repeat it."""
    return text if len(text) <= 64 else f"{text[:64]}..."


def _error(error: HTTPException) -> Response:
    known = error if isinstance(error, InvalidRequestError) else None
    content = {
        "message": error.detail,
        "type": "invalid_request_error" if error.status_code < 500 else "server_error",
        "param": known.param if known else None,
        "code": known.code if known else None,
    }
    return json_response({"error": content}, status=error.status_code, headers=error.headers)
