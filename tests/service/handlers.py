"""Handlers that end-to-end tests name in their configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster import StationInput


async def brief(station: StationInput) -> Mapping[str, Any]:
    """Answer after 0.1 s."""
    await trio.sleep(0.1)
    return {"readings": len(station.readings)}


async def stuck(station: StationInput) -> Mapping[str, Any]:
    """Never answer."""
    await trio.sleep_forever()


NOT_A_HANDLER = 7
