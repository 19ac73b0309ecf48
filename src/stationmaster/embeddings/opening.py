"""Opens several model servers of one kind as one embedder."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

import trio

from stationmaster.embeddings.endpoints import Endpoints
from stationmaster.embeddings.openai import open_openai_embedder
from stationmaster.embeddings.tei import LEARN_S, TeiBudget, TeiEmbedder, open_tei_embedder
from stationmaster.errors import EmbedderError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from stationmaster.abc import Observer
    from stationmaster.embeddings.openai import Encoding, OpenAIEmbedder

Api: TypeAlias = Literal["openai", "tei"]


@asynccontextmanager
async def open_endpoints(
    urls: Sequence[str],
    *,
    model: str,
    api: Api = "openai",
    key: str | None = None,
    dimensions: int | None = None,
    encoding: Encoding = "base64",
    max_in_flight: int = 4,
    timeout_s: float = 30.0,
    breaker_failures: int = 3,
    breaker_probe_s: float = 1.0,
    ssl_context: ssl.SSLContext | None = None,
    observer: Observer | None = None,
) -> AsyncIterator[Endpoints]:
    """Open model servers that serve the same model as one embedder.

    Args:
        urls: of the servers, each different: see `open_openai_embedder` and `open_tei_embedder`.
        model: the model's name; "tei" has no use for it.
        api: "openai" (`POST {url}/embeddings`) or "tei" (`POST {url}/embed`). The latter are asked for their limits
            first, for two seconds at most; who does not answer is asked again by its first call.
        key: sent to all of them as `Authorization: Bearer`; never shown.
        dimensions: what every vector must have; if None, the first answer of any of them fixes it for all.
        encoding: what to ask for, with "openai".
        max_in_flight: calls to one server at the same time, each with a connection of its own.
        timeout_s: for one call.
        breaker_failures: failed calls in a row after which a server is left alone.
        breaker_probe_s: seconds for which it is left alone before one call tries it again.
        ssl_context: whom to trust; the system's certificate authorities if None.
        observer: hears of servers that fail, pause or work again.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if isinstance(urls, str):
        raise TypeError("urls is a sequence of URLs, not one text")
    if api not in {"openai", "tei"}:
        raise ValueError(f"api must be openai or tei, not {api!r}")
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ValueError("the URLs of the model servers must be different")

    def open_one(url: str) -> AbstractAsyncContextManager[OpenAIEmbedder | TeiEmbedder]:
        if api == "tei":
            return open_tei_embedder(
                url,
                key=key,
                dimensions=dimensions,
                connections=max_in_flight,
                timeout_s=timeout_s,
                ssl_context=ssl_context,
            )
        return open_openai_embedder(
            url,
            model=model,
            key=key,
            dimensions=dimensions,
            encoding=encoding,
            connections=max_in_flight,
            timeout_s=timeout_s,
            ssl_context=ssl_context,
        )

    async with AsyncExitStack() as stack:
        embedders = {url: await stack.enter_async_context(open_one(url)) for url in urls}
        for embedder in embedders.values():
            embedder.server.keeps_dimensions = False  # `Endpoints` keeps one for all
        tei = [embedder for embedder in embedders.values() if isinstance(embedder, TeiEmbedder)]
        budget = await _learn(tei)
        yield Endpoints(
            embedders,
            max_in_flight=max_in_flight,
            failures=breaker_failures,
            probe_s=breaker_probe_s,
            dimensions=dimensions,
            max_rows=budget.max_rows,
            max_tokens=budget.max_tokens,
            observer=observer,
        )


async def _learn(embedders: Sequence[TeiEmbedder]) -> TeiBudget:
    """Return what each of those that say so takes."""
    with trio.move_on_after(LEARN_S):
        async with trio.open_nursery() as nursery:
            for embedder in embedders:
                nursery.start_soon(_try_to_learn, embedder)
    budgets = [embedder.budget for embedder in embedders if embedder.budget is not None]
    rows = [one.max_rows for one in budgets if one.max_rows is not None]
    tokens = [one.max_tokens for one in budgets if one.max_tokens is not None]
    return TeiBudget(max_rows=min(rows, default=None), max_tokens=min(tokens, default=None))


async def _try_to_learn(embedder: TeiEmbedder) -> None:
    try:
        await embedder.learn()
    except EmbedderError:
        return  # noqa: ASYNC910 - asking is a checkpoint; the first call asks again, and says what is wrong
