"""The status page in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stationmaster.service.asgi import bind
from stationmaster.service.status import StatusBoard
from tests.service.test_status import closed
from tests.service.test_web import open_bare
from tests.watched import open_watched

if TYPE_CHECKING:
    from pathlib import Path

    from tests.browser.driver import Browser
    from tests.watched import Watched

pytestmark = pytest.mark.once

HOSTILE = (
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'>",
    "\"'>&amp;</td><b>bold</b>",
    "${version} $state {0} %s `${alert(1)}`",
    "</script><svg onload=alert(1)>",
)


def names(count: int) -> list[str]:
    return [f"S{number:04}" for number in range(count)]


def send_mixed(watched: Watched, count: int, *, topic: str = "air") -> None:
    """A batch in which most succeed, and some of each other kind do not; those that hang keep it open."""
    ids = names(count)
    step = max(count // 20, 4)
    watched.send(
        *ids, topic=topic, fail=ids[2::step], hang=ids[5 :: 2 * step], nothing=ids[3::step]
    )


@pytest.mark.parametrize("count", [12, 70, 5_000])
async def test_it_is_drawn_with_so_many_stations_in_light_and_dark(
    browser: Browser, tmp_path: Path, count: int
) -> None:
    async with open_watched() as watched:
        send_mixed(watched, count)
        await browser.set_up(width=1360, height=1000, dark=False)
        await browser.open(watched.url)
        await browser.wait("document.querySelectorAll('#reports tr').length === 1")
        for _ in range(3):
            send_mixed(watched, count, topic="slow")
        await browser.wait("document.querySelectorAll('#batches progress').length === 6")
        shown = "document.querySelectorAll('#stations li').length"
        if count == 5_000:
            await browser.wait("!document.getElementById('grid').hidden")
        else:
            assert await browser.wait(f"{shown} === {count} && {shown}") == count
        await browser.screenshot(tmp_path / f"{count}-light.png")
        await browser.set_up(width=1360, height=1000, dark=True)
        ground = "getComputedStyle(document.body).backgroundColor"
        await browser.wait(f"{ground} === 'rgb(16, 23, 31)'")
        await browser.wait("new Promise(done => requestAnimationFrame(() => done(true)))")
        await browser.screenshot(tmp_path / f"{count}-dark.png")
        assert await browser.complaints() == []


async def test_updates_arrive_without_loading_the_page_again(browser: Browser) -> None:
    async with open_watched(interval_s=0.05) as watched:
        await browser.open(watched.url)
        await browser.wait("document.getElementById('link').textContent === 'live'")
        await browser.run("window.mine = 1")
        for number in range(3):
            watched.send("A", "B", fail=["B"] if number % 2 else [])
            await browser.wait(
                "document.querySelectorAll('#reports tr').length === arguments[0]", number + 1
            )
            await browser.wait(
                "document.querySelector('#stations li:nth-child(2)').className[2] === arguments[0]",
                "f" if number % 2 else "s",
            )
        first = await browser.run(
            "return document.querySelector('#reports td:nth-child(2)').textContent"
        )
        assert first == "air_0_2_0"
        assert await browser.run("return window.mine") == 1
        watched.send("A", topic="slow", hang=["A"])
        await browser.wait("document.querySelector('#batches .id')?.textContent === 'slow_0_0_0'")
        await browser.wait(
            "document.querySelector('#batches progress.time')?.value > 0.5"
            " && document.getElementById('tiles').innerText.includes(arguments[0])",
            "Open batches\n1\nof 64 slots",
        )


async def test_ids_with_markup_stay_text(browser: Browser) -> None:
    async with open_watched(interval_s=0.05) as watched:
        watched.send(*HOSTILE, fail=HOSTILE)
        await browser.open(watched.url)  # as the server wrote it, and then as the script does
        await browser.wait("document.getElementById('link').textContent === 'live'")
        watched.send(*HOSTILE)
        await browser.wait("document.querySelectorAll('#reports tr').length === 2")
        await browser.wait(
            "document.querySelectorAll('#stations .o-s').length === arguments[0]", len(HOSTILE)
        )
        shown = await browser.run(
            "return Array.from(document.querySelectorAll('#stations bdi'), (each) => each.textContent)"
        )
        named = await browser.run(
            "return document.querySelector('#reports tr:last-child small').textContent"
        )
        extra = "return document.querySelectorAll('main img, main script, main svg, td b').length"
        assert await browser.run(extra) == 0
        assert await browser.run("return window.hit === undefined") is True
        assert await browser.complaints() == []
    assert shown == list(HOSTILE)
    assert HOSTILE[0] in named


async def test_stations_are_found_by_a_part_of_their_id_by_outcome_and_by_the_keyboard(
    browser: Browser,
) -> None:
    async with open_watched(interval_s=0.05) as watched:
        ids = names(1_000)
        watched.send(*ids, fail=ids[500:503])
        await browser.open(watched.url)
        await browser.wait("!document.getElementById('grid').hidden")
        await browser.wait("document.querySelectorAll('#stations li').length === 3")
        told = await browser.run(
            "return document.getElementById('grid').getAttribute('aria-label')"
        )
        assert "997 succeeded" in told
        assert "3 failed" in told

        await browser.run("document.getElementById('grid').focus()")
        for key in ("\ue014", "\ue014", "\ue012", "\ue014"):  # right, right, left, right
            await browser.press(key)
        await browser.wait("document.getElementById('cursor').textContent === 'S0001: succeeded'")

        await browser.run("document.getElementById('filter').focus()")
        for key in "s050":
            await browser.press(key)
        await browser.wait("document.querySelectorAll('#stations li').length === 10")
        matches = "return document.getElementById('matches').textContent"
        assert await browser.run(matches) == "10 of 1000 stations match"
        await browser.run("document.querySelector('button[data-code=f]').click()")
        await browser.wait("document.querySelectorAll('#stations li').length === 3")
        assert (
            await browser.run("return document.querySelector('[aria-pressed=true]').dataset.code")
            == "f"
        )
        await browser.run("document.querySelector('button[data-code=f]').click()")
        await browser.wait("document.querySelectorAll('#stations li').length === 10")


async def test_it_can_be_read_without_scripts(browser: Browser, tmp_path: Path) -> None:
    async with open_watched() as watched:
        send_mixed(watched, 12)
        await browser.set_up(width=1360, height=1000, dark=False, scripts=False)
        await watched.uploads.first.wait()
        await browser.open(watched.url)
        await browser.screenshot(tmp_path / "no-script.png")
        await browser.set_up(width=1360, height=1000, dark=False)
        assert await browser.run("return document.querySelectorAll('#stations li').length") == 12
        assert await browser.run("return document.querySelectorAll('#reports tr').length") == 1
        assert await browser.run("return document.getElementById('link').textContent") == ""


async def test_a_service_that_is_gone_is_said_and_one_that_is_back_is_followed_again(
    browser: Browser,
) -> None:
    board = StatusBoard()
    async with open_bare(board=board, interval_s=0.05) as url:
        await browser.open(url)
        await browser.wait("document.getElementById('link').textContent === 'live'")
    lost = "document.getElementById('link').textContent.startsWith('no connection')"
    await browser.wait(lost)
    board.observe(closed("air_0_7_0"))
    sock = await bind("127.0.0.1", int(url.rpartition(":")[2]))
    async with open_bare(board=board, interval_s=0.05, sock=sock):
        await browser.wait(
            "document.querySelector('#reports td:nth-child(2)')?.textContent === 'air_0_7_0'"
        )
        await browser.wait("document.getElementById('link').textContent === 'live'")


async def test_a_browser_is_let_in_by_the_token_as_its_password(browser: Browser) -> None:
    async with open_watched(token="hush-hush") as watched:
        watched.send("A")
        await browser.open(watched.url.replace("http://", "http://any:hush-hush@"))
        await browser.wait("document.getElementById('link').textContent === 'live'")
        await browser.wait("document.querySelectorAll('#reports tr').length === 1")


async def test_it_fits_a_narrow_screen(browser: Browser, tmp_path: Path) -> None:
    async with open_watched() as watched:
        send_mixed(watched, 70)
        await browser.set_up(width=390, height=844, dark=True)
        await browser.open(watched.url)
        await browser.wait("document.querySelectorAll('#reports tr').length === 1")
        await browser.screenshot(tmp_path / "narrow.png")
        assert await browser.run("return document.documentElement.scrollWidth <= 390") is True


@pytest.mark.parametrize("count", [12, 70, 5_000])
async def test_it_paints_before_its_events_come(browser: Browser, count: int) -> None:
    async with open_watched() as watched:
        send_mixed(watched, count)
        await watched.uploads.first.wait()
        await browser.open(watched.url)
        timing = await browser.wait(
            "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        )
        sizes = await browser.run(
            "return performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))"
            ".map((each) => [each.name.split('/').pop(), each.encodedBodySize])"
        )
        print(f"{count} stations: first paint after {timing:.0f} ms; bytes {dict(sizes)}")
        assert {"status.css", "status.js"} <= {name.partition("?")[0] for name, _ in sizes}
        assert sum(size for _, size in sizes) < 150_000
