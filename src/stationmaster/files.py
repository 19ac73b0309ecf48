"""The file source: JSON Lines, plain or gzip, one record per line; for replays and backfills.

Topic: given, or the file's name without `.jsonl` and `.gz`. Partition 0, offset = line number from 0, record timestamp
= the message's own `timestamp`, else 0. These make the batch ids: a file that is read again, moved
or compressed, has the same ones, and so has another file with the same topic and times: that needs another topic.
"""

from __future__ import annotations

import errno
import gzip
import stat
import zlib
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import orjson
import trio

from stationmaster.batch import Record
from stationmaster.errors import SourceError
from stationmaster.messages import Limits, parse_timestamp
from stationmaster.offsets import Lease

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Sequence
    from typing import BinaryIO

    from stationmaster.abc import Withdrawn
    from stationmaster.batch import OffsetRange

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
# Read at one go: bounds memory, and how long a cancellation waits.
_SLICE_BYTES: Final = 4 * 1024 * 1024


@attrs.define(eq=False)
class FileSource:
    """A `stationmaster.abc.Source` with an end. Made by `open_file_source`."""

    topic: str
    _path: Path
    _file: BinaryIO | gzip.GzipFile
    _max_poll_messages: int
    _max_line_bytes: int
    _lease: Lease = attrs.field(init=False)
    _ready: list[Record] = attrs.field(factory=list, init=False)
    """Read, and not yet returned: stays here when `poll` is cancelled."""
    _line: int = attrs.field(default=0, init=False)
    _skipping: bool = attrs.field(default=False, init=False)
    """Inside a line that was too long and is already a record."""
    _at_end: bool = attrs.field(default=False, init=False)
    _error: SourceError | None = attrs.field(default=None, init=False)
    """Raised when what was read before it has been returned."""
    _closed: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        """One lease for the whole file."""
        self._lease = Lease(topic=self.topic, partition=0, generation=0)

    @property
    def accounted(self) -> int:
        """Lines from the file's beginning that are accounted for, without a gap. Kept in memory only."""
        return self._lease.watermark or 0

    async def poll(self) -> list[Record]:
        """Read the next lines: at least one, at most `max_poll_messages`. Reading is done in a worker thread.

        A line of more than `max_line_bytes` is cut one byte above that, so that its size refuses it; its rest is
        never in memory. An empty line is a record with an empty value.

        Raises:
            trio.EndOfChannel: every line was returned.
            SourceError: the file cannot be read, or is no valid gzip.
            trio.ClosedResourceError: the source was left.

        Cancellation loses no record; it waits until the slice is read (4 MiB at most).
        """
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._at_end:
                raise trio.EndOfChannel
            await trio.to_thread.run_sync(self._read_slice)
        records, self._ready = self._ready, []
        for record in records:
            self._lease.hand_out(record.offset)
        return records

    def account(self, offsets: OffsetRange, /) -> None:
        """Take note that these lines are accounted for; there is no commit that would outlive the process."""
        if (offsets.topic, offsets.partition, offsets.generation) == (self.topic, 0, 0):
            self._lease.account(offsets.first, offsets.last)

    def watch_withdrawals(
        self,
        on_withdrawn: Callable[[Withdrawn], None],
        /,
        *,
        on_leaving: Callable[[Withdrawn], Sequence[OffsetRange]] | None = None,
    ) -> None:
        """Never calls them: nobody takes a file's lines away."""

    def _read_slice(self) -> None:
        """Runs in a worker thread, while the polling task waits for it: the state is in one hand at a time."""
        left = _SLICE_BYTES
        longest = self._max_line_bytes
        try:
            while left > 0 and len(self._ready) < self._max_poll_messages:
                piece = self._file.readline(longest + 1)
                if not piece:
                    self._at_end = True
                    return
                left -= len(piece)
                ends = piece.endswith(b"\n")
                if not self._skipping:
                    self._ready.append(self._record(piece.rstrip(b"\r\n") if ends else piece))
                    self._line += 1
                self._skipping = not ends
        except (OSError, EOFError, zlib.error) as error:
            self._error = _unreadable(self._path, error, line=self._line)
            self._error.__cause__ = error

    def _record(self, line: bytes) -> Record:
        return Record(
            topic=self.topic,
            partition=0,
            offset=self._line,
            timestamp_ms=_own_timestamp_ms(line) if len(line) <= self._max_line_bytes else 0,
            value=line,
        )

    def close(self) -> None:
        """Close the file; further polls raise."""
        self._closed = True
        self._file.close()


def _own_timestamp_ms(line: bytes) -> int:
    try:
        message = orjson.loads(line)
    except orjson.JSONDecodeError:
        return 0
    moment = parse_timestamp(message.get("timestamp")) if isinstance(message, dict) else None
    return 0 if moment is None else (moment - _EPOCH) // _MILLISECOND


def _unreadable(path: Path, error: Exception, *, line: int) -> SourceError:
    where = f"{path}, after line {line}" if line else str(path)
    return SourceError(
        f"cannot read {where}: {error}. Check the path, its permissions and that it is whole"
    )


@asynccontextmanager
async def open_file_source(
    path: str | os.PathLike[str],
    *,
    topic: str | None = None,
    max_poll_messages: int = 500,
    max_line_bytes: int = Limits().message_bytes,
) -> AsyncIterator[FileSource]:
    """Open a JSON Lines file; a name that ends in `.gz` is read through gzip.

    Raises:
        SourceError: it cannot be opened.
    """
    file = Path(path)
    try:
        stream = await trio.to_thread.run_sync(_open, file)
    except OSError as error:
        raise _unreadable(file, error, line=0) from error
    source = FileSource(
        topic or file.name.removesuffix(".gz").removesuffix(".jsonl"),
        file,
        stream,
        max_poll_messages,
        max_line_bytes,
    )
    try:
        yield source
    finally:
        source.close()


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe could block the worker thread for ever
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
