"""How long a process was ready to run and the machine let it wait: what of a delay is none of its own doing."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
from trio_util import periodic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LOOK_EVERY_S: Final = 0.05


@attrs.define(eq=False)
class Waits:
    """Looks at a process again and again; `watch` must run."""

    find_pid: Callable[[], int | None]
    """Asked each time: the process may be another one by now, or not be there."""
    _times: list[float] = attrs.field(factory=list, init=False)
    _totals: list[float] = attrs.field(factory=list, init=False)
    """Seconds waited in all, at each of the times."""
    _threads: dict[str, int] = attrs.field(factory=dict, init=False)

    async def watch(self) -> None:
        """Look until cancelled."""
        async for _ in periodic(_LOOK_EVERY_S):
            self._look()

    def in_life_of(self, report: Mapping[str, Any], *, before_s: float = 0.0) -> float:
        """Return the seconds that were waited from a batch's opening (or so long before it) to its closing.

        Rounded out to the next looks. All threads count, for each may hold what another one needs. The kernel books
        a wait when it is over.
        """
        if not self._times:
            return 0.0
        began, ended = (
            datetime.fromisoformat(report[name]).timestamp() for name in ("openedAt", "closedAt")
        )
        began -= before_s
        first = max(bisect_right(self._times, began) - 1, 0)
        last = min(bisect_left(self._times, ended), len(self._times) - 1)
        return self._totals[last] - self._totals[first]

    def _look(self) -> None:
        pid, waited_ns = self.find_pid(), 0
        threads = sorted(Path(f"/proc/{pid}/task").glob("*")) if pid is not None else []
        for thread in threads:
            try:
                now = int((thread / "schedstat").read_text().split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it has ended
            before = self._threads.get(thread.name, 0)
            waited_ns += now - before if now >= before else now  # the kernel uses numbers again
            self._threads[thread.name] = now
        self._totals.append((self._totals[-1] if self._totals else 0.0) + waited_ns / 1e9)
        self._times.append(time.time())
