"""What a clock that jumps cannot do.

`trio.testing.MockClock(autojump_threshold=0)` jumps to the next deadline whenever all tasks wait. It does not see work
in a thread or an answer on its way through a socket: there it jumps too early, and everything times out.
"""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock


def refuse_jumping_clock(what: str) -> None:
    """Check that trio's clock does not jump by itself.

    Raises:
        RuntimeError: it does.
    """
    clock = trio.lowlevel.current_clock()
    if isinstance(clock, MockClock) and clock.autojump_threshold != math.inf:
        raise RuntimeError(
            f"{what}, and this clock jumps to the next deadline meanwhile: run this test on the real clock, with "
            "deadlines of milliseconds"
        )
