"""Installs infinity and runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tests.http_server import closed_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

REQUIREMENT = "infinity-emb[server]==0.0.78"
MODEL = "debug"
_HOME = Path(__file__).parents[2] / ".cache" / "infinity"
_INSTALL_S = 300
_START_S = 60.0
_STOP_S = 30.0


class UnavailableError(Exception):
    """Infinity cannot be installed here."""


def install() -> Path:
    """Return the program, from an environment that is made when it is missing.

    Raises:
        UnavailableError: pip cannot get it.
    """
    folder = _HOME / f"{REQUIREMENT}-py{sys.version_info.major}.{sys.version_info.minor}"
    complete = folder / "complete"
    if not complete.exists():
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        try:
            subprocess.run(
                [*pip, "--disable-pip-version-check", "--prefer-binary", REQUIREMENT],
                check=True,
                capture_output=True,
                text=True,
                timeout=_INSTALL_S,
            )
        except subprocess.CalledProcessError as error:
            raise UnavailableError(error.stderr[-500:]) from error
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"pip was not ready after {_INSTALL_S} s") from error
        complete.touch()
    return folder / "bin" / "infinity_emb"


def free_port() -> int:
    """Return a port for servers that are started one after another."""
    return closed_port()


@asynccontextmanager
async def run_infinity(program: Path, port: int) -> AsyncIterator[str]:
    """Run the server with its debug engine until the block ends, then end it as an operator would; gives its URL."""
    model = ["--engine", "debugengine", "--model-id", MODEL, "--served-model-name", MODEL]
    place = ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1"]
    process = await trio.lowlevel.open_process(
        [str(program), "v2", *model, *place],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        with trio.fail_after(_START_S):
            await _answers(process, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_STOP_S):
                await process.wait()
            process.kill()
            await process.wait()


async def _answers(process: trio.Process, port: int) -> None:
    """Wait until it listens: it says so on a log whose form changes, so the port is asked."""
    while process.returncode is None:
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            await trio.sleep(0.05)
            continue
        await stream.aclose()
        return
    raise RuntimeError(f"infinity ended with {process.returncode}")
