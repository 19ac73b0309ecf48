"""Real readings replayed with a set of stations that changes from message to message: nobody waits for the absent.

The packaged messages are thinned out so that about half of the stations are absent each time. A whole file of messages:
`STATIONMASTER_REPLAY=air70.jsonl.gz python -m pytest tests/test_pipeline_replay.py`.
"""

from __future__ import annotations

import gzip
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import trio

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.events import EmptyBatch
from stationmaster.pipeline import open_pipeline
from stationmaster.service.producer import read_packaged_messages
from stationmaster.settings import PipelineSettings, TopicSettings
from stationmaster.testing import MemorySource, RecordingObserver, RecordingSink

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio.testing import MockClock

    from stationmaster.batch import StationInput


def messages() -> Sequence[bytes]:
    whole = os.environ.get("STATIONMASTER_REPLAY")
    if whole is not None:
        return gzip.decompress(Path(whole).read_bytes()).splitlines()
    dice = random.Random(0)
    thinned = []
    for value in read_packaged_messages():
        form = orjson.loads(value)
        form["stationData"] = [each for each in form["stationData"] if dice.random() < 0.5]
        thinned.append(orjson.dumps(form))
    return thinned


async def handle(station: StationInput) -> Mapping[str, Any]:
    await trio.sleep(0.02)
    return {"readings": len(station.readings)}


@pytest.mark.parametrize("with_roster", [False, True])
async def test_not_one_batch_closes_by_its_deadline_whoever_is_absent(
    with_roster: bool, autojump_clock: MockClock
) -> None:
    values = messages()
    present = [
        {entry["stationId"] for entry in orjson.loads(value)["stationData"]} for value in values
    ]
    roster = sorted(set.union(*present))
    source, sink, observer = MemorySource(), RecordingSink(), RecordingObserver(detailed=False)
    for value in values:
        source.put("air", 0, value)
    source.end()
    topic = TopicSettings(roster=roster if with_roster else None)
    settings = PipelineSettings(by="message", deadline_s=5.0, topics={"air": topic})
    async with open_pipeline(
        source, handler=handle, sink=sink, settings=settings, observer=observer
    ) as pipeline:
        await pipeline.wait_finished()

    reports = {report.batch.ranges[0].first: report for report in sink.reports.values()}
    assert len(reports) + len(observer.of(EmptyBatch)) == len(values)
    for offset, report in reports.items():
        assert report.closed_by is ClosedBy.COMPLETE
        assert report.duration_s < 2.5  # nobody came near the deadline
        counts = {outcome: n for outcome, n in report.counts.items() if n}
        absent = len(roster) - len(present[offset]) if with_roster else 0
        expected = {Outcome.SUCCEEDED: len(present[offset])}
        assert counts == expected | ({Outcome.MISSING: absent} if absent else {})
    missing = sum(report.counts[Outcome.MISSING] for report in reports.values())
    assert (missing > 0.4 * len(reports) * len(roster)) == with_roster
    assert source.committed == {("air", 0): len(values)}
