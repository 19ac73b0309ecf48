"""The sink that posts closed batches over HTTP, in the form of `reports`.

What an answer means:

    2xx, or a code counted as such    accepted
    400, 413, 422                     this batch is rejected for good
    401, 403, 404, 405, 3xx           unavailable: token or URL are wrong, for every batch
    anything else, network trouble    try again, after `Retry-After` if it is given
"""

from __future__ import annotations

import gzip
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias
from urllib.parse import quote

import attrs
import trio

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.http import HttpError, open_http_client
from stationmaster.http_words import bearer, error_text, hide, parse_retry_after
from stationmaster.reports import encode_report

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Collection, Mapping

    from stationmaster.abc import UploadAnswer
    from stationmaster.batch import BatchReport
    from stationmaster.http import HttpAnswer, HttpClient

Compression: TypeAlias = Literal["none", "gzip"]

_REJECTED_ANSWER_CHARS = 2048
_COMPRESS_HERE_BYTES = 64 * 1024
"""Compressing this much takes about 2 ms, as long as the loop may be held up; more goes to a thread."""
_GZIP_LEVEL = 4
_HEADER_SAFE = "!#$&'()*+,-./:;<=>?@[]^_`{|}~"
"""Stands in an `Idempotency-Key` as it is, like letters and digits; all else as %XX, so that no two ids are alike."""


@attrs.define(eq=False)
class HttpSink:
    """Posts every batch to one URL; made by `open_http_sink`."""

    _client: HttpClient
    _token: str | None = attrs.field(repr=False)
    _compression: Compression
    _accepted: frozenset[int]
    _threads: trio.CapacityLimiter = attrs.field(repr=False)
    _more_headers: Callable[[], Mapping[str, str]] | None = attrs.field(repr=False)

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        """Post the batch once, and say what the answer means."""
        return await self.send(report.batch.batch_id, encode_report(report))

    async def send(self, batch_id: str, body: bytes, /) -> UploadAnswer:
        """Post a body once, with the batch's id as `Idempotency-Key`, and say what the answer means."""
        content = body
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": quote(batch_id, safe=_HEADER_SAFE),
        }
        if self._more_headers is not None:
            headers.update(self._more_headers())
        if self._compression == "gzip":
            headers["Content-Encoding"] = "gzip"
            content = await self._compress(content)
        try:
            answer = await self._client.request("POST", content=content, headers=headers)
        except HttpError as error:
            return TryAgain(reason=str(error))  # noqa: ASYNC910 -- the request was a checkpoint
        return self._meaning(answer, sent_bytes=len(content))

    async def _compress(self, content: bytes) -> bytes:
        compress = partial(gzip.compress, content, _GZIP_LEVEL, mtime=0)
        if len(content) <= _COMPRESS_HERE_BYTES:
            await trio.lowlevel.checkpoint()
            return compress()
        return await trio.to_thread.run_sync(
            compress, abandon_on_cancel=True, limiter=self._threads
        )

    def _meaning(self, answer: HttpAnswer, *, sent_bytes: int) -> UploadAnswer:
        status = answer.status
        if 200 <= status < 300 or status in self._accepted:
            return Accepted(status=status, sent_bytes=sent_bytes)
        if status in {400, 413, 422}:
            said = hide(answer.body.decode("utf-8", "backslashreplace"), self._token)
            return Rejected(status=status, answer=said[:_REJECTED_ANSWER_CHARS])
        words = error_text(answer.body, secret=self._token) or "no words"
        reason = f"{self._client.where} answered {status}: {words}"
        if status in {401, 403, 404, 405} or 300 <= status < 400:
            return Unavailable(reason=f"{reason}. Check the URL and the token", status=status)
        wait_s = parse_retry_after(answer.headers.get("retry-after"), now=time.time())
        return TryAgain(reason=reason, retry_after_s=wait_s, status=status)


@asynccontextmanager
async def open_http_sink(
    url: str,
    *,
    token: str | None = None,
    connections: int = 8,
    compression: Compression = "none",
    accepted: Collection[int] = (),
    attempt_timeout_s: float = 10.0,
    ssl_context: ssl.SSLContext | None = None,
    more_headers: Callable[[], Mapping[str, str]] | None = None,
) -> AsyncIterator[HttpSink]:
    """Open a sink that posts every batch to `url`, as JSON in the form of `stationmaster.reports`.

    Args:
        url: http or https.
        token: sent as `Authorization: Bearer`; never shown.
        connections: how many uploads may be under way at once.
        compression: of the body, told by `Content-Encoding`.
        accepted: statuses that mean "taken" beside 2xx: 409 for a target that says so of an id it already has.
        attempt_timeout_s: for one attempt, from having a connection to the answer.
        ssl_context: whom to trust; the system's certificate authorities if None.
        more_headers: called once for each request, in the task that uploads: what it returns is sent beside the others.

    Raises:
        ValueError: an argument is wrong.

    The target should take the first body of an `Idempotency-Key` and accept further ones without doubling: a batch is
    sent again whenever its answer was not received.
    """
    if compression not in {"none", "gzip"}:
        raise ValueError(f"compression must be none or gzip, not {compression!r}")
    async with open_http_client(
        url,
        connections=connections,
        headers=None if token is None else bearer(token),
        timeout_s=attempt_timeout_s,
        ssl_context=ssl_context,
    ) as client:
        # A thread for each connection is as much as can be sent.
        threads = trio.CapacityLimiter(connections)
        yield HttpSink(client, token, compression, frozenset(accepted), threads, more_headers)
