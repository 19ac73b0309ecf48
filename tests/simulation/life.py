"""One life of the process: it is put together as a service is, interfered with, and ends in one way or another."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.abc import Accepted
from stationmaster.batch import Outcome
from stationmaster.batcher import open_batcher
from stationmaster.errors import SourceError, UploadFailedError
from stationmaster.pipeline import open_pipeline
from stationmaster.state import open_outbox
from tests.simulation.counterparts import DISK_S, ModelServer
from tests.simulation.dice import Fault
from tests.simulation.handlers import CLEAN_UP_S, Staff
from tests.simulation.scheduling import AfterSteps, Threads
from tests.simulation.telemetry import STATIONS
from tests.simulation.watch import GRACE_S, Watch
from tests.telemetry import live_tasks

if TYPE_CHECKING:
    from stationmaster.abc import UploadAnswer
    from stationmaster.batch import BatchReport
    from stationmaster.batcher import Batcher
    from stationmaster.pipeline import Pipeline
    from stationmaster.state.replay import Replay
    from tests.simulation.world import World

_ENDS: Final = (
    (Fault.SIGTERM, 0.2),
    (Fault.SIGTERM_TWICE, 0.15),
    (Fault.CANCELLED, 0.1),
    (Fault.CRASH, 0.4),
)
_LONGEST_DRAIN_S: Final = 300.0


@attrs.define(eq=False)
class Life:
    """From the start of a process to its end."""

    world: World
    number: int
    watch: Watch = attrs.field(init=False)
    staff: Staff = attrs.field(init=False)
    model: ModelServer = attrs.field(init=False)
    crashed: trio.Event = attrs.field(factory=trio.Event, init=False)
    accepted: set[str] = attrs.field(factory=set, init=False)
    """Batch ids whose acceptance this process was told."""
    _from_before: frozenset[str] = attrs.field(init=False)
    _lost_partitions: bool = attrs.field(default=False, init=False)
    _tasks_before: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        world = self.world
        self.watch = Watch(
            world.settings,
            world.check,
            world.same_id,
            world.note_refused,
            world.note,
            world.clock.current_time,
        )
        self.model = ModelServer(dimensions=2)
        self.model.surround(world.dice, world.policy, self.watch.check)
        self._from_before = frozenset(world.rows.ids())
        world.log.watch = self.watch

    async def run(self, *, quietly: bool) -> None:
        """Live. `quietly`: to the end of the log, without an end by force."""
        dice, world = self.world.dice, self.world
        end = None
        if not quietly:
            end = next((fault for fault, rate in _ENDS if dice.strikes(fault, rate)), None)
        world.log.lose([key for key in world.log.partitions if key in world.log._held])
        world.log.assign(world.log.partitions)
        self._tasks_before = len(live_tasks())
        try:
            async with trio.open_nursery() as process:
                threads = Threads(process)
                with threads.installed():
                    await self._serve(end)
                self.watch.over = True
                process.cancel_scope.cancel()
        except* (UploadFailedError, SourceError):
            pass  # on purpose; whatever else comes out is an error of ours
        if end is Fault.CRASH and self.crashed.is_set():
            world.restore()
            return
        self.watch.over = False
        self.watch.at_end()
        roomy = (
            world.settings.max_in_flight_bytes > 1_000_000
        )  # else what is large is not told at all
        if world.has_hook and roomy and self.watch.outcomes[Outcome.SUCCEEDED] > 20:
            self.watch.check(self.staff.heard, "the hook heard nothing")
        self.watch.check(not self.staff.running, "still running", self.staff.running)
        left = len(live_tasks()) - self._tasks_before
        self.watch.check(left == 0, "tasks were left behind", left)
        self.watch.over = True

    async def _serve(self, end: Fault | None) -> None:
        world = self.world
        async with AsyncExitStack() as rings:
            outbox = None
            if world.has_stores:
                outbox = await rings.enter_async_context(
                    open_outbox(
                        world.rows,
                        send=self._send_kept,
                        dead_letters=world.letters,
                        observer=self.watch,
                        clock=world.weather.wall_clock,
                        jitter=world.dice.plain,
                    )
                )
            batcher = await rings.enter_async_context(
                open_batcher(self.model, policy=world.policy, observer=self.watch)
            )
            self.staff = Staff(
                world.dice,
                self.watch,
                batcher,
                self.model,
                world.kind,
                frozenset(
                    name for name in STATIONS if world.dice.strikes(Fault.STATION_DEAD, 0.02)
                ),
                world.settings.threads,
            )
            await self._run_pipeline(end, outbox, batcher)
            self._check_rows(batcher)

    async def _run_pipeline(
        self, end: Fault | None, outbox: Replay | None, batcher: Batcher
    ) -> None:
        world = self.world
        try:
            with trio.CancelScope() as around:
                async with open_pipeline(
                    world.log,
                    handler=self.staff.handler,
                    sink=self,
                    outbox=outbox,
                    dead_letters=world.letters if world.has_stores else None,
                    settings=world.settings,
                    observer=self.watch,
                    on_result=self.staff.hear if world.has_hook else None,
                    now=lambda: datetime.fromtimestamp(world.weather.wall_clock(), UTC),
                ) as pipeline:
                    pipeline._uploader._jitter = world.dice.plain
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._rebalance)
                        nursery.start_soon(self._audit, pipeline, batcher)
                        if end is not None:
                            nursery.start_soon(self._end, end, pipeline, around)
                        await pipeline.wait_finished()
                        if end is None and outbox is not None:
                            with trio.move_on_after(_LONGEST_DRAIN_S):
                                while len(world.rows):
                                    await outbox.wait_change()
                        nursery.cancel_scope.cancel()
        finally:
            late_s = trio.current_time() - self.watch.end
            self.watch.check(late_s <= CLEAN_UP_S + DISK_S + 1e-9, "the end came late", late_s)

    # ------------------------------------------------------------------------------------------------------- the sink

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        """Be the sink: the target, and a look at what it was sent."""
        batch = report.batch
        self.watch.check(
            self.watch.of(batch).has_ended, "uploaded before its decision", batch.batch_id
        )
        answer = await self.world.target.upload(report)
        self._answered(batch.batch_id, answer)
        return answer

    async def _send_kept(self, batch_id: str, body: bytes, /) -> UploadAnswer:
        answer = await self.world.target.send(batch_id, body)
        self._answered(batch_id, answer)
        return answer

    def _answered(self, batch_id: str, answer: UploadAnswer) -> None:
        if isinstance(answer, Accepted):
            again = batch_id in self.accepted
            # What was taken away comes again, and so does what lay in the outbox when the process began.
            excused = self._lost_partitions or batch_id in self._from_before
            self.watch.check(not again or excused, "accepted twice in one life", batch_id)
            self.accepted.add(batch_id)

    # ---------------------------------------------------------------------------------------------------- interference

    async def _rebalance(self) -> None:
        world, dice = self.world, self.world.dice
        while True:
            await trio.sleep(dice.plain.uniform(0, 20))
            leaving = [dice.choose(world.log.partitions)]
            if dice.strikes(Fault.PARTITION_LOST, 0.15):
                self._lost_partitions = True
                world.log.lose(leaving)
            elif dice.strikes(Fault.PARTITION_REVOKED, 0.25):
                self._lost_partitions = True
                await world.log.revoke(leaving)
            else:
                continue
            await trio.sleep(dice.choose((0.0, 0.0, 4.0)))
            world.log.assign(leaving)

    async def _end(self, end: Fault, pipeline: Pipeline, around: trio.CancelScope) -> None:
        plain = self.world.dice.plain
        if end is Fault.CRASH:
            crash = AfterSteps(int(10 ** plain.uniform(1.5, 4)), self._crash)
            trio.lowlevel.add_instrument(crash)
            try:
                await self.crashed.wait()
            finally:
                crash.disarm()
            pipeline.drain(grace_s=0)
            around.cancel()
            return
        await trio.sleep(plain.uniform(0, 40))
        self.watch.draw_in(GRACE_S)
        self.watch.drained_at = trio.current_time()
        if end is Fault.CANCELLED:
            around.cancel()
            return
        pipeline.drain(grace_s=GRACE_S)
        if end is Fault.SIGTERM_TWICE:
            await trio.sleep(plain.uniform(0, GRACE_S))
            self.watch.draw_in(0)
            pipeline.drain(grace_s=0)

    def _crash(self) -> None:
        self.world.save()
        self.watch.over = True
        self.crashed.set()

    # ----------------------------------------------------------------------------------------------------------- audits

    async def _audit(self, pipeline: Pipeline, batcher: Batcher) -> None:
        """Look at the bounds whenever everybody waits."""
        pause_s = 0.5
        while True:
            await trio.sleep(pause_s * self.world.dice.plain.random())
            pause_s = min(1.1 * pause_s, 600.0)
            await wait_all_tasks_blocked()
            self._check_bounds(pipeline)
            rows = batcher.statistics()
            held = rows.queued_rows + rows.rows_in_flight
            waiting = self.staff.waiting
            # Of a call with many texts some rows may have their vectors already.
            served = held == waiting or (self.staff.kind == "batch" and 0 < held < waiting)
            self.watch.check(served, "callers that nobody serves", waiting, held)
            policy = self.world.policy  # what was in flight may come back into the queue
            most = policy.max_queue_rows + policy.max_in_flight * policy.max_batch_rows
            self.watch.check(rows.queued_rows <= most, "rows beyond the queue", rows.queued_rows)

    def _check_bounds(self, pipeline: Pipeline) -> None:
        check, settings, now = self.watch.check, self.world.settings, pipeline.statistics()
        check(now.in_flight <= settings.max_in_flight, "slots", now.in_flight)
        within = now.in_flight_bytes <= settings.max_in_flight_bytes or now.in_flight == 1
        check(within, "bytes in flight", now.in_flight_bytes)
        check(now.parked_bytes <= self.world.most_parked_bytes, "parked bytes", now.parked_bytes)
        if self.staff.kind != "batch":
            check(now.live_stations <= settings.max_live, "live stations", now.live_stations)
        check(now.abandoned_threads <= settings.threads, "threads", now.abandoned_threads)
        rows = self.world.rows
        held = sum(len(row.body) for row in rows._rows.values())
        check(held <= rows.max_bytes or len(rows) == 1, "bytes in the outbox", held)
        tasks = len(live_tasks()) - self._tasks_before
        most = self.world.most_tasks + len(self.staff.running)
        check(tasks <= most, "tasks", tasks, most)

    def _check_rows(self, batcher: Batcher) -> None:
        """Every row that was asked for had one end."""
        now = batcher.statistics()
        ends = now.answered_rows + now.failed_rows + now.expired_rows + now.cancelled_rows
        ends += now.refused_rows
        asked = self.staff.asked
        self.watch.check(ends == asked, "rows without an end, or with two", asked, now)
        self.watch.check(not self.staff.waiting, "callers were left", self.staff.waiting)
