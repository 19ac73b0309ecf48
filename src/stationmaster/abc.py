"""The seams: what sources, handlers, sinks, stores, embedders and observers must be. Structural, nothing to inherit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import attrs

if TYPE_CHECKING:
    from stationmaster.batch import (
        Batch,
        BatchReport,
        DeadLetter,
        OffsetRange,
        Record,
        StationInput,
        StationResult,
    )
    from stationmaster.events import Event

StationHandler: TypeAlias = Callable[["StationInput"], Awaitable[Mapping[str, Any] | None]]
"""`async def handle(station) -> mapping, or None for "nothing to report"`.

It runs in its station's own task, one job at a time, in order. It is cancelled when its batch closes. What it raises
makes this station `failed` in this batch and harms nobody else. Tasks that outlive a job go into `station.nursery`.
"""

BlockingHandler: TypeAlias = Callable[["StationInput"], Mapping[str, Any] | None]
"""`def handle(station) -> mapping or None`: a plain function, called in a thread, where it may block.

When its batch closes it is left behind: nothing waits for it, but its station gets no other job before it really ends.
It may ask `trio.from_thread.check_cancelled()` now and then to end sooner.
"""


class Report(Protocol):
    """How a batch handler tells the answer of one station: a mapping, None, or an error that fails this station only.

    Never waits; to be called in trio's thread. What is reported after the batch was closed is counted and dropped.
    """

    def __call__(self, station_id: str, answer: Mapping[str, Any] | Exception | None, /) -> None:
        """Report one station.

        Raises:
            ValueError: the batch has no such station, or it was reported before. If the handler lets this go, the
                stations that were not yet reported fail.
        """
        ...


BatchHandler: TypeAlias = Callable[["Batch", Report], Awaitable[None]]
"""`async def handle_batch(batch, report)`: all stations of a batch in one call, reported as they come.

It is cancelled when its batch closes: at the deadline, at the quorum, and when the last station is reported. When it
returns or raises, the stations that it did not report are `failed`.
"""

Handler: TypeAlias = StationHandler | BlockingHandler | BatchHandler
"""Told apart by `async` and by the number of parameters, see `stationmaster.workers.kind_of`."""

ResultHook: TypeAlias = Callable[["StationInput", "StationResult"], Awaitable[None]]
"""`async def on_result(station, result)`: hears of each outcome that came while its batch was open.

