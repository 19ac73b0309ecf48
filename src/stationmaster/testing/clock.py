"""What a clock that jumps cannot see.

`trio.testing.MockClock(autojump_threshold=0)` jumps to the next deadline whenever all tasks wait. It does not see work
in a thread or an answer on its way through a socket: there it jumps too early, and what waits for them times out.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio
from trio.testing import MockClock

if TYPE_CHECKING:
    from collections.abc import Iterator

_ADVICE: Final = "run this test on the real clock, with deadlines of a tenth of a second or more"


def _jumps(clock: trio.abc.Clock) -> bool:
    return isinstance(clock, MockClock) and clock.autojump_threshold != math.inf


def refuse_jumping_clock(what: str) -> None:
    """Check that trio's clock does not jump by itself.

    Raises:
        RuntimeError: it does.
    """
    if _jumps(trio.lowlevel.current_clock()):
        raise RuntimeError(
            f"{what}, and this clock jumps to the next deadline meanwhile: {_ADVICE}"
        )


@attrs.define(eq=False)
class _JumpWatch(trio.abc.Instrument):
    """Compares the time before and after all tasks waited, if a thread worked meanwhile."""

    clock: trio.abc.Clock
    threads: trio.CapacityLimiter
    jumped: bool = False
    _asleep_at: float | None = None

    def before_io_wait(self, timeout: float) -> None:  # type: ignore[explicit-override]  # typing.override came with Python 3.12
        del timeout
        self.look()
        self._asleep_at = self.clock.current_time() if self.threads.borrowed_tokens else None

    def look(self) -> None:
        if self._asleep_at is not None and self.clock.current_time() != self._asleep_at:
            self.jumped = True


@contextmanager
def told_if_clock_jumps_over_threads() -> Iterator[None]:
    """Watch for a jump while a thread of trio's default limiter works (`trio.to_thread`, `trio.open_file`).

    Raises:
        RuntimeError: there was one, and the block raised nothing else.
    """
    clock = trio.lowlevel.current_clock()
    if not _jumps(clock):
        yield
        return
    watch = _JumpWatch(clock, trio.to_thread.current_default_thread_limiter())
    trio.lowlevel.add_instrument(watch)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(watch)
    watch.look()
    if watch.jumped:
        raise RuntimeError(
            f"the clock jumped while a thread worked, so nothing is in time: {_ADVICE}"
        )
