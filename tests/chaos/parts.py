"""Processes that come and go: each is kept running, struck by signals, and judged at its end."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

ROOT: Final = Path(__file__).parents[2]
READY_S: Final = 30.0
END_S: Final = 90.0
"""After SIGTERM: a grace, the last resort behind it, and that it may be stopped or robbed of its broker meanwhile."""
_AGAIN_S: Final = 1.0
"""Before a process is started again that ended by itself."""
_LINE_BYTES: Final = 1_000_000


class PartError(Exception):
    """A process did not start, or did not end; the message says which."""


@attrs.frozen
class End:
    """How one life of a process ended."""

    code: int
    signals: tuple[signal.Signals, ...]
    """Sent to it, SIGSTOP and SIGCONT aside."""
    listened: bool
    """It had said anything."""
    excuse: str
    """What was wrong around it, that may have made it end."""

    def fault(self) -> str | None:
        """Return what is wrong with it: it ends by our signals only, and by SIGTERM in order."""
        fine = set[int]()
        if self.signals:
            fine |= {0, 75}
            # Python's own answer, before the service begins to listen, or to a second one at its very end.
            if not self.listened or self.signals.count(signal.SIGTERM) > 1:
                fine.add(-signal.SIGTERM)
        if signal.SIGKILL in self.signals:
            fine.add(-signal.SIGKILL)
        if self.excuse:
            fine.add(75)
        if self.code in fine:
            return None
        return f"ended with code {self.code} after {[each.name for each in self.signals]} {self.excuse}".strip()


@attrs.define(eq=False, kw_only=True)
class Part:
    """A process that is started again whenever it ends."""

    role: str
    arguments: tuple[str, ...]
    """After `python -m`."""
    log: Path
    environment: Mapping[str, str] = attrs.field(factory=dict)
    address_after: str = ""
    """The address is the rest of the first line that holds this; its port is asked for again at every start."""
    on_event: Callable[[Mapping[str, Any]], object] = lambda _said: None
    """Takes every JSON line of its output."""
    address: str = ""
    process: trio.Process | None = None
    ends: list[End] = attrs.field(factory=list)
    stops: list[list[float]] = attrs.field(factory=list)
    """[beginning, end] of each SIGSTOP, on trio's clock."""
    excuses: list[str] = attrs.field(factory=list)
    """What is wrong around it now."""
    tracebacks: int = 0
    retired: bool = False
    started: trio.Event = attrs.field(factory=trio.Event)
    """Set, and made anew, at each start."""
    _ready: trio.Event = attrs.field(factory=trio.Event)
    _signals: list[signal.Signals] = attrs.field(factory=list)
    _lines: int = 0
    _patience: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    @property
    def alive(self) -> bool:
        """Whether it runs now (or is stopped)."""
        return self.process is not None and self.process.returncode is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it lives; SIGKILL and SIGTERM set a limit to its end."""
        if self.process is None or self.process.returncode is not None:
            return
        if number in {signal.SIGKILL, signal.SIGTERM}:
            self._signals.append(number)
            self._patience.deadline = min(self._patience.deadline, trio.current_time() + END_S)
        self.process.send_signal(number)

    def stop(self) -> list[float]:
        """Send SIGSTOP; returns what `go_on` wants."""
        self.send(signal.SIGSTOP)
        self.stops.append([trio.current_time(), float("inf")])
        return self.stops[-1]

    def go_on(self, stop: list[float]) -> None:
        """Send SIGCONT."""
        stop[1] = trio.current_time()
        self.send(signal.SIGCONT)

    def limit_handles(self) -> None:
        """Let it open no file and no socket more than it has now; not while it loads its modules."""
        if self._lines:
            self._set_handles(leave=0)

    def free_handles(self) -> None:
        """End that."""
        self._set_handles(leave=None)

    def _set_handles(self, *, leave: int | None) -> None:
        if not self.alive or self.process is None:
            return
        pid = self.process.pid
        try:
            _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            used = max((int(name) for name in os.listdir(f"/proc/{pid}/fd")), default=0) + 1
            soft = most if leave is None else min(most, used + leave)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, most))
        except (ProcessLookupError, FileNotFoundError):
            pass  # it has just ended

    def was_stopped(self, since: float) -> bool:
        """Tell whether it was stopped at any moment since then."""
        return any(end >= since for _, end in self.stops)

    async def keep_running(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Let one process follow the other until `retire`; started when the first one is ready.

        Raises:
            PartError: it did not become ready, or did not end within its time.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._live)
            with trio.move_on_after(READY_S):
                await self._ready.wait()
            if not self._ready.is_set():
                raise PartError(f"the {self.role} is not ready after {READY_S:g} s; see {self.log}")
            task_status.started()

    async def _live(self) -> None:
        while not self.retired:
            self._signals, self._lines, self._patience = [], 0, trio.CancelScope()
            async with self._open() as process:
                self.process = process
                if not self.address_after:
                    self._ready.set()
                self.started.set()
                self.started = trio.Event()
                with self._patience:
                    await process.wait()
                code = process.returncode
            if code is None:
                raise PartError(f"the {self.role} did not end within {END_S:g} s; see {self.log}")
            excuse = ", ".join(self.excuses)
            self.ends.append(End(code, tuple(self._signals), self._lines > 0, excuse))
            if not self._signals and not self.retired:
                await trio.sleep(_AGAIN_S)

    async def retire(self) -> int:
        """End it by SIGTERM, for good; returns its exit code."""
        self.retired = True
        process = self.process
        if process is None:
            await trio.lowlevel.checkpoint()
            return -1
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        return await process.wait()

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[trio.Process]:
        with self.log.open("ab", buffering=0) as sink:
            # Its life hangs on its standard input. A group of its own keeps Ctrl-C away from it; and when we are gone,
            # however, the kernel wakes a group whose members are stopped, so that they see that their input ended.
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                process_group=0,
            )
            assert process.stdin is not None
            assert process.stdout is not None
            async with process.stdin, process.stdout, trio.open_nursery() as nursery:
                nursery.start_soon(self._read, process.stdout, sink.write)
                try:
                    yield process
                finally:
                    if process.returncode is None:
                        process.kill()
                        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                            await process.wait()
                    nursery.cancel_scope.deadline = trio.current_time() + 2.0  # for its last lines

    async def _read(
        self, stream: trio.abc.ReceiveStream, keep: Callable[[bytes | bytearray], object]
    ) -> None:
        rest = b""
        async for chunk in stream:
            keep(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-_LINE_BYTES:]
            for line in lines:
                self._take(line.decode(errors="replace"))

    def _take(self, line: str) -> None:
        self._lines += 1
        self.tracebacks += line.startswith("Traceback") or '"exception"' in line
        if self.address_after and not self.address and self.address_after in line:
            self.address = line.rpartition(self.address_after)[2].rstrip('"}')
            self._ready.set()
        if line.startswith("{") and line.endswith("}"):
            self.on_event(json.loads(line))
