"""A sink of one's own: batches become lines of a file, each batch id once."""

from __future__ import annotations

import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from stationmaster import BatchReport, StationInput, open_pipeline
from stationmaster.abc import Accepted, TryAgain, UploadAnswer
from stationmaster.reports import encode_report
from stationmaster.testing import MemorySource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


@attrs.define(eq=False)
class FileSink:
    """Appends each batch as one line of JSON. Made by `open_file_sink`."""

    file: trio.Path
    written: set[str] = attrs.field(factory=set)
    """Ids that lie in the file: a batch may come again, and must not be doubled."""

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        """Write one batch."""
        batch_id = report.batch.batch_id
        if batch_id in self.written:
            await trio.lowlevel.checkpoint()
            return Accepted()
        try:
            async with await self.file.open("ab") as stream:
                await stream.write(encode_report(report) + b"\n")
        except OSError as error:
            return TryAgain(reason=str(error))  # a full disk may pass: the pipeline tries again
        self.written.add(batch_id)
        return Accepted()


@asynccontextmanager
async def open_file_sink(path: Path) -> AsyncIterator[FileSink]:
    """Open the sink; a service would read the ids that the file holds already here."""
    await trio.lowlevel.checkpoint()
    yield FileSink(trio.Path(path))


async def handle(station: StationInput) -> Mapping[str, Any]:
    """Count the readings."""
    await trio.lowlevel.checkpoint()
    return {"readings": len(station.readings)}


async def main() -> None:
    """Write two batches to a file and show it."""
    source = MemorySource()
    source.put("air", 0, b'{"stationData": [{"stationId": "S001", "pm25": 4}]}')
    source.put(
        "air", 0, b'{"stationData": [{"stationId": "S001", "pm25": 5}, {"stationId": "S002"}]}'
    )
    source.end()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.jsonl"
        async with open_file_sink(path) as sink:
            async with open_pipeline(source, handler=handle, sink=sink) as pipeline:
                await pipeline.wait_finished()
        print(path.read_text(), end="")


if __name__ == "__main__":
    trio.run(main)