See `stationmaster.result_hook` for when, and within which bounds.
"""

Vector: TypeAlias = Sequence[float]
"""One embedding: a buffer of float32 (`memoryview`, format "f") where it came as base64, else a list of floats."""


Withdrawn: TypeAlias = Collection[tuple[str, int, int]]
"""(topic, partition, generation) of partitions that left this process."""


class Source(Protocol):
    """Where records come from. Opened by an `async with open_...()`; one task polls it."""

    async def poll(self) -> Sequence[Record]:
        """Wait for the next records: at least one, in order within each partition, bounded in number.

        Raises:
            trio.EndOfChannel: the source is bounded and at its end.
            SourceError: it cannot go on.

        Cancellation loses no record: what was not returned comes with the next call.
        """
        ...

    def account(self, offsets: OffsetRange, /) -> None:
        """Take note that these offsets are uploaded, kept elsewhere, or dead letters. Never waits, never raises.

        `first` and `last` are offsets of polled records. Ranges may come in any order; they do not overlap, but one may
        enclose records that were accounted for before.
        The contiguous prefix of accounted offsets is committed in the course of time and when the source closes.
        Ranges of an older generation are dropped.
        """
        ...

    def watch_withdrawals(
        self,
        on_withdrawn: Callable[[Withdrawn], None],
        /,
        *,
        on_leaving: Callable[[Withdrawn], Sequence[OffsetRange]] | None = None,
    ) -> None:
        """From now on call these in trio's thread whenever partitions are taken away.

        Args:
            on_withdrawn: gets what can no longer be committed: every (topic, partition, generation) that left, after
                its drain if there was one.
            on_leaving: gets the same at the beginning of a drain, and returns what was polled of it and is not begun
                yet, single records in order: the drain need not wait for those, they will not be accounted for.

        Both must be quick and not raise. At most one watcher.
        """
        ...


@attrs.frozen(kw_only=True)
class Accepted:
    """The target took the batch (2xx, or a code that the configuration counts as such)."""

    status: int = 200
    sent_bytes: int = attrs.field(default=0, eq=False)
    """Size of what was sent; 0 where a sink has no such thing."""


@attrs.frozen(kw_only=True)
class Rejected:
    """The target refuses this very batch for good (400, 413, 422): sending it again cannot help."""

    status: int
    answer: str
    """The first 2 KiB of what it said."""


@attrs.frozen(kw_only=True)
class TryAgain:
    """A passing trouble: 408, 409, 425, 429, 5xx, or the network."""

    reason: str
    retry_after_s: float | None = None
    status: int | None = attrs.field(default=None, eq=False)
    """Of the answer; None: there was none."""


@attrs.frozen(kw_only=True)
class Unavailable:
    """The target refuses everybody (401, 403, 404, 405, 3xx): a wrong token or URL. Somebody must mend it."""

    reason: str
    status: int | None = attrs.field(default=None, eq=False)
    """Of the answer, if the sink has such a thing."""


UploadAnswer: TypeAlias = Accepted | Rejected | TryAgain | Unavailable


class Sink(Protocol):
    """Where closed batches go."""

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        """Send one batch once. Retrying is the caller's business.

        Must accept the same `report.batch.batch_id` again without doubling it (at-least-once). Errors of the target
        are answers; what is raised is a bug and ends the pipeline. May be called by several tasks at once. If
        cancelled, the batch may or may not have arrived.
        """
        ...


class BodySink(Sink, Protocol):
    """A sink that can also send a body that was kept: what an outbox needs to deliver later."""

    async def send(self, batch_id: str, body: bytes, /) -> UploadAnswer:
        """Send the body of one batch once: like `upload`, with what `reports.encode_report` made of its report."""
        ...


class Outbox(Protocol):
    """A durable place for batches that the target does not take now. It delivers them later by itself.

    It also knows whether the target is down: the uploader tells it what the target answers.
    """

    @property
    def is_diverting(self) -> bool:
        """The target is known to be down: put batches here rather than try."""
        ...

    def note(self, answer: UploadAnswer, /) -> None:
        """Take note of what the target answered to a direct upload. Never waits, never raises."""
        ...

    def holds(self, batch_id: str, /) -> bool:
        """Tell whether this batch lies here already (from before a crash): then it need not be uploaded."""
        ...

    async def put(self, report: BatchReport, /, *, reason: str) -> None:
        """Keep a batch: durable when this returns, nothing is kept when this raises. An id that is held is kept once.

        Raises:
            StoreError: there is no room, or the disk fails.

        Once the write began, cancellation waits for its end and this returns: the caller knows what became of it.
        """
        ...

    async def wait_change(self) -> None:
        """Wait until a `put` that was refused, or an upload that was given up, may go better; a few seconds at most."""
        ...


class DeadLetters(Protocol):
    """A durable place for what cannot be used."""

    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        """Keep all of them: durable when this returns. A letter that is held already is kept once.

        Raises:
            StoreError: there is no room, or the disk or broker fails; keep the same letters again later.

        Once the write began, cancellation waits for its end (a broker's: for a bounded time).
        """
        ...


class Embedder(Protocol):
    """Anything that turns a list of texts into a list of vectors."""

    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        """Embed the texts in one call.

        Args:
            texts: at least one non-empty text.

        Returns:
            One vector per text, same order, all of one dimension.

        Raises:
            EmbedderError: see `stationmaster.errors` for the kinds.

        Honours the caller's cancel scopes; if cancelled, the call is given up and its connection closed.
        """
        ...


class Observer(Protocol):
    """Hears what happens: the one seam for logs, metrics, status pages and tests.

    Called synchronously on the loop: be quick, do not block. It must not raise: an error here is a bug and ends the
    pipeline.
    """

    @property
    def detailed(self) -> bool:
        """Whether events of every single station and row are wanted too (they cost time)."""
        ...

    def observe(self, event: Event, /) -> None:
        """Take note of one event."""
        ...


@attrs.frozen
class NullObserver:
    """Hears nothing: the default."""

    detailed: bool = False

    def observe(self, event: Event, /) -> None:
        """Ignore it."""
