"""The event streams: what they tell, how they end, and what a slow or greedy client costs."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import attrs
import httpx
import orjson
import trio
import trio.testing

from stationmaster.batch import Outcome, StationResult
from stationmaster.events import UploadDone
from stationmaster.service import asgi
from stationmaster.service.status import StatusBoard
from stationmaster.service.web.broadcast import Broadcast
from tests.raw_http import open_raw, read_all, read_until
from tests.service.standing import kafka
from tests.service.test_status import closed, report
from tests.service.test_web import open_bare
from tests.watched import open_watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pytest

    from stationmaster.kafka import KafkaStatistics

GET = b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n"


@attrs.define(eq=False)
class Picture:
    """What a reader of the events knows: takes them as the page does."""

    slots: dict[int, tuple[str, str]] = attrs.field(factory=dict)
    reports: dict[int, dict[str, Any]] = attrs.field(factory=dict)
    state: dict[str, Any] = attrs.field(factory=dict)
    heard: list[str] = attrs.field(factory=list)

    def take(self, piece: bytes) -> None:
        for part in piece.decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in part.splitlines())
            if "event" not in lines:
                self.heard += [name for name in lines if name != "retry"]
                continue
            self.heard.append(lines["event"])
            content = orjson.loads(lines["data"])
            match lines["event"]:
                case "whole":
                    self.slots.clear()
                    self.reports.clear()
                case "state":
                    self.state = content
                case "reports":
                    self.reports.update({one["number"]: one for one in content})
                case "stations" if "slots" in content:
                    self.slots.update({at: (name, code) for at, name, code in content["slots"]})
                case "stations":
                    rows = zip(content["ids"], content["codes"], strict=True)
                    self.slots.update(enumerate(rows, content["first"]))

    def take_all(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            self.take(piece)

    def is_like(self, board: StatusBoard) -> bool:
        return list(self.slots.values()) == list(board.stations.rows()) and sorted(
            self.reports
        ) == sorted(one["number"] for one in board.reports())


def many(count: int, outcome: Outcome = Outcome.SUCCEEDED) -> dict[str, Outcome]:
    return {f"S{number}": outcome for number in range(count)}


# ---------------------------------------------------------------------------------------------------------- broadcast


async def test_who_follows_sees_what_the_board_shows(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    board = StatusBoard()
    broadcast, picture = Broadcast(board), Picture()
    nursery.start_soon(broadcast.run)
    board.observe(closed(A=Outcome.SUCCEEDED, B=Outcome.FAILED))
    broadcast.join()
    seen = broadcast.edition
    picture.take_all(broadcast.whole())
    assert picture.is_like(board)

    for outcome in (Outcome.TIMED_OUT, Outcome.SUCCEEDED):
        board.observe(closed(B=outcome, C=Outcome.SUCCEEDED))
        last, seen = seen, await broadcast.wait_edition(seen)
        picture.take_all(broadcast.pieces(last))
        assert picture.is_like(board)
    board.observe(UploadDone(report=report(), attempts=1, seconds=0.1))
    last, seen = seen, await broadcast.wait_edition(seen)
    picture.take_all(broadcast.pieces(last))
    assert picture.reports[3]["upload"] == "uploaded"
    assert picture.heard.count("whole") == 1


async def test_who_missed_an_edition_gets_the_whole_picture_anew(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    board = StatusBoard()
    broadcast, picture = Broadcast(board), Picture()
    nursery.start_soon(broadcast.run)
    broadcast.join()
    first = await broadcast.wait_edition(0)
    second = first
    for outcome in (Outcome.FAILED, Outcome.SUCCEEDED):
        board.observe(closed(A=outcome))
        second = await broadcast.wait_edition(second)

    picture.take_all(broadcast.pieces(first))
    assert picture.heard == ["whole", "state", "reports", "stations"]
    assert picture.is_like(board)


async def test_nothing_is_made_while_nobody_looks_and_one_edition_for_all_who_do(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    board = StatusBoard()
    broadcast = Broadcast(board, 0.5)
    nursery.start_soon(broadcast.run)
    board.observe(closed())
    await trio.sleep(60)
    assert broadcast.edition == 0

    for _ in range(100):
        broadcast.join()
    for _ in range(100):
        board.observe(closed())
        await trio.sleep(0.1)
    assert 18 <= broadcast.edition <= 21

    for _ in range(100):
        broadcast.leave()
    await trio.sleep(1)
    last = broadcast.edition
    board.observe(closed())
    await trio.sleep(60)
    assert broadcast.edition == last


async def test_when_nothing_changes_there_is_a_sign_of_life_now_and_then(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broadcast, picture = Broadcast(StatusBoard()), Picture()
    nursery.start_soon(broadcast.run)
    broadcast.join()
    seen = await broadcast.wait_edition(0)
    began = trio.current_time()
    last, seen = seen, await broadcast.wait_edition(seen)
    assert trio.current_time() - began == 10.0
    assert b"".join(broadcast.pieces(last)) == b": still here\n\n"
    picture.take_all(broadcast.pieces(last))
    assert picture.heard == [""]


async def test_thousands_of_changes_at_once_come_as_ranges_in_bounded_pieces(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    board = StatusBoard()
    broadcast, picture = Broadcast(board), Picture()
    nursery.start_soon(broadcast.run)
    broadcast.join()
    seen = await broadcast.wait_edition(0)
    picture.take_all(broadcast.whole())
    board.observe(closed(**many(5_000)))
    last, seen = seen, await broadcast.wait_edition(seen)
    pieces = list(broadcast.pieces(last))
    picture.take_all(pieces)
    assert picture.is_like(board)
    assert len(pieces) == 12  # state, reports, ten ranges
    assert max(map(len, pieces)) < 10_000

    board.observe(closed(**many(1_500, Outcome.FAILED)))
    last, seen = seen, await broadcast.wait_edition(seen)
    pieces = list(broadcast.pieces(last))
    picture.take_all(pieces)
    assert picture.is_like(board)
    assert len(pieces) == 3


async def test_a_fault_in_the_picture_is_logged_and_the_next_one_is_told(
    autojump_clock: trio.testing.MockClock,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    board, faults = StatusBoard(), [RuntimeError("swordfish")]

    def broken_once() -> KafkaStatistics:
        if faults:
            raise faults.pop()
        return kafka()

    board.watch(kafka=broken_once)
    broadcast = Broadcast(board)
    nursery.start_soon(broadcast.run)
    broadcast.join()
    await broadcast.wait_edition(0)
    assert trio.current_time() == 0.5
    assert "swordfish" in caplog.text


# ------------------------------------------------------------------------------------------------------------- streams


async def follow(url: str, until: Callable[[Picture], bool]) -> Picture:
    """Read events from a server until the picture is so."""
    picture = Picture()
    async with open_raw(url) as stream:
        await stream.send_all(b"GET /api/events HTTP/1.0\r\n\r\n")  # 1.0: nothing is chunked
        rest = await read_until(stream, b"retry: ")
        head, _, rest = rest.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"content-type: text/event-stream; charset=utf-8" in head
        assert b"cache-control: no-store" in head
        assert b"transfer-encoding" not in head.lower()
        while not until(picture):
            chunk = await stream.receive_some()
            assert chunk, f"the stream ended: {picture}"
            *pieces, rest = (rest + chunk).split(b"\n\n")
            picture.take_all(pieces)
    return picture


def uploaded_all(picture: Picture) -> bool:
    return len(picture.slots) == 2 and [one["upload"] for one in picture.reports.values()] == [
        "uploaded"
    ]


async def test_a_client_follows_a_running_pipeline() -> None:
    async with open_watched(interval_s=0.01) as watched:
        watched.send("A", "B", fail=["B"])
        picture = await follow(watched.url, uploaded_all)
    assert dict(picture.slots.values()) == {"A": "s", "B": "f"}
    assert picture.state["state"] == "running"


async def test_a_client_hears_of_what_comes_later() -> None:
    async with open_watched(interval_s=0.01) as watched, open_raw(watched.url) as stream:
        await stream.send_all(b"GET /api/events HTTP/1.0\r\n\r\n")
        await read_until(stream, b"event: reports")
        watched.send("A")
        later = await read_until(stream, b'"upload":"uploaded"')
        assert b"event: whole" not in later


async def test_streams_end_at_once_when_the_service_closes(
    mock_clock: trio.testing.MockClock,
) -> None:
    # The clock stands still: no grace can cut what ends by itself.
    ended: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def read(stream: trio.SocketStream) -> None:
            ended.append(await read_all(stream))

        async with AsyncExitStack() as streams:
            async with open_bare() as url:
                for _ in range(20):
                    stream = await streams.enter_async_context(open_raw(url))
                    await stream.send_all(GET)
                    await read_until(stream, b"event: state")
                    nursery.start_soon(read, stream)
            while len(ended) < 20:
                await trio.lowlevel.checkpoint()
    assert all(answer.endswith(b"0\r\n\r\n") for answer in ended)


async def test_more_streams_than_the_limit_are_told_to_come_again_and_what_is_free_is_given_again() -> (
    None
):
    async with open_bare(max_streams=3) as url, AsyncExitStack() as streams:
        for _ in range(3):
            stream = await streams.enter_async_context(open_raw(url))
            await stream.send_all(GET)
            await read_until(stream, b"event: state")
        async with open_raw(url) as refused:
            await refused.send_all(GET)
            answer = await read_all(refused)  # to its end: the connection is not kept
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 10" in answer
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{url}/livez")).status_code == 200

        await streams.aclose()
        while True:  # until the server has seen them leave
            async with open_raw(url) as stream:
                await stream.send_all(GET)
                head = await read_until(stream, b"\r\n\r\n")
                if head.startswith(b"HTTP/1.1 200 "):
                    break


async def test_a_thousand_and_more_streams_are_bounded_and_the_probes_still_answer() -> None:
    async with open_bare(max_streams=64) as url, AsyncExitStack() as streams:
        told = {"200": 0, "503": 0}

        async def try_one() -> None:
            stream = await streams.enter_async_context(open_raw(url))
            await stream.send_all(GET)
            head = await read_until(stream, b"\r\n\r\n")
            told[head[9:12].decode()] += 1

        for _ in range(12):
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(try_one)
        assert told == {"200": 64, "503": 1_136}
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"{url}/livez")
        assert answer.status_code == 200
        assert answer.json()["checks"][0]["name"] == "loop"


async def test_a_client_that_takes_nothing_holds_up_neither_others_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi, "_STALL_MS", 600_000)  # the kernel does not help
    board = StatusBoard()
    names = [f"{number}{'x' * 100}" for number in range(20_000)]
    board.stations.take([StationResult(name, Outcome.SUCCEEDED) for name in names])
    with trio.fail_after(30):  # a guard: without closing them it would take those ten minutes
        async with AsyncExitStack() as clients:
            async with open_bare(board=board, interval_s=0.01) as url:
                for _ in range(5):
                    stream = await clients.enter_async_context(open_raw(url))
                    await stream.send_all(GET)  # the whole picture is more than fits on the way
                picture = await follow(url, lambda picture: len(picture.slots) == 20_000)
    assert picture.is_like(board)
