"""Workers: those who run a pipeline's handler, whichever kind it is.

A handler's kind shows in its signature:

    async def handle(station)                 one task per station
    def handle(station)                       the same, and each call in a thread
    async def handle_batch(batch, report)     one call per batch, in lanes
"""

from __future__ import annotations

import inspect
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, cast

from stationmaster.batch_handlers import open_batch_lanes
from stationmaster.result_hook import open_result_hook
from stationmaster.stations import open_stations
from stationmaster.threads import ThreadedHandler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from stationmaster.abc import (
        BatchHandler,
        BlockingHandler,
        Handler,
        Observer,
        ResultHook,
        StationHandler,
    )
    from stationmaster.outcomes import Collecting
    from stationmaster.result_hook import HookQueue
    from stationmaster.settings import PipelineSettings

Kind: TypeAlias = Literal["station", "blocking", "batch"]

_FORMS = (
    "expected `async def handle(station)`, `def handle(station)` (called in a thread), or "
    "`async def handle_batch(batch, report)`"
)


class Workers(Protocol):
    """What a pipeline needs of those who run its handler."""

    async def hand_over(
        self, collecting: Collecting, station_ids: Iterable[str] | None = None, /
    ) -> None:
        """Hand over every station of an open batch (or these, which joined it), or settle it.

        Never waits for a handler.
        """
        ...

    def expected_wait_s(self, station_ids: Iterable[str], /, *, topic: str) -> float:
        """Estimate when a job given to these stations now, for a batch of that topic, would be answered."""
        ...

    def __len__(self) -> int:
        """Return how many are live."""
        ...


def kind_of(handler: object) -> Kind:
    """Tell a handler's kind.

    Raises:
        TypeError: it is none of them, or its signature does not show which.
    """
    name = getattr(handler, "__qualname__", type(handler).__qualname__)
    if not callable(handler) or inspect.isclass(handler):
        raise TypeError(f"{name} is no function; {_FORMS}")
    # An object is looked at by its `__call__`; a function, partial or not, as it is.
    call = handler if inspect.isroutine(handler) else getattr(handler, "__call__")  # noqa: B004, B009
    if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise TypeError(f"{name} is a generator; {_FORMS}")
    parameters = _required(handler, name)
    is_async = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call)
    if parameters == 1:
        return "station" if is_async else "blocking"
    if parameters == 2 and is_async:
        return "batch"
    what = "a plain function" if parameters == 2 else f"a function of {parameters} parameters"
    raise TypeError(f"{name} is {what}; {_FORMS}")


def _required(handler: Callable[..., object], name: str) -> int:
    """Count the parameters that a call must give; one that may have one counts as one."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except ValueError:
        raise TypeError(f"{name} has no signature; {_FORMS}") from None
    positional = [p for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise TypeError(f"{name} demands the keyword {parameter.name}; {_FORMS}")
        if parameter.kind is parameter.VAR_POSITIONAL and not positional:
            raise TypeError(f"{name} takes any number of parameters; {_FORMS}")
    required = sum(parameter.default is parameter.empty for parameter in positional)
    return required or min(len(positional), 1)


def check_hook(on_result: ResultHook) -> None:
    """Check that this may be a result hook.

    Raises:
        TypeError: it is no coroutine function of two parameters.
    """
    name = getattr(on_result, "__qualname__", type(on_result).__qualname__)
    try:
        fits = kind_of(on_result) == "batch"
    except TypeError:
        fits = False
    if not fits:
        raise TypeError(f"{name} is no hook; expected `async def on_result(station, result)`")


@asynccontextmanager
async def open_workers(
    handler: Handler,
    *,
    settings: PipelineSettings,
    on_result: ResultHook | None = None,
    on_eased: Callable[[], None],
    on_crash: Callable[[], None],
    observer: Observer,
) -> AsyncIterator[Workers]:
    """Own those who run the handler; leaving the block cancels them.

    Args:
        handler: of any kind.
        settings: the pipeline's.
        on_result: see `stationmaster.result_hook`.
        on_eased: called when an expected wait may have fallen.
        on_crash: called before an error that is no outcome (MemoryError, a bug) takes all workers down.
        observer: hears what happens.

    Raises:
        TypeError: the handler is of no kind, or the hook is none.
    """
    kind = kind_of(handler)
    async with AsyncExitStack() as rings:
        hook: HookQueue | None = None
        if on_result is not None:
            check_hook(on_result)
            hook = await rings.enter_async_context(
                open_result_hook(
                    on_result,
                    max_bytes=settings.max_in_flight_bytes,
                    limit_s=settings.deadline_s,
                    on_crash=on_crash,
                    observer=observer,
                )
            )
        workers: Workers
        if kind == "batch":
            workers = await rings.enter_async_context(
                open_batch_lanes(
                    cast("BatchHandler", handler),
                    ordered=settings.ordered,
                    queue_capacity=settings.queue_capacity,
                    result_bytes=settings.result_bytes,
                    on_eased=on_eased,
                    on_crash=on_crash,
                    observer=observer,
                )
            )
        else:
            if kind == "blocking":
                station_handler: StationHandler = ThreadedHandler(
                    cast("BlockingHandler", handler), threads=settings.threads, observer=observer
                )
            else:
                station_handler = cast("StationHandler", handler)
            stations = await rings.enter_async_context(
                open_stations(
                    station_handler,
                    queue_capacity=settings.queue_capacity,
                    max_live=settings.max_live,
                    idle_s=settings.idle_s,
                    result_bytes=settings.result_bytes,
                    job_timeout_s=settings.job_timeout_s,
                    breaker_failures=settings.breaker_failures,
                    breaker_probe_s=settings.breaker_probe_s,
                    on_eased=on_eased,
                    on_crash=on_crash,
                    observer=observer,
                )
            )
            await stations.create(name for rules in settings.all_rules() for name in rules.roster)
            workers = stations
        yield workers if hook is None else _Overheard(workers, hook)


class _Overheard:
    """Workers whose outcomes a hook hears."""

    def __init__(self, workers: Workers, hook: HookQueue) -> None:
        self._workers = workers
        self._hook = hook
        self.expected_wait_s = workers.expected_wait_s

    async def hand_over(
        self, collecting: Collecting, station_ids: Iterable[str] | None = None, /
    ) -> None:
        await self._workers.hand_over(self._hook.overhear(collecting), station_ids)

    def __len__(self) -> int:
        return len(self._workers)
