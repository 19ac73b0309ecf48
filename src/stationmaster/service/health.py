"""Whether the service makes progress (`live`) and whether it does its work (`ready`). Cheap, without any I/O.

Not live means: only a restart helps, and the watchdog is no longer fed. Not ready means: somebody should look at what
the check names; this process goes on trying, and nothing is lost. What is judged, and after how many seconds, stands
in the constants below; `docs/systemd.md` tells operators the same.

Events tell what has happened (breakers, stores), moments what is now (`watch_*`): each is asked when a check
is wanted, so nothing here can go stale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import trio

from stationmaster.events import (
    EndpointClosed,
    EndpointOpened,
    StoreBlocked,
    StoreUnblocked,
    UploadsDiverted,
    UploadsResumed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stationmaster.events import Event
    from stationmaster.kafka.source import KafkaStatistics
    from stationmaster.settings import PipelineStatistics
    from stationmaster.state import StoreStatistics

BEAT_S: Final = 1.0
"""How often the loop notes that it turns."""
LOOP_LIMIT_S: Final = 10.0
"""A loop whose last beat is older was held up by something that blocks."""
STUCK_SLACK_S: Final = 15.0
"""A batch that is open so long beyond its deadline and `upload.timeout_s` is stuck, unless a store takes nothing."""
BROKER_LIMIT_S: Final = 10.0
"""After so long without any answer of a broker none counts as known. One that is silent is asked every 5 s."""
OUTBOX_LIMIT: Final = 0.9
"""An outbox that is fuller than this is about to stop consumption."""

_TROUBLES: Final = frozenset(
    {
        "authentication",
        "authorization",
        "group-authorization",
        "unknown-topic",
        "stalled",
    }
)
"""What the source cannot read through: somebody must mend it. The others pass, or show in the broker's silence."""


