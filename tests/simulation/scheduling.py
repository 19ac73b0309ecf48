"""Trio, made to repeat itself: the order of tasks by a seed, a hand on every step, and threads without a will."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random


@contextmanager
def seeded_scheduler(seed: int) -> Iterator[None]:
    """Let trio run the tasks of a tick in an order that the seed decides.

    This is a private hook of trio; there is no public one.

    Raises:
        RuntimeError: trio has moved it.
    """
    scheduler: Any = sys.modules["trio._core._run"]
    if not hasattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING") or not hasattr(scheduler, "_r"):
        raise RuntimeError(
            f"trio {trio.__version__} has moved its hook for deterministic scheduling: without it "
            "no history repeats itself"
        )
    dice: Random = scheduler._r
    state = dice.getstate()
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    dice.seed(seed)
    try:
        yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before
        dice.setstate(state)


class AfterSteps(trio.abc.Instrument):
    """Calls a function once, between two steps of tasks: a place for a crash that no program can choose."""

    def __init__(self, steps: int, call: Callable[[], None]) -> None:
        self._left = steps
        self._call = call

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # type: ignore[explicit-override]
        """Count."""
        self._left -= 1
        if self._left == 0:
            self._call()

    def disarm(self) -> None:
        """Count no more."""
        trio.lowlevel.remove_instrument(self)


class _KilledError(BaseException):
    """The process of a thread is gone."""


class _Thread:
    """A plain function in a thread that runs only while trio's thread stands still."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._go = threading.Semaphore(0)
        self._stop = threading.Semaphore(0)
        self._pause_s: float | None = None
        self._killed = False
        self.outcome: outcome.Outcome[object] | None = None
        self.ended = trio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _current.thread = self
        self._go.acquire()
        self.outcome = outcome.capture(self._call)
        self._pause_s = None
        self._stop.release()

    def step(self) -> float | None:
        """Let it run until it sleeps: for so many seconds; or until it ends: None."""
        self._go.release()
        self._stop.acquire()
        return self._pause_s

    def sleep(self, seconds: float) -> None:
        """Be what the function calls, in its thread."""
        self._pause_s = seconds
        self._stop.release()
        self._go.acquire()
        if self._killed:
            raise _KilledError

    def kill(self) -> None:
        """End it where it sleeps."""
        self._killed = True
        while self.outcome is None:
            self.step()
        self._thread.join()


_current: Final = threading.local()


def sleep_in_thread(seconds: float) -> None:
    """Sleep in virtual time, in a function that a simulated thread runs."""
    _current.thread.sleep(seconds)


class Threads:
    """Stands in for `trio.to_thread.run_sync`: its threads take turns with trio, on trio's clock.

    A real thread and a virtual clock do not go together: the clock leaps while the thread works.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        """Args: `nursery`: the process; when that is cancelled its threads are gone."""
        self._nursery = nursery

    async def run_sync(
        self,
        function: Callable[..., Any],
        *args: object,
        thread_name: str | None = None,
        abandon_on_cancel: bool = False,
        limiter: trio.CapacityLimiter,
    ) -> Any:
        """Do what trio's own does."""
        await trio.lowlevel.checkpoint_if_cancelled()
        holder = object()
        await limiter.acquire_on_behalf_of(holder)
        thread = _Thread(lambda: function(*args))
        self._nursery.start_soon(self._see_through, thread, limiter, holder, name=thread_name)
        with trio.CancelScope(shield=not abandon_on_cancel):
            await thread.ended.wait()
        assert thread.outcome is not None
        return thread.outcome.unwrap()

    async def _see_through(
        self, thread: _Thread, limiter: trio.CapacityLimiter, holder: object
    ) -> None:
        try:
            while (pause_s := thread.step()) is not None:  # noqa: ASYNC110 - it is the thread that sleeps
                await trio.sleep(pause_s)
        except trio.Cancelled:
            thread.kill()
            raise
        limiter.release_on_behalf_of(holder)
        thread.ended.set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Be what `trio.to_thread.run_sync` calls."""
        real = trio.to_thread.run_sync
        trio.to_thread.run_sync = self.run_sync  # type: ignore[assignment]
        try:
            yield
        finally:
            trio.to_thread.run_sync = real
