"""The guard refuses every place where a systemd would do harm."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.systemd.guard import read_mounts, reasons_to_refuse, wrong_mounts

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """\
20 1 0:30 / / rw,relatime - tmpfs tmpfs rw
21 20 254:0 /usr /usr ro,relatime - ext4 /dev/vda rw
22 20 0:31 / /proc rw - proc proc rw
23 22 0:31 /sys /proc/sys ro - proc proc rw
24 20 0:32 / /sys ro - sysfs sysfs rw
25 24 0:33 / /sys/fs/cgroup rw - cgroup2 cgroup rw
"""


def wrong(mountinfo: str) -> str:
    return "; ".join(wrong_mounts(read_mounts(mountinfo)))


def test_a_private_root_with_read_only_binds_is_let_pass() -> None:
    assert wrong(GOOD) == ""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("- tmpfs tmpfs", "- ext4 /dev/vda", "the root is no tmpfs but ext4"),
        ("/usr /usr ro,", "/usr /usr rw,", "/usr (ext4) can be written"),
        ("/usr /usr ro,", "/ /host ro,", "/host is the whole of a ext4"),
        (
            "/ / rw,relatime -",
            "/ / rw,relatime shared:1 -",
            "/ exchanges mounts with others (shared:1)",
        ),
        (
            "/ / rw,relatime -",
            "/ / rw,relatime master:1 -",
            "/ exchanges mounts with others (master:1)",
        ),
        ("/proc/sys ro", "/proc/sys rw", "/proc/sys can be written"),
        ("/ /sys ro", "/ /sys rw", "/sys can be written"),
        ("/usr /usr ro,", "/usr /oldroot/usr ro,", "/oldroot/usr is the machine's"),
        ("23 22 0:31 /sys /proc/sys ro - proc proc rw\n", "", "/proc/sys is not covered"),
        ("0:32 / /sys ro - sysfs sysfs", "0:32 / /x rw - overlay o", "/x (overlay) can be written"),
    ],
)
def test_one_thing_that_is_not_private_is_enough_to_refuse(old: str, new: str, reason: str) -> None:
    assert GOOD.count(old) == 1
    assert reason in wrong(GOOD.replace(old, new))


def test_a_second_mount_over_the_root_counts() -> None:
    assert "the root is no tmpfs" in wrong(GOOD + "30 20 254:0 /x / rw - ext4 /dev/vda rw\n")


def test_no_mounts_at_all_are_refused_and_an_unknown_form_is_an_error() -> None:
    assert "no mount is known" in wrong("")
    with pytest.raises(ValueError, match="unknown form"):
        read_mounts("20 1 0:30 / /")


def test_the_machine_that_runs_the_tests_is_refused_for_every_reason(tmp_path: Path) -> None:
    machine = frozenset({os.stat("/").st_dev, os.stat(tmp_path).st_dev})
    reasons = reasons_to_refuse(marker=str(tmp_path), machine=machine)
    said = "; ".join(reasons)
    assert "not the first of a namespace" in said
    assert "the machine's files are seen" in said
    assert "/ lies on a file system of the machine" in said
    assert "nothing is known" in "; ".join(reasons_to_refuse(marker="/", machine=frozenset()))
