"""An environment for each peer, made by pip when it is first needed: their dependencies clash with each other's."""

import hashlib
import pathlib
import subprocess
import sys

from harness.contenders import say

HOME = pathlib.Path(__file__).parents[2] / ".cache" / "peers"
INSTALL_S = 300


class InstallError(Exception):
    """A peer cannot be installed here."""


def environments(wanted):
    """Make the environments that are missing; return name -> its interpreter, of those that could be made.

    `wanted` is name -> requirements, each pinned.
    """
    found = {}
    for name, requirements in wanted.items():
        try:
            found[name] = _environment(name, requirements)
        except (InstallError, OSError) as error:
            say(f"{name} cannot be installed: {error}")
    return found


def tell_peers(wanted, found):
    """Print which peers run, and in which version."""
    for name, requirements in wanted.items():
        print(f"- {name}: {', '.join(requirements) if name in found else 'NOT RUN'}")


def _environment(name, requirements):
    key = f"{sys.version_info.major}.{sys.version_info.minor} {' '.join(requirements)}"
    folder = HOME / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    say(f"installing {' '.join(requirements)} into {folder}")
    _run([sys.executable, "-m", "venv", "--clear", folder])
    quiet = ["--quiet", "--disable-pip-version-check", "--prefer-binary"]
    _run([python, "-m", "pip", "install", *quiet, *requirements])
    (folder / "complete").touch()
    return python


def _run(command):
    try:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InstallError(f"not ready after {INSTALL_S} s") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no words"]
        raise InstallError(words[-1][:200])
