"""How long garbage collections stop the process, and how late the event loop's timers are."""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio

from stationmaster.service.metrics import definitions as d
from stationmaster.service.metrics.moments import histogram_family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

_EVERY_S: Final = 0.25


class GcPauses:
    """A histogram of its own making.

    A collection may begin anywhere, also while this very thread holds the lock of a `prometheus_client` metric: to
    count its pause in one of those would wait for ever. Collections never overlap, so plain numbers will do.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | None = None
        self._bounds = d.GC_PAUSE.buckets
        generations = d.GC_PAUSE.labels[0].values
        self._counts = {one: [0] * (len(self._bounds) + 1) for one in generations}
        self._sums = dict.fromkeys(generations, 0.0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Listen to the collector until the block is left."""
        gc.callbacks.append(self._on_phase)
        try:
            yield
        finally:
            gc.callbacks.remove(self._on_phase)

    def _on_phase(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = self._clock()
        elif self._began is not None:  # else it began before anybody listened
            seconds = self._clock() - self._began
            generation = str(info["generation"])
            self._counts[generation][bisect_left(self._bounds, seconds)] += 1
            self._sums[generation] += seconds

    def collect(self) -> Iterable[Metric]:
        """Yield the histogram."""
        yield histogram_family(
            d.GC_PAUSE,
            {
                (generation,): (tuple(counts), self._sums[generation])
                for generation, counts in self._counts.items()
            },
        )


async def watch_loop(observe: Callable[[float], None]) -> None:
    """Tell how late each of four timers a second fires, until cancelled."""
    due = trio.current_time() + _EVERY_S
    while True:
        await trio.sleep_until(due)
        now = trio.current_time()
        observe(max(0.0, now - due))
        due = now + _EVERY_S
