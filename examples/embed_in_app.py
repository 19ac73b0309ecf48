"""The pipeline inside a trio program: batches from a source, a handler, a sink, and a batcher in front of a model.

Everything is in memory here, so that it runs alone; `open_kafka_source`, `open_openai_embedder` and `open_http_sink`
are opened the same way.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import trio

from stationmaster import PipelineSettings, StationInput, open_batcher, open_pipeline
from stationmaster.testing import MemorySource, RecordingSink, ScriptedEmbedder

if TYPE_CHECKING:
    from collections.abc import Mapping


async def main() -> None:
    """Send three messages of four stations through; one station hangs, its batches leave on time all the same."""
    source, sink = MemorySource(), RecordingSink()
    for number in range(3):
        entries = [{"stationId": f"S{n:03}", "temp": number + n} for n in range(4)]
        source.put("weather", 0, json.dumps({"stationData": entries}).encode())
    source.end()

    async with open_batcher(ScriptedEmbedder(seconds_per_call=0.02)) as batcher:

        async def handle(station: StationInput) -> Mapping[str, Any]:
            if station.station_id == "S003":
                await trio.sleep_forever()
            vector = await batcher.embed(f"temperature {station.readings[-1]['temp']}")
            return {"embedding": list(vector)}

        settings = PipelineSettings(deadline_s=0.5)
        async with open_pipeline(source, handler=handle, sink=sink, settings=settings) as pipeline:
            await pipeline.wait_finished()

        calls = batcher.statistics().calls

    for batch_id, report in sink.reports.items():
        missed = {
            result.station_id: result.outcome.value for result in report.results if not result.value
        }
        print(
            f"{batch_id}: closed by {report.closed_by.value} after {report.duration_s:.1f} s, "
            f"without {missed}"
        )
    print(f"{calls} calls to the model for 9 texts")


if __name__ == "__main__":
    trio.run(main)