@attrs.frozen(kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    """Short and fixed: for machines."""
    ok: bool
    detail: str
    """For people; holds no secret, and no text out of messages."""


@attrs.define(eq=False)
class Health:
    """An observer that can say how the service is. `run` must run for `live` to hold."""

    endpoints: int = 0
    """Model servers there are; 0: none is needed."""
    upload_limit_s: float = 60.0
    """`upload.timeout_s`."""
    threads: int = 32
    """`stations.threads`."""
    detailed: bool = attrs.field(default=False, init=False)
    _beaten_at: float = attrs.field(factory=trio.current_time, init=False)
    _pipeline: Callable[[], PipelineStatistics] | None = attrs.field(default=None, init=False)
    _source: Callable[[], KafkaStatistics] | None = attrs.field(default=None, init=False)
    _outbox: Callable[[], StoreStatistics] | None = attrs.field(default=None, init=False)
    _begun: trio.Event = attrs.field(factory=trio.Event, init=False)
    _broken: dict[str, str] = attrs.field(factory=dict, init=False)
    """Endpoint -> why its breaker is open."""
    _blocked: dict[str, str] = attrs.field(factory=dict, init=False)
    """Store -> why it takes nothing."""
    _diverted: UploadsDiverted | None = attrs.field(default=None, init=False)

    # ------------------------------------------------------------------------------------------------- what it knows

    def watch_pipeline(self, statistics: Callable[[], PipelineStatistics]) -> None:
        """Ask this from now on: the pipeline has started."""
        self._pipeline = statistics

    def watch_source(self, statistics: Callable[[], KafkaStatistics]) -> None:
        """Ask this from now on: there is a Kafka source. A file has no broker and no pump."""
        self._source = statistics

    def watch_outbox(self, statistics: Callable[[], StoreStatistics]) -> None:
        """Ask this from now on."""
        self._outbox = statistics

    def watch_ending(self, begun: trio.Event) -> None:
        """Look at this from now on: once it is set the service is ready no more, and its pump may stop."""
        self._begun = begun

    @property
    def _ending(self) -> bool:
        return self._begun.is_set()

    def observe(self, event: Event, /) -> None:
        """Learn from one event."""
        match event:
            case EndpointOpened():
                self._broken[event.endpoint] = event.reason
            case EndpointClosed():
                self._broken.pop(event.endpoint, None)
            case StoreBlocked():
                self._blocked[event.store] = event.detail
            case StoreUnblocked():
                self._blocked.pop(event.store, None)
            case UploadsDiverted():
                self._diverted = event
            case UploadsResumed():
                self._diverted = None
            case _:
                pass

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            self._beaten_at = trio.current_time()
            await trio.sleep(BEAT_S)

    def summary(self) -> str:
        """Say in one line how the service is, with numbers."""
        wrong = [check.name for check in (*self.live(), *self.ready()) if not check.ok]
        parts = [
            self._service().detail
            if wrong in ([], ["service"])
            else f"NOT READY ({', '.join(wrong)})"
        ]
        if self._pipeline is not None:
            pipeline = self._pipeline()
            parts.append(f"{pipeline.in_flight} batches open")
            parts.append(f"{pipeline.live_stations} stations live")
        if self._source is not None:
            source = self._source()
            lags = [each.lag for each in source.partitions if each.lag is not None]
            parts.append(f"{len(source.partitions)} partitions")
            parts.append(f"lag {sum(lags)}")
        if self._outbox is not None:
            parts.append(f"{self._outbox().rows} batches in the outbox")
        return ", ".join(parts)

    # ----------------------------------------------------------------------------------------------------- liveness

    @property
    def is_live(self) -> bool:
        """Whether every liveness check holds: the watchdog may be fed."""
        return all(check.ok for check in self.live())

    def live(self) -> tuple[Check, ...]:
        """Return whether loop, pump and pipeline make progress."""
        return self._loop(), self._pump(), self._progress()

    def _loop(self) -> Check:
        silent_s = trio.current_time() - self._beaten_at
        return Check(
            name="loop",
            ok=silent_s <= LOOP_LIMIT_S,
            detail=f"the event loop's last beat was {silent_s:.1f} s ago",
        )

    def _pump(self) -> Check:
        name = "pump"
        if self._source is None:
            return Check(name=name, ok=True, detail="there is none")
        now = self._source()
        if not now.pump_alive:
            return Check(name=name, ok=self._ending, detail="the Kafka client's thread has ended")
        detail = f"the Kafka client's thread began its turn {now.pump_idle_s:.1f} s ago"
        if now.pump_idle_s <= now.pump_limit_s:
            return Check(name=name, ok=True, detail=detail)
        detail += f", more than {now.pump_limit_s:g} s: it hangs"
        return Check(name=name, ok=False, detail=detail)

    def _progress(self) -> Check:
        name = "pipeline"
        if self._pipeline is None:
            return Check(name=name, ok=True, detail="not started")
        now = self._pipeline()
        overdue_s = trio.current_time() - now.oldest_deadline
        if overdue_s <= self.upload_limit_s + STUCK_SLACK_S:
            return Check(name=name, ok=True, detail=f"{now.in_flight} batches open")
        detail = f"{now.in_flight} batches open, the oldest {overdue_s:.0f} s past its deadline"
        if now.blocked:
            detail += f"; they wait for {' and '.join(now.blocked)}"
        return Check(name=name, ok=bool(now.blocked), detail=detail)

    # ----------------------------------------------------------------------------------------------------- readiness

    def ready(self) -> tuple[Check, ...]:
        """Return what must hold for batches to be read, worked on and delivered."""
        return (
            self._service(),
            self._broker(),
            self._assignment(),
            self._model(),
            self._sink(),
            self._store("outbox", "outbox-replay"),
            self._store("dead-letters"),
            self._handlers(),
        )

    def _service(self) -> Check:
        draining = self._ending or (self._pipeline is not None and self._pipeline().draining)
        starting = self._pipeline is None
        detail = "draining" if draining else "starting" if starting else "running"
        return Check(name="service", ok=not (draining or starting), detail=detail)

    def _broker(self) -> Check:
        name = "broker"
        if self._source is None:
            return Check(name=name, ok=True, detail="none is needed")
        now = self._source()
        if now.broker_silent_s is None:
            return Check(name=name, ok=False, detail="no broker has answered yet")
        detail = f"a broker answered {now.broker_silent_s:.1f} s ago"
        if now.broker_silent_s > BROKER_LIMIT_S:
            return Check(name=name, ok=False, detail=f"{detail}, and none since")
        wrong = [kind for kind in now.troubles if kind in _TROUBLES]
        if wrong:
            detail += f"; what the log says of it: {', '.join(wrong)}"
        return Check(name=name, ok=not wrong, detail=detail)

    def _assignment(self) -> Check:
        name = "assignment"
        if self._source is None:
            return Check(name=name, ok=True, detail="none is needed")
        now = self._source()
        if not now.is_settled:
            return Check(name=name, ok=False, detail="the group is not joined, or rebalancing")
        count = len(now.partitions)
        detail = f"{count} partitions" if count else "a member without partitions: idle"
        return Check(name=name, ok=True, detail=detail)

    def _model(self) -> Check:
        name, broken = "model", len(self._broken)
        if not self.endpoints:
            return Check(name=name, ok=True, detail="none is needed")
        detail = f"{self.endpoints - broken} of {self.endpoints} endpoints work"
        return Check(name=name, ok=broken < self.endpoints, detail=detail)

    def _sink(self) -> Check:
        name = "sink"
        if self._diverted is None:
            return Check(name=name, ok=True, detail="takes batches")
        if self._diverted.refused:
            detail = (
                "refuses every batch: a token or a URL must be mended; batches go to the outbox"
            )
            return Check(name=name, ok=False, detail=detail)
        return Check(name=name, ok=True, detail="is down; batches go to the outbox")

    def _store(self, name: str, *others: str) -> Check:
        for store in (name, *others):
            if store in self._blocked:
                return Check(name=name, ok=False, detail=self._blocked[store])
        if name != "outbox" or self._outbox is None:
            return Check(name=name, ok=True, detail="takes what it is given")
        now = self._outbox()
        share = now.bytes / now.max_bytes
        detail = f"{now.rows} batches, {share:.0%} full"
        return Check(name=name, ok=share < OUTBOX_LIMIT, detail=detail)

    def _handlers(self) -> Check:
        abandoned = self._pipeline().abandoned_threads if self._pipeline is not None else 0
        detail = f"{abandoned} of {self.threads} threads abandoned"
        return Check(name="handlers", ok=abandoned < self.threads, detail=detail)
