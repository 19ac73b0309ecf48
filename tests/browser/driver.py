"""A real headless Chromium, driven by chromedriver over the W3C WebDriver protocol: a few JSON requests, no library."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import httpx
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_READY_S = 30.0
_REQUEST_S = 60.0


class UnavailableError(Exception):
    """There is no Chromium here; the text says what is missing."""


def find_programs() -> tuple[str, str]:
    """Return the paths of chromium and chromedriver.

    Raises:
        UnavailableError: one of them is not installed.
    """
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    chromium, chromedriver = found
    if chromium is None or chromedriver is None:
        raise UnavailableError("apt-get install chromium chromium-driver")
    return chromium, chromedriver


@attrs.define(eq=False)
class Browser:
    """One page of a browser."""

    _client: httpx.AsyncClient
    _session: str

    async def _ask(self, method: str, path: str, content: object = None) -> Any:
        body = {} if content is None and method == "POST" else content
        answer = await self._client.request(method, f"/session/{self._session}{path}", json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    async def open(self, url: str) -> None:
        """Load a page to its end."""
        await self._ask("POST", "/url", {"url": url})

    async def run(self, script: str, *arguments: object) -> Any:
        """Run the body of a function in the page and return its value."""
        return await self._ask("POST", "/execute/sync", {"script": script, "args": arguments})

    async def wait(self, condition: str, *arguments: object) -> Any:
        """Wait until an expression is true in the page, looking at each frame it paints; return its value.

        What the expression may say: `arguments[0]` and so on.
        """
        script = f"""
            const [done, ...given] = [arguments[arguments.length - 1], ...Array.from(arguments).slice(0, -1)];
            const look = function () {{ return {condition}; }};
            const again = () => {{
                const value = look.apply(null, given);
                if (value) done(value); else setTimeout(again, 20);
            }};
            again();
        """
        return await self._ask("POST", "/execute/async", {"script": script, "args": arguments})

    async def set_up(self, *, width: int, height: int, dark: bool, scripts: bool = True) -> None:
        """Choose window, colours, and whether scripts run; for the next page."""
        await self._devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self._devtools("Emulation.setEmulatedMedia", features=[scheme])
        await self._devtools("Emulation.setScriptExecutionDisabled", value=not scripts)

    async def press(self, key: str) -> None:
        """Press and let go a key."""
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        await self._ask(
            "POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": keys}]}
        )

    async def screenshot(self, path: Path) -> None:
        """Write what the whole page looks like."""
        shot = await self._devtools(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True
        )
        await trio.Path(path).write_bytes(base64.b64decode(shot["data"]))

    async def complaints(self) -> list[str]:
        """Return what the console said since the last call: script errors and what the page's policy refused."""
        said = await self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in said]

    async def _devtools(self, command: str, **parameters: Any) -> Any:
        content = {"cmd": command, "params": parameters}
        return await self._ask("POST", "/goog/cdp/execute", content)


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    """Start Chromium with an empty profile.

    Raises:
        UnavailableError: it is not installed.
    """
    chromium, chromedriver = find_programs()
    # A folder of a short name: the browser makes sockets in it, whose paths may have 107 characters.
    with _temporary_folder() as profile:
        async with trio.open_nursery() as nursery:
            run = partial(
                trio.run_process,
                [chromedriver, "--port=0"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
                # Of its own: the browser keeps its sockets and crash files there.
                env={**os.environ, "HOME": str(profile), "TMPDIR": str(profile)},
            )
            process: trio.Process = await nursery.start(run)
            with trio.fail_after(_READY_S):
                port = await _read_port(process)
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=_REQUEST_S, trust_env=False
            ) as client:
                options = {
                    "binary": chromium,
                    "args": [
                        "--headless=new",
                        "--no-sandbox",  # tests may run as root
                        "--disable-dev-shm-usage",
                        "--no-first-run",
                        "--disable-gpu",
                        "--no-proxy-server",
                        f"--user-data-dir={profile / 'data'}",
                    ],
                }
                wanted = {
                    "browserName": "chrome",
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"browser": "ALL"},
                    "timeouts": {"script": int(_READY_S * 1000)},
                }
                answer = await client.post(
                    "/session", json={"capabilities": {"alwaysMatch": wanted}}
                )
                assert answer.status_code == 200, answer.text
                session = answer.json()["value"]["sessionId"]
                try:
                    yield Browser(client, session)
                finally:
                    with trio.CancelScope(shield=True, relative_deadline=10):
                        await client.delete(f"/session/{session}")
            nursery.cancel_scope.cancel()


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    # The browser's children may still write into it when their parent is gone.
    with tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


async def _read_port(process: trio.Process) -> int:
    assert process.stdout is not None
    text = b""
    async for chunk in process.stdout:
        text += chunk
        _, found, rest = text.partition(b"successfully on port ")
        if found and b"\n" in rest:
            return int(rest.partition(b"\n")[0].rstrip(b". \r"))
    raise AssertionError(f"chromedriver does not say its port: {text!r}")
