"""Fuzzed messages through the whole pipeline, on virtual time: poller, stations, batches, uploader, dead letters.

Every record must be accounted for: its stations in exactly one report that the target took or rejected, or a dead
letter with the reason that the parser has for it. And every offset is committed at the end.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from trio.testing import MockClock

from stationmaster.abc import Accepted, Rejected, TryAgain
from stationmaster.batch import Refusal
from stationmaster.messages import Limits, parse_message
from stationmaster.pipeline import open_pipeline
from stationmaster.reports import encode_report
from stationmaster.settings import PipelineSettings, TopicSettings
from stationmaster.testing import MemorySource
from tests.telemetry import record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stationmaster.abc import UploadAnswer
    from stationmaster.batch import BatchReport, DeadLetter, StationInput

CHUNK: Final = 2_000
"""Records of one run of a pipeline: what is remembered of them is bounded by that."""

Place = tuple[str, int, int]
"""Topic, partition, offset."""

_TOPICS: Final = ("message", "poll", "timestamp", "urgent")
_PARTITIONS: Final = 2
_LIMITS: Final = Limits(
    message_bytes=300_000, stations_per_message=1_000, station_id_chars=32, readings_bytes=16_384
)
_SETTINGS: Final = PipelineSettings(
    topics={
        "poll": TopicSettings(by="poll", quorum=0.5),
        "timestamp": TopicSettings(by="timestamp", roster=("S1",)),
        "urgent": TopicSettings(priority="high"),
    },
    limits=_LIMITS,
    upload_empty=True,
    result_bytes=1_000,
    group_id="fuzzing",
)
_HEADERS: Final[tuple[tuple[tuple[str, bytes | None], ...], ...]] = (
    (),
    (("traceparent", None),),
    (("traceparent", b"\xff"),),
    (("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("", b"")),
    (("traceparent", b"x" * 300), ("h", None)),
)


def _number(data: bytes) -> int:
    return zlib.crc32(data)


@attrs.define(eq=False)
class Ledger:
    """The target and the store of dead letters: takes note of what became of every record."""

    uploaded: dict[Place, BatchReport] = attrs.field(factory=dict)
    letters: dict[Place, DeadLetter] = attrs.field(factory=dict)
    rejected: set[str] = attrs.field(factory=set)
    """Ids of batches that the target rejected."""
    buried: set[str] = attrs.field(factory=set)
    """Ids of batches that are dead letters."""
    _tried: set[str] = attrs.field(factory=set)

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        """Take most batches, some at the second attempt; reject a few."""
        await trio.lowlevel.checkpoint()
        batch_id = report.batch.batch_id
        fate = _number(batch_id.encode()) % 40
        if fate == 0 and batch_id not in self._tried:
            self._tried.add(batch_id)
            return TryAgain(reason="busy", retry_after_s=1.0)
        for span in report.batch.ranges:
            for offset in range(span.first, span.last + 1):
                place = span.topic, span.partition, offset
                assert place not in self.uploaded, f"{place} is uploaded twice"
                self.uploaded[place] = report
        _check_report(report)
        if fate == 1:
            self.rejected.add(batch_id)
            return Rejected(status=422, answer="no")
        return Accepted()

    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        """Keep dead letters of records and of batches."""
        await trio.lowlevel.checkpoint()
        for letter in letters:
            if letter.batch_id:
                self.buried.add(letter.batch_id)
                continue
            place = letter.topic, letter.partition, letter.offset
            assert place not in self.letters, f"{place} is a dead letter twice"
            self.letters[place] = letter


def _check_report(report: BatchReport) -> None:
    """What is uploaded is JSON, names every expected station once, and counts them."""
    form = json.loads(encode_report(report), parse_constant=_no_constant)
    rows = [*form["results"], *form["unsuccessful"]]
    named = [row["stationId"] for row in rows]
    assert len(set(named)) == len(named) == form["counts"]["expected"]
    assert set(named) == {*report.batch.entries, *report.batch.roster}


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} was uploaded")


async def _handle(station: StationInput) -> Mapping[str, Any]:
    """Answer, or be one of the handlers that nobody wants; which one hangs on the station."""
    await trio.lowlevel.checkpoint()
    match _number(station.station_id.encode()) % 50:
        case 1:
            await trio.sleep(1)
        case 2:
            await trio.sleep_forever()
        case 3:
            raise ValueError(station.station_id)
        case 4:
            return {"half": "\ud800"}
        case 5:
            return {"large": "x" * 2_000}
        case 6:
            return {"stationId": "another", "fields": dict(station.fields)}
        case _:
            pass
    return {"readings": station.readings}


def run_pipeline(values: Sequence[bytes | None]) -> Counter[str]:
    """Pass the values through a pipeline of its own, and balance the books.

    Returns:
        How many records came to which end.
    """
    source = MemorySource(max_poll_messages=200)
    ledger = Ledger()
    sent: dict[Place, bytes | None] = {}
    ends: Counter[tuple[str, int]] = Counter()
    for value in values:
        number = _number(value or b"")
        topic, partition = _TOPICS[number % 4], number // 4 % _PARTITIONS
        offset = source.put(
            topic,
            partition,
            value,
            timestamp_ms=1_700_000_000_000 + number % 7,
            headers=_HEADERS[number // 16 % len(_HEADERS)],
        )
        sent[topic, partition, offset] = value
        ends[topic, partition] = offset + 1
    source.end()

    async def main() -> None:
        async with open_pipeline(
            source, handler=_handle, sink=ledger, dead_letters=ledger, settings=_SETTINGS
        ) as pipeline:
            await pipeline.wait_finished()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert source.committed == ends, "not all offsets are committed"
    assert ledger.buried == ledger.rejected
    return Counter(_end_of(place, value, ledger) for place, value in sent.items())


def _end_of(place: Place, value: bytes | None, ledger: Ledger) -> str:
    """Return what became of a record; the parser says what should have."""
    topic, partition, offset = place
    parsed = parse_message(record(value, topic=topic, partition=partition, offset=offset), _LIMITS)
    letter, report = ledger.letters.get(place), ledger.uploaded.get(place)
    if isinstance(parsed, Refusal):
        assert letter is not None, f"{place} is lost: {parsed.reason}"
        assert letter.reason == parsed.reason
        assert letter.value == value
        assert report is None, f"{place} is refused and uploaded"
        return parsed.reason
    assert report is not None, f"{place} is lost: {len(parsed.station_ids)} stations"
    assert letter is None, f"{place} is uploaded and a dead letter"
    assert report.batch.entries.keys() >= set(parsed.station_ids)
    return "rejected-upload" if report.batch.batch_id in ledger.rejected else "uploaded"
