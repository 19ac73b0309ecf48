"""The demo's handler: the built-in `embed`, with one station that hangs now and then and one that fails."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from stationmaster.handlers import embed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from stationmaster.abc import StationHandler
    from stationmaster.batch import StationInput
    from stationmaster.handlers import Resources

SLOW_STATION = "S004"
FAILING_STATION = "S009"
FIRST_FAULT = 5
"""The offset in partition 0 of the first message with faults."""


class SensorError(Exception):
    """What the failing station fails with."""


@asynccontextmanager
async def open_handler(resources: Resources) -> AsyncIterator[StationHandler]:
    """Give the handler: every sixteenth message of partition 0 finds a station that hangs and one that fails."""
    async with embed(attrs.evolve(resources, options={})) as embed_station:

        async def handle(station: StationInput) -> Mapping[str, Any] | None:
            message = station.message
            if message.partition == 0 and message.offset % 16 == FIRST_FAULT:
                if station.station_id == SLOW_STATION:
                    await trio.sleep_forever()
                if station.station_id == FAILING_STATION:
                    raise SensorError("the sensor's self-test failed with code 17")
            return await embed_station(station)

        yield handle
