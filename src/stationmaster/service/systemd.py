"""systemd's side of the service: what it hands over at the start, and what it is told while the service runs.

Rules:
1. A manager that is not there, or takes nothing, never hurts the service. What it must hear all the same (READY,
   STOPPING, STATUS) is told again every second until it is taken; the rest is outdated by then.
2. The watchdog is fed at half of its time, and only while the service makes progress; a loop that is blocked feeds
   nothing.
3. While the service ends, its stop time-out is put off again and again, never beyond the end that it has set itself.
4. What is handed over is taken out of the environment: children must not speak in our name.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import structlog
import trio

from stationmaster.service.config_rules import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from stationmaster.service.shutdown import Ending

_FIRST_SOCKET: Final = 3
_MOST_SOCKETS: Final = 64
_TICK_S: Final = 1.0
_EXTENSION_S: Final = 10.0
"""The stop time-out is put off by this much every second: a loop that blocks meanwhile is ended after it."""
_STATUS_CHARS: Final = 300


class Supervised(Protocol):
    """What systemd is told of."""

    @property
    def is_live(self) -> bool:
        """Whether the watchdog may be fed."""
        ...

    def summary(self) -> str:
        """Say in one line how the service is."""
        ...


@attrs.define(eq=False)
class Manager:
    """The service manager, or nobody. Made by `take_over`."""

    _address: str | None = None
    watchdog_s: float | None = None
    """It wants a sign of life this often; None: never."""
    sockets: Mapping[str, socket.socket] = attrs.field(factory=dict)
    """Listening sockets that it opened for us, by their names (`FileDescriptorName=`)."""
    _owed: dict[str, str] = attrs.field(factory=dict, init=False)
    """What it must hear and has not taken yet, in order."""
    _told: str = attrs.field(default="", init=False)
    """The last status that it took."""
    _stopping: bool = attrs.field(default=False, init=False)
    _fed_at: float = attrs.field(default=float("-inf"), init=False)

    @property
    def web_socket(self) -> socket.socket | None:
        """The one for the web server: that of this name, or the only one."""
        only = next(iter(self.sockets.values())) if len(self.sockets) == 1 else None
        return self.sockets.get("web", only)

    # ---------------------------------------------------------------------------------------------------- what is told

    def ready(self) -> None:
        """The service has started, or has reloaded. Nothing once it ends."""
        if not self._stopping:
            self._owe(READY="1")

    def reloading(self) -> None:
        """The service reads its configuration again: `ready` must follow."""
        self._owed.pop("READY", None)
        self._send({"RELOADING": "1", "MONOTONIC_USEC": str(time.monotonic_ns() // 1_000)})

    async def run(self, service: Supervised, ending: Ending) -> None:
        """Tell it how the service is until cancelled."""
        await trio.lowlevel.checkpoint()
        if self._address is None:
            return
        while not ending.begun.is_set():
            self._tell_status(service)
            self._feed(service)
            with trio.move_on_after(self._tick_s):
                await ending.begun.wait()
        self._stopping = True
        self._owed.pop("READY", None)
        self._owe(STOPPING="1")
        while True:
            self._put_off(ending.limit)
            self._tell_status(service)
            self._feed(service)
            await trio.sleep(self._tick_s)

    @property
    def _tick_s(self) -> float:
        return _TICK_S if self.watchdog_s is None else min(_TICK_S, self.watchdog_s / 4)

    def _feed(self, service: Supervised) -> None:
        now = trio.current_time()
        # A tick early rather than one late.
        due = (
            self.watchdog_s is not None and now + self._tick_s > self._fed_at + self.watchdog_s / 2
        )
        if due and service.is_live:
            self._fed_at = now
            self._send({"WATCHDOG": "1"})

    def _put_off(self, limit: float) -> None:
        left_s = min(limit - trio.current_time(), _EXTENSION_S)
        if left_s > 0:
            self._send({"EXTEND_TIMEOUT_USEC": str(round(left_s * 1e6))})

    def _tell_status(self, service: Supervised) -> None:
        status = printable(service.summary())[:_STATUS_CHARS]
        self._owed.pop("STATUS", None)  # an older one that was not taken
        if status != self._told:
            self._owed["STATUS"] = status
        self._settle()
        if "STATUS" not in self._owed:
            self._told = status

    def _owe(self, **assignments: str) -> None:
        self._owed.update(assignments)
        self._settle()

    def _settle(self) -> None:
        if self._owed and self._send(self._owed):
            self._owed.clear()

    def _send(self, assignments: Mapping[str, str]) -> bool:
        """Tell it something; return whether it took it. Never waits, never raises."""
        if self._address is None:
            return True
        lines = "\n".join(f"{name}={value}" for name, value in assignments.items())
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                sender.sendto(lines.encode(), self._address)
        except OSError:  # gone, full, or never there: rule 1
            return False
        return True


def take_over(environ: MutableMapping[str, str]) -> Manager:
    """Take what systemd handed over out of the environment of this process.

    What is malformed, or meant for another process, is left out with a warning; nothing raises. Once per process.
    """
    told = {name: environ.pop(name, "") for name in _NAMES}
    return Manager(_address_of(told["NOTIFY_SOCKET"]), _watchdog_s(told), _sockets(told))


_NAMES: Final = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)


def _address_of(told: str) -> str | None:
    if told.startswith("@") and len(told) > 1:  # in the abstract name space
        return "\0" + told[1:]
    if told.startswith("/"):
        return told
    if told:
        _warn("NOTIFY_SOCKET", told, "an absolute path, or @name; nothing is told to systemd")
    return None


def _watchdog_s(told: Mapping[str, str]) -> float | None:
    microseconds = told["WATCHDOG_USEC"]
    if not microseconds or not _is_ours(told["WATCHDOG_PID"]):
        return None
    if not (microseconds.isascii() and microseconds.isdigit() and int(microseconds)):
        _warn("WATCHDOG_USEC", microseconds, "a number of microseconds; the watchdog is not fed")
        return None
    return int(microseconds) / 1e6


def _sockets(told: Mapping[str, str]) -> dict[str, socket.socket]:
    count = told["LISTEN_FDS"]
    # Without our pid they were meant for somebody else, whose child we are.
    if not count or told["LISTEN_PID"] != str(os.getpid()):
        return {}
    if not (count.isascii() and count.isdigit() and int(count) <= _MOST_SOCKETS):
        _warn("LISTEN_FDS", count, f"a number up to {_MOST_SOCKETS}; no socket is taken over")
        return {}
    names = told["LISTEN_FDNAMES"].split(":") if told["LISTEN_FDNAMES"] else []
    sockets: dict[str, socket.socket] = {}
    for index in range(int(count)):
        descriptor = _FIRST_SOCKET + index
        name = names[index] if index < len(names) else f"socket-{index}"
        if name in sockets or (found := _listening(descriptor)) is None:
            _warn(
                "LISTEN_FDS", f"{name} ({descriptor})", "one listening stream socket for each name"
            )
        else:
            sockets[name] = found
    return sockets


def _listening(descriptor: int) -> socket.socket | None:
    """Return the descriptor as the socket that it is; None if it is not one that accepts connections."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        os.set_inheritable(descriptor, False)  # not even what we have no use for
        found = socket.socket(fileno=descriptor)
    except OSError:
        return None
    if found.type is not socket.SOCK_STREAM or not found.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        found.detach()
        return None
    found.setblocking(False)
    return found


def _is_ours(pid: str) -> bool:
    return not pid or pid == str(os.getpid())


def _warn(name: str, told: str, expected: str) -> None:
    log = structlog.stdlib.get_logger("stationmaster")
    log.warning(
        "what systemd handed over is not understood", variable=name, told=told, expected=expected
    )
