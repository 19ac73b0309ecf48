"""A handler with set-up and tear-down, tried without Kafka or a model server.

In a service it would be named in the configuration: `[stations] handler = "custom_handler:open_handler"`.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from stationmaster import Resources, StationInput, open_pipeline
from stationmaster.testing import MemorySource, RecordingSink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from stationmaster.abc import StationHandler


@asynccontextmanager
async def open_handler(resources: Resources) -> AsyncIterator[StationHandler]:
    """Give a handler that warns above a limit; here one would open a database, too."""
    limit = resources.options.get("limit", 100)

    async def handle(station: StationInput) -> Mapping[str, Any] | None:
        newest = station.readings[-1]
        if "pm25" not in newest:
            return None  # nothing to report
        return {"pm25": newest["pm25"], "alarm": newest["pm25"] > limit}

    await trio.lowlevel.checkpoint()
    yield handle


async def main() -> None:
    """Run one message through the handler."""
    source, sink = MemorySource(), RecordingSink()
    source.put(
        "air", 0, b'{"stationData": [{"stationId": "S001", "pm25": 140}, {"stationId": "S002"}]}'
    )
    source.end()
    async with open_handler(Resources(options={"limit": 75})) as handle:
        async with open_pipeline(source, handler=handle, sink=sink) as pipeline:
            await pipeline.wait_finished()
    for report in sink.reports.values():
        for result in report.results:
            print(result.station_id, result.outcome.value, result.value or result.reason)


if __name__ == "__main__":
    trio.run(main)
