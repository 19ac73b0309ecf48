"""Boots a real systemd in namespaces, and a control group, of its own; `guard` has the last word before it does.

Outside (`namespace`) starts this file anew as the first process of the namespaces, which builds a root on a
tmpfs, leaves the machine's behind, asks the guard, and becomes systemd. The end kills all of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.systemd.guard import reasons_to_refuse

REPOSITORY = Path(__file__).parents[2]
_SYSTEMD = "/usr/lib/systemd/systemd"
_NAMESPACES = ("mnt", "pid", "uts", "ipc", "net", "cgroup")
# What concerns the machine and not a namespace.
_GIVEN_UP = (
    "sys_time", "sys_module", "sys_boot", "sys_rawio", "syslog", "wake_alarm", "mac_admin", "mac_override",
    "sys_tty_config", "mknod",
)  # fmt: skip
_DEVICES = ("null", "zero", "full", "random", "urandom")
_SYSINIT = Path("/usr/lib/systemd/system/sysinit.target.wants")
_KEPT = {"systemd-journald.service"}
_BY_HAND = (
    "systemd-journald-audit.socket",
    "systemd-initctl.socket",
    "dbus.socket",
    "dbus.service",
    "systemd-udevd.service",
    "systemd-remount-fs.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-tmpfiles-clean.service",
    "systemd-logind.service",
    "getty.target",
    "time-set.target",
)


def run(*command: str, check: bool = True, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, text=True, capture_output=True, timeout=120, **more)  # type: ignore[call-overload,no-any-return]


# ------------------------------------------------------------------------------------------------------- inside: boot


def build(root: Path, site: str) -> None:
    """Fill the new root: nothing of the machine but programs and libraries, read-only."""
    run("mount", "-t", "tmpfs", "-o", "mode=755,size=512m", "tmpfs", str(root))
    for name in (
        "usr",
        "etc",
        "run",
        "tmp",
        "var/tmp",
        "var/lib",
        "var/log",
        "root",
        "home",
        "dev/pts",
        "dev/shm",
        "proc",
        "sys",
        "opt/stationmaster/bin",
        "opt/site",
        "opt/src",
        "opt/repository/tests",
        "mnt",
        "srv",
        "etc/systemd/system",
        "etc/stationmaster",
        "oldroot",
    ):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    for source, place in (
        ("/usr", "usr"),
        (site, "opt/site"),
        (str(REPOSITORY / "src"), "opt/src"),
        (str(REPOSITORY / "tests"), "opt/repository/tests"),
    ):
        run("mount", "--bind", source, str(root / place))
        run("mount", "-o", "remount,bind,ro", str(root / place))
    for place, mode in (("tmp", "1777"), ("run", "755"), ("var/tmp", "1777")):
        run("mount", "-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", str(root / place))
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "dev"))
    for name in ("pts", "shm"):
        (root / "dev" / name).mkdir()
    for name in _DEVICES:
        status = os.stat(f"/dev/{name}")
        os.mknod(root / "dev" / name, status.st_mode, status.st_rdev)
        os.chmod(root / "dev" / name, 0o666)
    run("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", str(root / "dev/pts"))
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    run("mount", "-t", "proc", "proc", str(root / "proc"))
    run("mount", "--bind", str(root / "proc/sys"), str(root / "proc/sys"))
    run("mount", "-o", "remount,bind,ro", str(root / "proc/sys"))
    if (root / "proc/sysrq-trigger").exists():
        run("mount", "--bind", str(root / "dev/null"), str(root / "proc/sysrq-trigger"))
    run("mount", "-t", "sysfs", "-o", "ro", "sysfs", str(root / "sys"))
    run("mount", "-t", "cgroup2", "cgroup2", str(root / "sys/fs/cgroup"))
    for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    if Path("/etc/alternatives").exists():
        shutil.copytree("/etc/alternatives", root / "etc/alternatives", symlinks=True)
    (root / "etc/machine-id").write_text("5" * 32 + "\n")
    (root / "etc/hostname").write_text("walk\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    units = root / "etc/systemd/system"
    for unit in {*(each.name for each in _SYSINIT.iterdir()), *_BY_HAND} - _KEPT:
        (units / unit).symlink_to("/dev/null")
    (units / "walk.target").write_text("[Unit]\nRequires=basic.target\nAfter=basic.target\n")
    for shipped in (REPOSITORY / "config/systemd").iterdir():
        shutil.copy(shipped, units / shipped.name)
    program = root / "opt/stationmaster/bin/stationmaster"
    program.write_text(
        '#!/bin/sh\nPYTHONPATH=/opt/src:/opt/repository:/opt/site exec /usr/bin/python3 -m stationmaster "$@"\n'
    )
    program.chmod(0o755)


def inside(
    root: Path, site: str, marker: str, machine: frozenset[int], outer: str, *, boot: bool
) -> None:
    """Build, leave the machine behind, ask the guard; only then become systemd. Never returns if it boots."""
    shared = set(_namespaces().split(",")) & set(outer.split(","))
    if os.getpid() != 1 or shared or len(outer.split(",")) != len(_NAMESPACES):
        raise SystemExit(f"refused: not in namespaces of its own: {shared or os.getpid()}")
    build(root, site)
    run("ip", "link", "set", "lo", "up")
    os.chdir(root)
    run("pivot_root", ".", "oldroot")
    os.chroot(".")
    os.chdir("/")
    run("umount", "-l", "/oldroot")
    os.rmdir("/oldroot")
    reasons = reasons_to_refuse(marker=marker, machine=machine)
    if reasons:
        raise SystemExit("refused: " + "; ".join(reasons))
    sys.stdout.write("the guard lets pass\n")
    sys.stdout.flush()
    if not boot:
        sys.stdout.write(Path("/proc/self/mountinfo").read_text())
        return
    # As at every boot, among themselves only: credentials reach a service by a mount that spreads (without this, their
    # folder is empty and root's).
    run("mount", "--make-rshared", "/")
    os.execve(
        "/usr/bin/setpriv",
        ["setpriv", "--bounding-set=" + ",".join(f"-{name}" for name in _GIVEN_UP), _SYSTEMD, "--system",
         "--unit=walk.target", "--show-status=false"],
        {"container": "walk", "PATH": "/usr/sbin:/usr/bin", "LANG": "C.UTF-8"},
    )  # fmt: skip


def try_guard() -> int:
    """Ask the guard in places that it must refuse: the machine itself, and half-private namespaces."""
    code = 0
    marker, machine = str(Path(__file__)), _machine()
    me = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from tests.systemd.guard import reasons_to_refuse; "
    ask = me + f"print(reasons_to_refuse(marker={marker!r}, machine=frozenset({sorted(machine)})))"
    half = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--propagation", "private"]
    for name, command in (
        ("the machine", []),
        ("mounts and processes of its own, the machine's root", half),
        (
            "a tmpfs on /run only",
            [*half, "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh"],
        ),
    ):
        said = run(*command, sys.executable, "-c", ask).stdout.strip()
        refused = said not in {"", "[]"}
        code |= not refused
        sys.stdout.write(f"{'refused' if refused else 'LET PASS'}  {name}: {said[:160]}\n")
    return code


# ------------------------------------------------------------------------------------------------------- outside: walk


def _namespaces() -> str:
    return ",".join(os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES)


def _machine() -> frozenset[int]:
    return frozenset(
        os.stat(place).st_dev for place in ("/", "/tmp", "/run", "/var", "/home", REPOSITORY)
    )


@contextmanager
def namespace(*, boot: bool) -> Iterator[subprocess.Popen[str]]:
    """Run the inner side in namespaces, and a control group, of its own; all of it is killed at the end."""
    root = Path(tempfile.mkdtemp(prefix="stationmaster-walk-"))
    marker = root.parent / f"{root.name}.marker"
    marker.touch()
    group = _control_groups() / root.name
    group.mkdir()
    inner = [sys.executable, __file__, "--inside", str(root), sysconfig.get_path("purelib"), str(marker),
             ",".join(map(str, sorted(_machine()))), _namespaces(), str(int(boot))]  # fmt: skip
    unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--fork", "--kill-child",
               "--propagation", "private", *inner]  # fmt: skip
    # Into the group first: what `--cgroup` makes its root is the group at that moment.
    process = subprocess.Popen(
        ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *unshare],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        marker.unlink()
        root.rmdir()
        _remove_group(group)


def _control_groups() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(place)
    raise SystemExit("no cgroup2 is mounted")


def _remove_group(group: Path) -> None:
    for _ in range(100):
        try:
            for folder, _, _ in os.walk(group, topdown=False):
                os.rmdir(folder)
        except OSError:  # what was killed is not gone yet
            time.sleep(0.1)
        else:
            return


if __name__ == "__main__":
    _, _, _root, _site, _marker, _numbers, _outer, _boot = sys.argv
    _known = frozenset(int(each) for each in _numbers.split(",") if each)
    inside(Path(_root), _site, _marker, _known, _outer, boot=_boot == "1")
