"""An environment for each peer, made by pip when it is first needed: their dependencies clash with each other's."""

import hashlib
import pathlib
import sys

import trio

HOME = pathlib.Path(__file__).parents[2] / ".cache" / "batcher-peers"
INSTALL_S = 300
_AT_ONCE = 2

REQUIREMENTS = {
    "async-batcher": ["async-batcher==0.2.2"],
    "bentoml": ["bentoml==1.4.39"],
    "batched": ["batched==0.1.5"],
    "ray": ["ray[serve]==2.60.0"],
    "infinity-emb": ["infinity-emb[server]==0.0.78"],
    "aiodataloader": ["aiodataloader==0.4.3"],
}
LOOP = "uvloop==0.23.0"


class InstallError(Exception):
    """A peer cannot be installed here."""


async def prepare(names, report):
    """Make the environments that are missing; return peer -> its interpreter, or why there is none."""
    limiter = trio.CapacityLimiter(_AT_ONCE)
    found = {}

    async def one(name):
        async with limiter:
            try:
                found[name] = await _environment([LOOP, *REQUIREMENTS[name]], name, report)
            except (InstallError, OSError) as error:
                found[name] = error

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(one, name)
    return found


async def _environment(requirements, name, report):
    key = f"{sys.version_info.major}.{sys.version_info.minor} {' '.join(requirements)}"
    folder = HOME / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    report(f"installing {name} into {folder}")
    await _run([sys.executable, "-m", "venv", "--clear", folder])
    quiet = ["--quiet", "--disable-pip-version-check", "--prefer-binary"]
    await _run([python, "-m", "pip", "install", *quiet, *requirements])
    (folder / "complete").touch()
    return python


async def _run(command):
    with trio.move_on_after(INSTALL_S) as scope:
        done = await trio.run_process(
            [str(word) for word in command], capture_stdout=True, capture_stderr=True, check=False
        )
    if scope.cancelled_caught:
        raise InstallError(f"not ready after {INSTALL_S} s")
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["no words"]
        raise InstallError(words[-1][:200])
