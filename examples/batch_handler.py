"""The other kinds of handlers, and a result hook, tried without Kafka or a model server.

In a service they would be named in the configuration:
`[stations] handler = "batch_handler:handle_batch"`, `on_result = "batch_handler:on_result"`.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import trio

from stationmaster import Batch, StationInput, StationResult, open_pipeline
from stationmaster.testing import MemorySource, RecordingSink

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster.abc import Handler, Report


async def handle_batch(batch: Batch, report: Report) -> None:
    """Tell how far each station is from the mean of its batch: one call sees all stations."""
    newest = {station_id: readings[-1] for station_id, readings in batch.entries.items()}
    mean = statistics.fmean(reading["wind"] for reading in newest.values() if "wind" in reading)
    await trio.lowlevel.checkpoint()  # here one would ask a database, once for all
    for station_id, reading in newest.items():
        if "wind" in reading:
            report(station_id, {"above_mean": round(reading["wind"] - mean, 2)})
        else:
            report(station_id, LookupError("no wind in its reading"))


def handle_blocking(station: StationInput) -> Mapping[str, Any]:
    """Do the same work for one station, where blocking is no sin: in a thread."""
    return {"readings": len(station.readings)}


async def on_result(station: StationInput, result: StationResult) -> None:
    """Keep an older output going, one line per station, beside the upload."""
    await trio.lowlevel.checkpoint()
    print(f"  {station.station_id}: {result.outcome.value} {result.value or result.reason}")


async def run_one_message(handler: Handler) -> None:
    """Run one message through a handler of any kind."""
    source, sink = MemorySource(), RecordingSink()
    source.put(
        "air",
        0,
        b'{"stationData": [{"stationId": "S001", "wind": 7}, {"stationId": "S002", "wind": 4},'
        b' {"stationId": "S003"}]}',
    )
    source.end()
    async with open_pipeline(source, handler=handler, sink=sink, on_result=on_result) as pipeline:
        await pipeline.wait_finished()
    (report,) = sink.reports.values()
    print(f"  one upload of {sum(result.encoded != b'' for result in report.results)} results")


async def main() -> None:
    """Run both."""
    print("all stations in one call:")
    await run_one_message(handle_batch)
    print("each station in a thread:")
    await run_one_message(handle_blocking)


if __name__ == "__main__":
    trio.run(main)
