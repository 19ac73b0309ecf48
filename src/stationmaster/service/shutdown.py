"""How the service ends: what signals do, the exit codes, and the last resort for what cannot be cancelled."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Self

import attrs
import structlog
import trio

if TYPE_CHECKING:
    from types import FrameType

    from stationmaster.pipeline import Pipeline

EXIT_OK = 0
EXIT_USAGE = 64
EXIT_INTERNAL = 70
EXIT_CUT_SHORT = 75
EXIT_CONFIG = 78

# After the grace: whatever still hangs then (a client library's thread) is left behind.
_LAST_RESORT_S = 10.0


@attrs.define(eq=False)
class LastResort:
    """Ends the process after a while, come what may: a thread, or a handler that shields itself, goes on for ever."""

    _timers: list[threading.Timer] = attrs.field(factory=list)

    def arm(self, seconds: float, code: int) -> None:
        """End the process so many seconds from now; the earliest time counts."""
        timer = threading.Timer(seconds, self._leave, (code,))
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def __enter__(self) -> Self:
        """Arm it within the block only."""
        return self

    def __exit__(self, *_: object) -> None:
        """Everything ended by itself."""
        for timer in self._timers:
            timer.cancel()

    @staticmethod
    def _leave(code: int) -> None:
        sys.stderr.write("stationmaster: something hangs past the grace; leaving it behind\n")
        sys.stderr.flush()
        os._exit(code)


@attrs.define(eq=False)
class Ending:
    """When the service ends, and by when at the latest."""

    begun: trio.Event = attrs.field(factory=trio.Event, init=False)
    limit: float = attrs.field(default=0.0, init=False)
    """On trio's clock."""

    def begin(self, limit: float) -> None:
        """It ends; the first call counts."""
        if not self.begun.is_set():
            self.limit = limit
            self.begun.set()


@attrs.define(eq=False)
class Shutdown:
    """What signals do: the first drains the pipeline, the second stops it at once."""

    grace_s: float
    last_resort: LastResort = attrs.field(factory=LastResort)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Around everything that is opened after the signals."""
    pipeline: Pipeline | None = None
    requests: int = 0
    ending: Ending = attrs.field(factory=Ending, init=False)
    _watched: trio.Event = attrs.field(factory=trio.Event, init=False)

    def watch(self, pipeline: Pipeline) -> None:
        """Hand over the pipeline; it is drained at once if that was asked for already."""
        self.pipeline = pipeline
        self._watched.set()
        if self.requests:
            pipeline.drain(grace_s=self.grace_s)

    def request(self) -> None:
        """Take one signal."""
        self.requests += 1
        self._begin_the_end()
        log = structlog.stdlib.get_logger("stationmaster")
        if self.requests == 1:
            log.info("draining", grace_s=self.grace_s)
            if self.pipeline is None:
                self.scope.cancel()
            else:
                self.pipeline.drain(grace_s=self.grace_s)
        else:
            log.warning("stopping now", open_batches="come again after the next start")
            self.last_resort.arm(_LAST_RESORT_S, EXIT_CUT_SHORT)
            if self.pipeline is not None:
                self.pipeline.drain(grace_s=0)
            self.scope.cancel()

    async def limit_the_end(self) -> None:
        """Arm the last resort when the pipeline ends by itself or by an error: a handler may hang then, too."""
        await self._watched.wait()
        assert self.pipeline is not None  # noqa: S101 - it came with the event
        await self.pipeline.wait_ending()
        self._begin_the_end()
        code = EXIT_CUT_SHORT if self.requests else EXIT_INTERNAL
        self.last_resort.arm(self.grace_s + _LAST_RESORT_S, code)

    def _begin_the_end(self) -> None:
        self.ending.begin(trio.current_time() + self.grace_s + _LAST_RESORT_S)

    async def listen(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Take SIGTERM and SIGINT until cancelled."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._arm_before(number)
            task_status.started()
            async for _ in signals:
                self.request()

    def _arm_before(self, number: signal.Signals) -> None:
        """Let a signal arm the last resort even while a handler blocks the loop: Python runs this between two steps."""
        pass_on = signal.getsignal(number)
        assert callable(pass_on)  # noqa: S101 - trio has just installed it; it puts the old one back, too

        def arm_and_pass_on(signum: int, frame: FrameType | None) -> None:
            self.last_resort.arm(self.grace_s + _LAST_RESORT_S, EXIT_CUT_SHORT)
            pass_on(signum, frame)

        signal.signal(number, arm_and_pass_on)
