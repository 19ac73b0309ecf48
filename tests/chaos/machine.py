"""What the faults need of the machine: small disks nobody else sees, and a wall clock for one process."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

DISK_MIB: Final = 24
_SHELL_S: Final = 30.0
_INSIDE: Final = "CHAOS_NAMESPACE"
_NAMESPACES: Final = (
    ("unshare", "--mount", "--propagation", "private"),  # root
    ("unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"),
)


class UnavailableError(Exception):
    """This machine cannot do that; the message says why."""


# --------------------------------------------------------------------------------------------------------------- disks


def enter_namespace(arguments: list[str]) -> None:
    """Begin this program anew in a mount namespace of its own, which ends with its last process.

    Does nothing inside, nor where there is no way in: `Disk.mount` says so then.
    """
    if os.environ.get(_INSIDE):
        return
    for way in _NAMESPACES:
        if shutil.which(way[0]) and _run(*way, "true").returncode == 0:
            _replace([*way, sys.executable, "-m", "tests.chaos", *arguments])


def _replace(command: list[str]) -> NoReturn:
    os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})


@attrs.frozen
class Disk:
    """A small file system in memory, for one service's state."""

    folder: Path

    def mount(self) -> None:
        """Make it.

        Raises:
            UnavailableError: it cannot be mounted.
        """
        if not os.environ.get(_INSIDE):
            raise UnavailableError(
                "no mount namespace of its own (unshare, as root or as any user)"
            )
        size = f"size={DISK_MIB}m"
        done = _run("mount", "-t", "tmpfs", "-o", size, "tmpfs", str(self.folder))
        if done.returncode:
            raise UnavailableError(f"no small file system: {done.stderr.strip()}")

    def unmount(self) -> None:
        """End it, with all that it holds; as far as nobody uses it any more."""
        _run("umount", str(self.folder))

    def fill(self, name: str) -> None:
        """Take all the room that is left."""
        with (self.folder / name).open("ab", buffering=0) as ballast:
            for size in (1 << 20, 4096):
                try:
                    while True:
                        ballast.write(bytes(size))
                except OSError:
                    pass  # full, to this grain

    def free(self, name: str) -> None:
        """Give it back."""
        (self.folder / name).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- clocks


def build_clock(folder: Path) -> Path:
    """Compile the library that moves a process's wall clock.

    Raises:
        UnavailableError: there is no C compiler, or it refuses.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        raise UnavailableError("no C compiler, or not Linux")
    library = folder / "wall_clock.so"
    source = Path(__file__).with_name("wall_clock.c")
    done = _run(compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    if done.returncode:
        raise UnavailableError(f"the clock does not compile: {done.stderr.strip()[-300:]}")
    return library


@attrs.frozen
class Clock:
    """The wall clock of one process (and of those that follow it)."""

    library: Path
    file: Path

    def __attrs_post_init__(self) -> None:
        self.file.write_bytes(bytes(8))

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process needs to go by it."""
        return {"LD_PRELOAD": str(self.library), "CHAOS_CLOCK_FILE": str(self.file)}

    def jump(self, offset_s: float) -> None:
        """Set it so many seconds off the real time, now."""
        with self.file.open(
            "r+b", buffering=0
        ) as file:  # the same bytes: the process has mapped them
            file.write(struct.pack("=q", round(offset_s * 1e6)))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_SHELL_S, check=False)
