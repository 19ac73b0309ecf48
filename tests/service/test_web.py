"""The web ring over real sockets: its routes, who may ask, and what the page says without scripts."""

from __future__ import annotations

import base64
import gzip
import re
import socket
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio

from stationmaster.batch import Outcome, StationResult
from stationmaster.batcher import BatchPolicy, open_batcher
from stationmaster.errors import ConfigError
from stationmaster.events import CallStarted, StoreBlocked, UploadsDiverted
from stationmaster.service.asgi import ListenError, bind
from stationmaster.service.health import Health
from stationmaster.service.metrics import Metrics
from stationmaster.service.status import StatusBoard
from stationmaster.service.web import open_web
from stationmaster.service.web.page import NAMED_STATIONS
from stationmaster.service.web.routes import ASSETS, read_asset
from stationmaster.state import open_state
from stationmaster.testing import ScriptedEmbedder
from tests.raw_http import say
from tests.service.standing import kafka, partition
from tests.service.test_status import closed
from tests.watched import open_watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

OUTCOME = {False: Outcome.SUCCEEDED, True: Outcome.TIMED_OUT}
TOKEN = "a-token-of-some-length"
PATHS = ["/", "/livez", "/readyz", "/metrics", "/api/status", "/static/status.js", "/nowhere"]
HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</li></ul></td><b>",
    "$version ${state} {0} %s &amp;",
)


