"""One batch through a handler, by the pipeline itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stationmaster.pipeline import open_pipeline
from stationmaster.testing.clock import refuse_jumping_clock, told_if_clock_jumps_over_threads
from stationmaster.testing.sink import RecordingSink
from stationmaster.testing.source import MemorySource
from stationmaster.testing.state import MemoryDeadLetters
from stationmaster.workers import kind_of

if TYPE_CHECKING:
    from stationmaster.abc import Handler, Observer, ResultHook
    from stationmaster.batch import BatchReport
    from stationmaster.settings import PipelineSettings


async def run_batch(
    handler: Handler,
    message: bytes,
    /,
    *,
    topic: str = "test",
    settings: PipelineSettings | None = None,
    on_result: ResultHook | None = None,
    observer: Observer | None = None,
) -> BatchReport:
    """Run one batch through a handler, as the service does it, and return what would be uploaded.

    The stations' tasks and threads, deadline, quorum and limits are the real ones; source and sink are in memory. For
    more than one batch join `MemorySource` and `RecordingSink` by `stationmaster.open_pipeline`.

    Args:
        handler: of any kind. What a factory makes is opened before.
        message: a whole message, see `telemetry`.
        topic: where it comes from.
        settings: the deadline (5 s by default), the quorum and so on.
        on_result: has heard everything when this returns.
        observer: hears what happens.

    Raises:
        ValueError: the message is refused, or names no station.
        RuntimeError: the clock is one that jumps, and the handler is a plain function, which works in a thread, or
            uses `trio.to_thread` itself, with the default limiter, and time went by meanwhile.
        TypeError: the handler is of no kind that is known.

    What ends a service (a MemoryError of the handler, say) comes out as itself. If this is cancelled, the batch may end
    within `settings.grace_s`, as in a service.
    """
    if kind_of(handler) == "blocking":
        refuse_jumping_clock("a handler that is a plain function works in a thread")
    source, sink, letters = MemorySource(), RecordingSink(), MemoryDeadLetters()
    source.put(topic, 0, message)
    source.end()
    with told_if_clock_jumps_over_threads():
        async with open_pipeline(
            source,
            handler=handler,
            sink=sink,
            dead_letters=letters,
            settings=settings,
            on_result=on_result,
            observer=observer,
        ) as pipeline:
            await pipeline.wait_finished()
    for letter in letters.letters:
        raise ValueError(f"the message is refused: {letter.reason} ({letter.detail})")
    if not sink.reports:
        raise ValueError("the message names no station: nothing is uploaded")
    [report] = sink.reports.values()
    return report
