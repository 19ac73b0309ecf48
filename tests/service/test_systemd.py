"""What systemd hears, on real datagram sockets; what it hands over, in a child process of ours."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing

from stationmaster.service.shutdown import Ending
from stationmaster.service.systemd import Manager, take_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio.testing import MockClock


@attrs.define
class Service:
    """What is told of."""

    is_live: bool = True
    status: str = "running"

    def summary(self) -> str:
        return self.status


@attrs.define
class Systemd:
    """The other end: a bound datagram socket."""

    receiver: socket.socket
    address: str

    def heard(self) -> list[list[str]]:
        """Return the lines of each message since the last call."""
        messages = []
        while True:
            try:
                messages.append(self.receiver.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return messages

    def times(self, line: str) -> int:
        return sum(line in message for message in self.heard())

    async def times_within(self, seconds: float, line: str) -> int:
        """Listen all the while: a datagram socket keeps ten messages."""
        times = 0
        for _ in range(round(seconds * 10)):
            await trio.sleep(0.1)
            times += self.times(line)
        return times


@pytest.fixture(params=["path", "abstract"])
def manager_socket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    name = f"stationmaster-test-{os.getpid()}"
    address = f"@{name}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as receiver:
        receiver.bind(address.replace("@", "\0") if request.param == "abstract" else address)
        yield Systemd(receiver, address)


async def turn() -> None:
    await trio.testing.wait_all_tasks_blocked()


# -------------------------------------------------------------------------------------------------------- what it hears


async def test_ready_and_status_are_told_once_and_a_status_again_when_it_changes(
    manager_socket: Systemd, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    manager = take_over({"NOTIFY_SOCKET": manager_socket.address})
    service = Service(status="starting")
    nursery.start_soon(manager.run, service, Ending())
    await turn()
    manager.ready()
    assert manager_socket.heard() == [["STATUS=starting"], ["READY=1"]]
    service.status = "3 batches\nopen \x1b[31m"
    await trio.sleep(100.5)
    assert manager_socket.heard() == [["STATUS=3 batches\\u000aopen \\u001b[31m"]]


async def test_a_status_that_changes_all_the_time_is_told_once_a_second(
    manager_socket: Systemd, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    service = Service()
    manager = take_over({"NOTIFY_SOCKET": manager_socket.address})
    nursery.start_soon(manager.run, service, Ending())
    for number in range(100):
        service.status = f"{number} batches open"
        await trio.sleep(0.1)
    assert len(manager_socket.heard()) == 10


async def test_the_watchdog_is_fed_at_half_of_its_time_and_only_while_all_is_live(
    manager_socket: Systemd, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    told = {"NOTIFY_SOCKET": manager_socket.address, "WATCHDOG_USEC": "30000000"}
    manager, service = take_over(told), Service()
    assert manager.watchdog_s == 30.0
    nursery.start_soon(manager.run, service, Ending())
    fed_at = []
    for second in range(60):
        await trio.sleep(1.0 if second else 0.5)
        if manager_socket.times("WATCHDOG=1"):
            fed_at.append(second)
    assert fed_at == [0, 15, 30, 45]

    service.is_live = False
    await trio.sleep(300)
    assert manager_socket.times("WATCHDOG=1") == 0
    service.is_live = True
    await trio.sleep(1.5)
    assert manager_socket.times("WATCHDOG=1") == 1


async def test_a_short_watchdog_is_fed_more_often_than_once_a_second(
    manager_socket: Systemd, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    told = {"NOTIFY_SOCKET": manager_socket.address, "WATCHDOG_USEC": "500000"}
    nursery.start_soon(take_over(told).run, Service(), Ending())
    assert await manager_socket.times_within(10, "WATCHDOG=1") >= 40


async def test_a_loop_that_is_blocked_feeds_no_watchdog(
    manager_socket: Systemd, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    told = {"NOTIFY_SOCKET": manager_socket.address, "WATCHDOG_USEC": "2000000"}
    nursery.start_soon(take_over(told).run, Service(), Ending())
    await trio.sleep(1.1)
    manager_socket.heard()
    autojump_clock.jump(60.0)  # time passes, and no task runs
    assert manager_socket.heard() == []


async def test_a_watchdog_that_is_another_process_s_is_not_fed() -> None:
    told = {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid() + 1)}
    assert take_over(told).watchdog_s is None
    told = {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}
    assert take_over(told).watchdog_s == 2.0


async def test_an_end_is_told_at_once_and_its_time_put_off_up_to_its_limit(
    manager_socket: Systemd, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    manager, ending = take_over({"NOTIFY_SOCKET": manager_socket.address}), Ending()
    nursery.start_soon(manager.run, Service(), ending)
    await trio.sleep(0.5)
    manager_socket.heard()
    began = trio.current_time()
    ending.begin(began + 15.0)
    ending.begin(began + 1000.0)  # the first counts
    await turn()
    assert manager_socket.heard() == [["STOPPING=1"], ["EXTEND_TIMEOUT_USEC=10000000"]]
    told = []
    for second in range(1, 40):
        await trio.sleep(1.0 if second > 1 else 1.1)
        told += [
            second + int(line.removeprefix("EXTEND_TIMEOUT_USEC=")) / 1e6
            for message in manager_socket.heard()
            for line in message
            if line.startswith("EXTEND")
        ]
    assert len(told) == 14
    assert max(told) <= 15.0
    manager.ready()  # of a reload that was under way: the end counts
    assert manager_socket.heard() == []


async def test_the_watchdog_is_fed_while_the_service_ends(
    manager_socket: Systemd, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    told = {"NOTIFY_SOCKET": manager_socket.address, "WATCHDOG_USEC": "2000000"}
    ending = Ending()
    nursery.start_soon(take_over(told).run, Service(), ending)
    ending.begin(trio.current_time() + 15.0)
    assert await manager_socket.times_within(10, "WATCHDOG=1") >= 10


async def test_a_reload_is_told_with_its_moment_and_followed_by_ready(
    manager_socket: Systemd,
) -> None:
    manager, before = (
        take_over({"NOTIFY_SOCKET": manager_socket.address}),
        time.monotonic_ns() // 1_000,
    )
    manager.reloading()
    manager.ready()
    ((reloading, moment), ready) = manager_socket.heard()
    assert (reloading, ready) == ("RELOADING=1", ["READY=1"])
    name, _, microseconds = moment.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(microseconds) <= time.monotonic_ns() // 1_000


# ------------------------------------------------------------------------------------------------- when it is not there


async def test_what_must_be_heard_is_told_again_until_it_is_taken(
    tmp_path: Path, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    address = str(tmp_path / "notify")
    manager, service = take_over({"NOTIFY_SOCKET": address}), Service(status="first")
    nursery.start_soon(manager.run, service, Ending())
    manager.ready()
    await trio.sleep(10.5)  # nobody listens there yet
    service.status = "later"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as receiver:
        receiver.bind(address)
        await trio.sleep(5)
        assert Systemd(receiver, address).heard() == [["READY=1", "STATUS=later"]]


async def test_a_socket_that_is_full_or_goes_away_hurts_nobody(
    manager_socket: Systemd, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    told = {"NOTIFY_SOCKET": manager_socket.address, "WATCHDOG_USEC": "1000000"}
    manager, service = take_over(told), Service()
    nursery.start_soon(manager.run, service, Ending())
    for number in range(2000):  # far more than a datagram socket takes
        service.status = f"{number}"
        await trio.sleep(1)
    assert 0 < len(manager_socket.heard()) < 2000
    await trio.sleep(2)
    assert ["STATUS=1999"] in manager_socket.heard()
    manager_socket.receiver.close()
    await trio.sleep(10)
    manager.ready()
    manager.reloading()


@pytest.mark.parametrize("told", [{}, {"NOTIFY_SOCKET": "vsock:2:1234"}, {"NOTIFY_SOCKET": "@"}])
async def test_without_a_socket_of_ours_nothing_is_told(told: dict[str, str]) -> None:
    manager = take_over(told)
    await manager.run(Service(), Ending())  # returns
    manager.reloading()
    manager.ready()
    assert told == {}


# ------------------------------------------------------------------------------------------------------- what it gives


def test_what_was_handed_over_is_taken_out_of_the_environment() -> None:
    environ = {
        "NOTIFY_SOCKET": "@x",
        "WATCHDOG_USEC": "1",
        "WATCHDOG_PID": "1",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "web",
        "PATH": "/bin",
    }
    take_over(environ)
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize("microseconds", ["abc", "0", "-1", "1.5", "٣"])
def test_a_watchdog_s_time_that_is_no_number_is_left_out(microseconds: str) -> None:
    assert take_over({"WATCHDOG_USEC": microseconds}).watchdog_s is None


@pytest.mark.parametrize("count", ["abc", "-1", "65", "1.0"])
def test_a_count_of_sockets_that_is_no_number_is_left_out(count: str) -> None:
    assert take_over({"LISTEN_FDS": count, "LISTEN_PID": str(os.getpid())}).sockets == {}


def test_sockets_that_were_meant_for_another_process_are_left_alone() -> None:
    for pid in ("", str(os.getpid() + 1)):
        assert take_over({"LISTEN_FDS": "1", "LISTEN_PID": pid}).sockets == {}


_CHILD = """
import json, os, socket, subprocess, sys
os.environ["LISTEN_PID"] = str(os.getpid())  # as systemd sets it between fork and exec
from stationmaster.service.systemd import take_over
manager = take_over(os.environ)
web = manager.web_socket
print(json.dumps({
    "names": list(manager.sockets),
    "port": web and web.getsockname()[1],
    "inherited": [each.get_inheritable() for each in manager.sockets.values()],
    "blocking": [each.getblocking() for each in manager.sockets.values()],
    "left": [name for name in os.environ if name.startswith("LISTEN")],
    "sockets_of_children": subprocess.run(
        ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True
    ).stdout.count("socket:"),
}))
"""


def hand_over(*descriptors: int, count: int, names: str) -> dict[str, object]:
    """Let a child of ours find these as descriptors 3, 4, ... and return what it took."""
    moves = "; ".join(f"os.dup2({fd}, {100 + i})" for i, fd in enumerate(descriptors))
    places = "; ".join(
        f"os.dup2({100 + i}, {3 + i}, inheritable=True)" for i in range(len(descriptors))
    )
    starter = (
        f"import os, sys; {moves or 'pass'}; {places or 'pass'}; os.closerange(3 + {len(descriptors)}, 200); "
        f"os.execv(sys.executable, [sys.executable, '-c', {_CHILD!r}])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", starter],
        env={**os.environ, "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names},
        pass_fds=descriptors,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(answer.stdout.splitlines()[-1])
    return found


def test_a_listening_socket_is_taken_over_by_its_name_and_children_do_not_get_it() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        found = hand_over(listening.fileno(), count=1, names="web")
        port = listening.getsockname()[1]
    assert found["names"] == ["web"]
    assert found["port"] == port
    assert found["inherited"] == found["blocking"] == [False]
    assert found["left"] == []
    assert found["sockets_of_children"] == 0


def test_the_only_socket_is_the_web_server_s_whatever_its_name() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        found = hand_over(listening.fileno(), count=1, names="stationmaster@x.socket")
        assert found["port"] == listening.getsockname()[1]


def test_of_several_sockets_the_one_named_web_is_the_web_server_s() -> None:
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as one,
        closing(socket.create_server(("127.0.0.1", 0))) as two,
    ):
        found = hand_over(one.fileno(), two.fileno(), count=2, names="other:web")
        assert found["port"] == two.getsockname()[1]
        found = hand_over(one.fileno(), two.fileno(), count=2, names="")
        assert (found["names"], found["port"]) == (["socket-0", "socket-1"], None)


def test_what_does_not_listen_is_left_out() -> None:
    with (
        closing(socket.socket()) as idle,
        closing(socket.socket(type=socket.SOCK_DGRAM)) as datagrams,
        open(os.devnull, "rb") as file,
        closing(socket.create_server(("127.0.0.1", 0))) as listening,
    ):
        descriptors = (idle.fileno(), datagrams.fileno(), file.fileno(), listening.fileno())
        found = hand_over(*descriptors, count=6, names="a:b:c:d:e:d")
        assert found["names"] == ["d"]


def test_a_manager_of_nobody_has_nothing() -> None:
    manager = Manager()
    assert (manager.watchdog_s, manager.web_socket, dict(manager.sockets)) == (None, None, {})