@asynccontextmanager
async def open_bare(
    *,
    board: StatusBoard | None = None,
    token: str | None = None,
    host: str = "127.0.0.1",
    **web: Any,
) -> AsyncIterator[str]:
    """The web ring without a pipeline; `web` goes to `open_web`."""
    health = Health()
    async with (
        open_web(
            host=host,
            port=0,
            token=token,
            health=health,
            metrics=Metrics(),
            board=board or StatusBoard(),
            **web,
        ) as url,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(health.run)
        yield url
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------------------------------------------------- the routes


async def test_probes_answer_200_or_503_with_every_check() -> None:
    async with open_watched() as watched, httpx.AsyncClient(base_url=watched.url) as client:
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["ok"] is True
        assert {"name": "sink", "ok": True, "detail": "takes batches"} in ready.json()["checks"]

        watched.health.observe(StoreBlocked(store="outbox", kind="full", detail="no room"))
        red = await client.get("/readyz")
        assert red.status_code == 503
        assert red.json()["ok"] is False
        assert {"name": "outbox", "ok": False, "detail": "no room"} in red.json()["checks"]
        live = await client.get("/livez")
        assert (live.status_code, live.json()["ok"]) == (200, True)
        assert [check["name"] for check in live.json()["checks"]] == ["loop", "pump", "pipeline"]


async def test_metrics_come_as_the_accept_header_asks() -> None:
    async with open_watched() as watched, httpx.AsyncClient(base_url=watched.url) as client:
        classic = await client.get("/metrics")
        openmetrics = await client.get(
            "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
        )

    assert classic.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "stationmaster_" in classic.text
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


async def test_the_status_is_one_json_object() -> None:
    async with open_watched() as watched, httpx.AsyncClient(base_url=watched.url) as client:
        watched.board.observe(closed())
        status = (await client.get("/api/status")).json()

    assert status["state"] == "running"
    assert status["stationOutcomes"] == {"A": "succeeded"}
    assert status["reports"][0]["batchId"] == "air_0_1_0"


async def test_a_picture_is_made_once_for_those_who_ask_at_the_same_time(
    mock_clock: object,
) -> None:
    # The clock stands still.
    async with open_watched() as watched, httpx.AsyncClient(base_url=watched.url) as client:
        first = (await client.get("/api/status")).content, (await client.get("/")).content
        watched.board.observe(closed())
        again = (await client.get("/api/status")).content, (await client.get("/")).content

    assert first == again


@pytest.mark.parametrize("path", PATHS)
async def test_every_answer_says_what_browsers_may_do_with_it(path: str) -> None:
    async with open_bare() as url, httpx.AsyncClient() as client:
        for method in ("GET", "HEAD", "POST"):
            answer = await client.request(method, url + path)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "server" not in answer.headers
            wanted = "immutable" if path.startswith("/static/") and method != "POST" else "no-store"
            assert wanted in answer.headers["cache-control"]


@pytest.mark.parametrize("path", [*PATHS, "/api/events"])
async def test_head_answers_like_get_without_a_body(path: str) -> None:
    async with open_bare() as url, httpx.AsyncClient() as client:
        head = await client.head(url + path)
        assert head.content == b""
        if path != "/api/events":
            assert head.status_code == (await client.get(url + path)).status_code
        else:
            assert head.headers["content-type"] == "text/event-stream; charset=utf-8"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/", "/api/events", "/nowhere"])
async def test_other_methods_are_refused(method: str, path: str) -> None:
    async with open_bare() as url, httpx.AsyncClient() as client:
        answer = await client.request(method, url + path)

    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"


async def test_a_get_with_a_body_is_refused_and_its_connection_closed() -> None:
    async with open_bare() as url, httpx.AsyncClient() as client:
        counted = await client.request("GET", url, content=b"x")
        assert (counted.status_code, counted.headers["connection"]) == (405, "close")
        chunked = b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert (await say(url, chunked)).startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize(
    "path",
    [
        "/static/page.html",
        "/static/nothing",
        "/static/..%2fpage.py",
        "/static/%2e%2e/guard.py",
        "/api",
        "/api/status/",
    ],
)
async def test_nothing_else_is_served(path: str) -> None:
    async with open_bare() as url, httpx.AsyncClient() as client:
        answer = await client.get(url + path)

    assert answer.status_code == 404
    assert answer.text == "Not Found\n"


async def test_a_fault_in_the_picture_is_a_500_that_says_nothing_and_the_service_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> object:
        raise RuntimeError("the password is swordfish")

    board = StatusBoard()
    board.watch(state=broken)  # type: ignore[arg-type]
    async with open_bare(board=board) as url, httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/api/status")
        assert (answer.status_code, answer.text) == (500, "a bug in this server: RuntimeError\n")
        assert (await client.get(f"{url}/livez")).status_code == 200
    assert "swordfish" in caplog.text


# ------------------------------------------------------------------------------------------------------------ who asks


async def test_with_a_token_everything_but_livez_asks_for_it() -> None:
    async with open_bare(token=TOKEN) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/livez")).status_code == 200
        for path in (*PATHS, "/api/events"):
            if path == "/livez":
                continue
            answer = await client.get(path)
            assert answer.status_code == 401
            assert answer.text == "a token is needed\n"
            challenges = answer.headers.get_list("www-authenticate")
            assert challenges == ["Bearer", 'Basic realm="stationmaster"']
        for header in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
            answer = await client.get("/metrics", headers={"authorization": header})
            assert answer.status_code == 200
        # As a browser sends what its user typed.
        assert (await client.get("/", auth=("", TOKEN))).status_code == 200
        assert (await client.get("/", auth=("anybody", TOKEN))).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Digest {TOKEN}",
        TOKEN,
        "Basic !!!",
        "Basic " + base64.b64encode(TOKEN.encode()).decode(),
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Bearer \xff\xfe",
    ],
)
async def test_anything_else_is_no_token(header: str) -> None:
    async with open_bare(token=TOKEN) as url, httpx.AsyncClient() as client:
        sent = {b"authorization": header.encode("latin-1")}
        assert (await client.get(f"{url}/readyz", headers=sent)).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost", 200),
        ("LocalHost.:80", 200),
        ("[::1]:8080", 200),
        ("[::1]", 200),
        ("10.1.2.3", 200),
        ("evil.example", 421),
        ("evil.example:8080", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("[evil]", 421),
    ],
)
async def test_without_a_token_a_foreign_name_is_refused(host: str, status: int) -> None:
    async with open_bare() as url, httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/readyz", headers={"host": host})
        assert answer.status_code in ({200, 503} if status == 200 else {421})
        assert (await client.get(f"{url}/livez", headers={"host": host})).status_code == 200


