from __future__ import annotations

import gzip
import os
from typing import TYPE_CHECKING

import pytest
import trio

from stationmaster import files
from stationmaster.errors import SourceError
from stationmaster.files import open_file_source

if TYPE_CHECKING:
    from pathlib import Path

    from stationmaster.batch import Record
    from stationmaster.files import FileSource


async def read_all(source: FileSource, until: type[Exception] = trio.EndOfChannel) -> list[Record]:
    records: list[Record] = []
    try:
        while True:
            records += await source.poll()
    except until:
        return records


async def test_the_topic_is_the_name_without_its_suffixes_unless_one_is_given(
    tmp_path: Path,
) -> None:
    for name in ("wind.jsonl", "wind.jsonl.gz", "wind"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"{}\n") if name.endswith("gz") else b"{}\n")
        async with open_file_source(path) as source:
            assert source.topic == "wind"
            assert [record.topic for record in await read_all(source)] == ["wind"]
        async with open_file_source(path, topic="solar") as source:
            assert [record.topic for record in await read_all(source)] == ["solar"]


@pytest.mark.parametrize(
    ("line", "timestamp_ms"),
    [
        (b'{"timestamp": "2024-05-01T12:00:00.5Z"}', 1_714_564_800_500),
        (b'{"timestamp": 1714564800123}', 1_714_564_800_123),
        (b'{"timestamp": "yesterday"}', 0),
        (b"{}", 0),
        (b"[1]", 0),
        (b"not json", 0),
        (b"\xff", 0),
        (b"", 0),
    ],
)
async def test_the_records_time_is_the_messages_own(
    tmp_path: Path, line: bytes, timestamp_ms: int
) -> None:
    path = tmp_path / "wind.jsonl"
    path.write_bytes(line + b"\n")
    async with open_file_source(path) as source:
        (record,) = await source.poll()
    assert (record.value, record.timestamp_ms, record.offset) == (line, timestamp_ms, 0)


async def test_line_ends_are_no_part_of_the_value_and_the_last_may_be_missing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "wind.jsonl"
    path.write_bytes(b"one\r\n\ntwo\n\r\nthree")
    async with open_file_source(path) as source:
        records = await read_all(source)
    assert [record.value for record in records] == [b"one", b"", b"two", b"", b"three"]
    assert [record.offset for record in records] == [0, 1, 2, 3, 4]


async def test_an_overlong_line_is_cut_just_above_the_limit_and_its_neighbours_are_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "wind.jsonl"
    path.write_bytes(b"a" * 10 + b"\n" + b"b" * 11 + b"\n" + b"c" * 1000 + b"\n" + b"d")
    async with open_file_source(path, max_line_bytes=10) as source:
        records = await read_all(source)
    assert [record.value for record in records] == [b"a" * 10, b"b" * 11, b"c" * 11, b"d"]
    assert [record.offset for record in records] == [0, 1, 2, 3]


async def test_a_line_without_end_is_skipped_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SLICE_BYTES", 100)
    path = tmp_path / "wind.jsonl"
    path.write_bytes(b"x" * 5000 + b"\nlast\n")
    async with open_file_source(path, max_line_bytes=10) as source:
        (cut,) = await source.poll()
        (last,) = await source.poll()
    assert cut.value == b"x" * 11
    assert (last.value, last.offset) == (b"last", 1)


async def test_one_poll_reads_a_bounded_slice_of_long_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SLICE_BYTES", 100)
    path = tmp_path / "wind.jsonl"
    path.write_bytes((b"x" * 49 + b"\n") * 10)
    async with open_file_source(path) as source:
        assert len(await source.poll()) == 2
        assert len(await read_all(source)) == 8


async def test_an_empty_file_is_at_its_end_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wind.jsonl"
    path.touch()
    async with open_file_source(path) as source:
        with pytest.raises(trio.EndOfChannel):
            await source.poll()
        assert source.accounted == 0


async def test_a_missing_file_is_a_source_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*nowhere\.jsonl: .*No such file"):
        async with open_file_source(tmp_path / "nowhere.jsonl"):
            pass


async def test_a_folder_or_a_pipe_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(SourceError, match="not a regular file"):
            async with open_file_source(path):
                pass


@pytest.mark.parametrize("damage", ["no gzip", "cut off", "garbled"])
async def test_a_damaged_gzip_gives_what_can_be_read_and_then_a_source_error(
    tmp_path: Path, damage: str
) -> None:
    lines = b"".join(b'{"number": %d}\n' % number for number in range(20_000))
    whole = gzip.compress(lines)
    garbled = bytearray(whole)
    garbled[len(whole) // 2] ^= 0xFF
    path = tmp_path / "wind.jsonl.gz"
    path.write_bytes(
        {"no gzip": lines, "cut off": whole[: len(whole) // 2], "garbled": bytes(garbled)}[damage]
    )
    async with open_file_source(path) as source:
        records = await read_all(source, until=SourceError)
        with pytest.raises(SourceError, match=r"cannot read .*wind\.jsonl\.gz"):
            await source.poll()
    assert [record.offset for record in records] == list(range(len(records)))
    assert bool(records) == (damage != "no gzip")


async def test_after_closing_a_poll_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wind.jsonl"
    path.write_bytes(b"{}\n")
    async with open_file_source(path) as source:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await source.poll()
