"""Whether a systemd may be booted here: the last look before `exec`, from inside the namespace that it is to own.

systemd's own start-up empties temp directories, mounts, and writes kernel settings. On a real root that is the end of
the machine's data, so everything must be private: this names each reason why it is not, and none is the only answer
that lets a boot go on. Standard library only; it must run on whatever Python the new root has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PRIVATE = ("/", "/tmp", "/run", "/var", "/etc", "/root", "/home")
_VIRTUAL = frozenset({"tmpfs", "ramfs", "proc", "sysfs", "cgroup2", "devpts", "mqueue"})
_READ_ONLY = frozenset({"sysfs"})


@dataclass(frozen=True)
class Mount:
    """A line of `/proc/self/mountinfo`."""

    root: str
    place: str
    options: frozenset[str]
    kind: str
    peers: tuple[str, ...] = ()
    """With which others it exchanges mounts."""


def read_mounts(mountinfo: str) -> list[Mount]:
    """Parse `/proc/self/mountinfo`.

    Raises:
        ValueError: it is not of the form that is known.
    """
    mounts = []
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 6:
            raise ValueError(f"unknown form of a mount: {line!r}")
        options = frozenset(fields[5].split(","))
        mounts.append(Mount(fields[3], fields[4], options, after.split(" ")[0], tuple(fields[6:])))
    return mounts


def wrong_mounts(mounts: list[Mount]) -> Iterator[str]:
    """Yield what is wrong with these mounts. Pure."""
    if not mounts:
        yield "no mount is known"
    kinds = {mount.place: mount.kind for mount in mounts}  # the last one on a place is what is seen
    if kinds.get("/") != "tmpfs":
        yield f"the root is no tmpfs but {kinds.get('/')}"
    for mount in mounts:
        read_only = "ro" in mount.options
        if mount.kind not in _VIRTUAL and not read_only:
            yield f"{mount.place} ({mount.kind}) can be written"
        if mount.kind not in _VIRTUAL and mount.root == "/":
            yield f"{mount.place} is the whole of a {mount.kind}"
        if (mount.kind in _READ_ONLY or mount.place == "/proc/sys") and not read_only:
            yield f"{mount.place} can be written"
        if mount.peers:
            yield f"{mount.place} exchanges mounts with others ({' '.join(mount.peers)})"
        if mount.place == "/oldroot" or mount.place.startswith("/oldroot/"):
            yield f"{mount.place} is the machine's"
    if not any(mount.place == "/proc/sys" for mount in mounts):
        yield "/proc/sys is not covered"


def reasons_to_refuse(*, marker: str, machine: frozenset[int]) -> list[str]:
    """Look around; return every reason not to boot here.

    Args:
        marker: a path outside every shared folder that exists on the machine.
        machine: `st_dev` of file systems that the machine writes to.
    """
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        reasons = list(wrong_mounts(read_mounts(file.read())))
    if os.getpid() != 1:
        reasons.append(f"this is process {os.getpid()}, not the first of a namespace of its own")
    if os.path.lexists(marker):
        reasons.append(f"the machine's files are seen: {marker}")
    if not machine:
        reasons.append("nothing is known of the machine's file systems")
    reasons += [
        f"{place} lies on a file system of the machine"
        for place in _PRIVATE
        if not os.path.isdir(place) or os.stat(place).st_dev in machine
    ]
    if not os.path.exists("/sys/fs/cgroup/cgroup.type"):  # the machine's root group has none
        reasons.append("the control group is not one of its own")
    elif any(entry.is_dir() for entry in os.scandir("/sys/fs/cgroup")):
        reasons.append("there are control groups below already")
    numbers = [name for name in os.listdir("/proc") if name.isdigit()]
    if len(numbers) > 8:
        reasons.append(f"{len(numbers)} processes are seen")
    return reasons