async def test_with_a_token_any_name_will_do() -> None:
    async with open_bare(token=TOKEN) as url, httpx.AsyncClient() as client:
        headers = {"host": "stationmaster.example", "authorization": f"Bearer {TOKEN}"}
        assert (await client.get(f"{url}/api/status", headers=headers)).status_code == 200


async def test_an_address_that_others_reach_is_not_served_without_a_token() -> None:
    with pytest.raises(ConfigError, match=r"web\.token_file: .*0\.0\.0\.0 is no loopback address"):
        async with open_bare(host="0.0.0.0"):
            pass
    async with open_bare(host="0.0.0.0", token=TOKEN) as url, httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/livez")).status_code == 200


async def test_a_socket_that_was_handed_over_is_served() -> None:
    sock = await bind("127.0.0.1", 0)
    sock.listen()
    port = sock.getsockname()[1]
    async with open_bare(sock=sock, host="192.0.2.1") as url, httpx.AsyncClient() as client:
        assert url == f"http://127.0.0.1:{port}"
        assert (await client.get(f"{url}/livez")).status_code == 200
    assert sock.fileno() == -1


async def test_a_socket_that_was_handed_over_keeps_the_rule_of_the_token() -> None:
    sock = await bind("0.0.0.0", 0)
    with pytest.raises(ConfigError, match=r"web\.token_file"):
        async with open_bare(sock=sock):
            pass
    assert sock.fileno() == -1


async def test_a_socket_that_is_none_of_tcp_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ConfigError, match="none of TCP"):
        async with open_bare(sock=ours):
            pass


async def test_a_taken_port_is_told() -> None:
    with await bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ListenError, match="in use"):
            async with open_web(
                host="127.0.0.1",
                port=taken.getsockname()[1],
                token=None,
                health=Health(),
                metrics=Metrics(),
                board=StatusBoard(),
            ):
                pass


# ------------------------------------------------------------------------------------------------------------ the page


class Reader(HTMLParser):
    """Reads a page as a browser does: elements, and the text of the station list."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.names: list[str] = []
        self._in_name = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # type: ignore[explicit-override]
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]
        if tag == "bdi":
            self.names.append("")
            self._in_name = True

    def handle_endtag(self, tag: str) -> None:  # type: ignore[explicit-override]
        self._in_name = self._in_name and tag != "bdi"

    def handle_data(self, data: str) -> None:  # type: ignore[explicit-override]
        if self._in_name:
            self.names[-1] += data


async def page_of(board: StatusBoard) -> str:
    async with open_bare(board=board) as url, httpx.AsyncClient() as client:
        answer = await client.get(url)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text


async def test_the_page_says_everything_without_scripts() -> None:
    async with open_watched() as watched, httpx.AsyncClient() as client:
        watched.board.observe(closed())
        watched.board.observe(UploadsDiverted(reason="503 for ever"))
        page = (await client.get(watched.url)).text

    assert '<p id="state" class="pill good" role="status">running</p>' in page
    assert "down: 503 for ever" in page
    assert "<bdi>A</bdi>" in page
    assert "air_0_1_0" in page
    assert "<dt>Open batches</dt><dd><strong>0</strong><span>of 64 slots</span></dd>" in page
    assert "<b>sink</b>" in page
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in page


async def test_ids_with_html_are_text() -> None:
    board = StatusBoard()
    board.stations.take([StationResult(name, Outcome.FAILED) for name in HOSTILE])
    reader = Reader()
    page = await page_of(board)
    reader.feed(page)

    assert reader.names == list(HOSTILE)
    assert reader.tags.count("script") == 1
    assert "img" not in reader.tags
    assert reader.handlers == []


async def test_the_page_has_no_script_or_style_of_its_own_and_nothing_from_elsewhere() -> None:
    page = await page_of(StatusBoard())

    assert re.findall(r"<script(?![^>]* src=)", page) == []
    assert "<style" not in page
    assert "style=" not in page
    assert "http://" not in page
    assert "https://" not in page
    for name in ASSETS:
        assert f"static/{name}?v=" in page
        assert b"//" not in re.sub(
            rb'"http://www.w3.org/2000/svg"|(?m:^|[; ])// .*', b"", read_asset(name)
        )


async def test_the_page_has_landmarks_one_heading_for_each_part_and_names_for_all_that_can_be_used() -> (
    None
):
    page = await page_of(StatusBoard())

    for landmark in ("<header>", "<main", "<footer"):
        assert page.count(landmark) == 1
    assert page.count("<h1") == 1
    for part in re.findall(r'<section aria-labelledby="([^"]+)"', page):
        assert f'id="{part}"' in page
    assert page.count("<section") == page.count("<h2")
    assert 'href="#main"' in page
    assert "<html lang=" in page


async def test_of_many_stations_the_page_names_those_that_did_not_succeed() -> None:
    board = StatusBoard()
    board.observe(closed(**{f"S{n}": OUTCOME[n % 100 == 0] for n in range(5_000)}))
    page = await page_of(board)
    reader = Reader()
    reader.feed(page)

    assert reader.names == [f"S{n}" for n in range(0, 5_000, 100)]
    assert "4950 more stations." in page
    assert len(page) < 40_000


async def test_the_page_stays_small_whatever_happens() -> None:
    board = StatusBoard()
    late = {f"{number}{'x' * 120}": Outcome.TIMED_OUT for number in range(5_000)}
    for number in range(100):
        board.observe(closed(f"air_0_{number}_0", **late))
    page = await page_of(board)
    reader = Reader()
    reader.feed(page)

    assert len(reader.names) == NAMED_STATIONS
    assert len(page) < 100_000


def test_the_page_and_its_assets_are_small() -> None:
    assets = [read_asset(name) for name in (*ASSETS, "page.html")]
    assert sum(map(len, assets)) < 32_000
    assert sum(len(gzip.compress(asset)) for asset in assets) < 12_000


async def test_the_tiles_tell_of_every_part_that_there_is(tmp_path: Path) -> None:
    board = StatusBoard(max_batch_rows=32)
    board.watch(kafka=lambda: kafka(partition(0, 5), partition(1, None), paused=True))
    async with (
        open_batcher(ScriptedEmbedder(), policy=BatchPolicy()) as batcher,
        open_state(tmp_path / "state.db") as state,
    ):
        board.watch(batcher=batcher.statistics, state=state.statistics)
        board.observe(CallStarted(rows=8, reason="full", oldest_age_s=0.0, queue_rows=0))
        empty = await page_of(board)
        await state.outbox.put(
            "b", topic="air", ranges=(), body=b"x" * 2_500_000, kept_at=0.0, reason="away"
        )
        filled = await page_of(board)

    assert "<dt>Kafka lag</dt><dd><strong>5</strong><span>2 partitions, paused</span>" in empty
    assert "<strong>8.0 of 32</strong><span>0 queued, 0 calls</span>" in empty
    assert "<dt>Outbox</dt><dd><strong>0</strong><span>empty</span>" in empty
    assert "<dt>Outbox</dt><dd><strong>1</strong><span>2.5 MB, oldest " in filled
    assert "<dt>Dead letters</dt><dd><strong>0</strong><span>none</span>" in filled


async def test_open_batches_stand_on_the_page_with_both_bars() -> None:
    async with open_watched(deadline_s=500.0) as watched, httpx.AsyncClient() as client:
        watched.send("A", "B", hang=["B"])
        while not watched.pipeline.open_batches(limit=1):
            await trio.lowlevel.checkpoint()
        page = (await client.get(watched.url)).text

    assert "air_0_0_0" in page
    assert re.search(r'<progress class="answers" max="2" value="[01]"', page)
    assert re.search(r'<progress class="time" max="500.0" value="[\d.]+"', page)
