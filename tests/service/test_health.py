"""Liveness and readiness, on the virtual clock: what each check says, and after how long."""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

from stationmaster.abc import Accepted
from stationmaster.events import (
    EndpointClosed,
    EndpointOpened,
    SourceRecovered,
    StoreBlocked,
    StoreUnblocked,
    UploadsDiverted,
    UploadsResumed,
)
from stationmaster.service.health import (
    BEAT_S,
    BROKER_LIMIT_S,
    LOOP_LIMIT_S,
    OUTBOX_LIMIT,
    STUCK_SLACK_S,
    Check,
    Health,
)
from stationmaster.settings import PipelineStatistics
from stationmaster.state import StoreStatistics
from stationmaster.testing import RecordingSink
from tests.pipelines import Setting, one_second
from tests.service.standing import kafka, partition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trio.testing import MockClock

    from stationmaster.abc import UploadAnswer
    from stationmaster.batch import BatchReport
    from stationmaster.events import Event
    from stationmaster.kafka import KafkaStatistics


def found(checks: Iterable[Check], name: str) -> Check:
    (check,) = (check for check in checks if check.name == name)
    return check


def bad(checks: Iterable[Check]) -> list[str]:
    return [check.name for check in checks if not check.ok]


def pipeline(**changed: Any) -> PipelineStatistics:
    well = PipelineStatistics(in_flight=0, in_flight_bytes=0, live_stations=0, draining=False)
    return attrs.evolve(well, **changed)


def outbox(*, rows: int = 0, filled: int = 0) -> StoreStatistics:
    return StoreStatistics(rows=rows, bytes=filled, max_bytes=1000, oldest_age_s=0.0)


@attrs.define
class Moments:
    """What a test lets the parts say."""

    pipeline: PipelineStatistics = attrs.field(factory=pipeline)
    source: KafkaStatistics = attrs.field(factory=kafka)
    outbox: StoreStatistics = attrs.field(factory=outbox)

    def watched_by(self, health: Health) -> Health:
        health.watch_pipeline(lambda: self.pipeline)
        health.watch_source(lambda: self.source)
        health.watch_outbox(lambda: self.outbox)
        return health


@pytest.fixture
def moments() -> Moments:
    return Moments()


# ----------------------------------------------------------------------------------------------------------- liveness


async def test_a_loop_is_live_while_it_beats_and_not_when_the_last_beat_is_too_old(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    health = Health()
    nursery.start_soon(health.run)
    await trio.sleep(1000.5 * BEAT_S)
    assert health.is_live

    autojump_clock.jump(LOOP_LIMIT_S + 1.0)  # nothing ran meanwhile: something blocked the loop
    late = found(health.live(), "loop")
    assert not late.ok
    assert "ago" in late.detail
    await trio.testing.wait_all_tasks_blocked()
    assert health.is_live  # it turns again


async def test_before_anything_has_started_the_service_is_live_and_not_ready() -> None:
    health = Health()
    assert bad(health.live()) == []
    assert bad(health.ready()) == ["service"]
    assert found(health.ready(), "service").detail == "starting"


async def test_a_file_needs_no_pump_no_broker_and_no_model() -> None:
    health = Health()
    health.watch_pipeline(pipeline)
    assert bad(health.live()) == bad(health.ready()) == []


async def test_a_pump_is_live_until_its_turn_lasts_longer_than_what_it_does_allows(
    moments: Moments,
) -> None:
    health = moments.watched_by(Health())
    moments.source = kafka(pump_idle_s=10.0)
    assert health.is_live
    moments.source = kafka(pump_idle_s=10.1)
    assert bad(health.live()) == ["pump"]
    assert "hangs" in found(health.live(), "pump").detail
    moments.source = kafka(pump_idle_s=150.0, pump_limit_s=200.0)  # it ends a rebalance
    assert health.is_live


async def test_a_pump_that_has_died_is_said_at_once_unless_the_service_ends(
    moments: Moments,
) -> None:
    health = moments.watched_by(Health())
    moments.source = kafka(pump_alive=False)
    assert bad(health.live()) == ["pump"]
    begun = trio.Event()
    health.watch_ending(begun)
    begun.set()
    assert health.is_live
    assert bad(health.ready()) == ["service"]


async def test_a_batch_open_beyond_deadline_upload_and_slack_is_a_stuck_pipeline(
    moments: Moments, autojump_clock: MockClock
) -> None:
    health = moments.watched_by(Health(upload_limit_s=60.0))
    deadline = trio.current_time() + 5.0
    moments.pipeline = pipeline(in_flight=3, oldest_deadline=deadline)
    autojump_clock.jump(5.0 + 60.0 + STUCK_SLACK_S)
    assert found(health.live(), "pipeline").ok
    autojump_clock.jump(0.1)
    stuck = found(health.live(), "pipeline")
    assert not stuck.ok
    assert stuck.detail == "3 batches open, the oldest 75 s past its deadline"


async def test_batches_that_wait_for_a_full_outbox_are_not_ready_and_no_reason_to_restart(
    moments: Moments, autojump_clock: MockClock
) -> None:
    health = moments.watched_by(Health())
    moments.pipeline = pipeline(in_flight=64, oldest_deadline=0.0, blocked=("outbox",))
    health.observe(StoreBlocked(store="outbox", kind="full", detail="the outbox is full"))
    autojump_clock.jump(1e6)
    assert found(health.live(), "pipeline").ok
    assert "they wait for outbox" in found(health.live(), "pipeline").detail
    assert bad(health.ready()) == ["outbox"]
    health.observe(StoreUnblocked(store="outbox", blocked_s=1.0))
    assert bad(health.ready()) == []


async def test_an_upload_that_never_returns_makes_a_real_pipeline_stuck_in_time(
    autojump_clock: MockClock,
) -> None:
    class Hanging(RecordingSink):
        async def upload(  # type: ignore[explicit-override]  # typing.override: Python 3.12
            self, report: BatchReport, /
        ) -> UploadAnswer:
            with trio.CancelScope(shield=True):  # as a thread that does not come back
                await trio.sleep(1000)
            self._keep(report)
            return Accepted()

    setting, health = Setting(1, sink=Hanging()), Health(upload_limit_s=2.0)
    async with setting.open(one_second, deadline_s=5.0, upload_timeout_s=2.0) as running:
        health.watch_pipeline(running.statistics)
        await trio.sleep(5.0 + 2.0 + STUCK_SLACK_S - 0.1)
        assert found(health.live(), "pipeline").ok
        await trio.sleep(0.2)
        assert not found(health.live(), "pipeline").ok
        setting.source.end()
        await running.wait_finished()
        assert found(health.live(), "pipeline").ok
        assert running.statistics().oldest_deadline == inf


# ---------------------------------------------------------------------------------------------------------- readiness


async def test_a_draining_pipeline_is_not_ready(moments: Moments) -> None:
    health = moments.watched_by(Health())
    assert found(health.ready(), "service").detail == "running"
    moments.pipeline = pipeline(draining=True)
    assert bad(health.ready()) == ["service"]
    assert found(health.ready(), "service").detail == "draining"


@pytest.mark.parametrize(
    ("silent_s", "ok", "says"),
    [
        (None, False, "no broker has answered yet"),
        (BROKER_LIMIT_S, True, "a broker answered 10.0 s ago"),
        (BROKER_LIMIT_S + 0.1, False, "and none since"),
    ],
)
async def test_a_broker_is_known_while_it_answers(
    moments: Moments, silent_s: float | None, ok: bool, says: str
) -> None:
    health = moments.watched_by(Health())
    moments.source = kafka(broker_silent_s=silent_s)
    check = found(health.ready(), "broker")
    assert (check.ok, says in check.detail) == (ok, True)


@pytest.mark.parametrize(
    ("kind", "ok"), [("unknown-topic", False), ("authentication", False), ("commit", True)]
)
async def test_only_troubles_that_somebody_must_mend_make_a_broker_unready(
    moments: Moments, kind: str, ok: bool
) -> None:
    health = moments.watched_by(Health())
    moments.source = kafka(troubles=(kind,))
    assert found(health.ready(), "broker").ok is ok


async def test_an_idle_member_is_ready_and_one_that_rebalances_is_not(moments: Moments) -> None:
    health = moments.watched_by(Health())
    assert found(health.ready(), "assignment") == Check(
        name="assignment", ok=True, detail="a member without partitions: idle"
    )
    moments.source = kafka(partition(0), partition(1))
    assert found(health.ready(), "assignment").detail == "2 partitions"
    moments.source = kafka(is_settled=False)
    assert bad(health.ready()) == ["assignment"]


async def test_the_model_is_broken_when_every_endpoint_is(moments: Moments) -> None:
    health = moments.watched_by(Health(endpoints=2))
    opened = partial(EndpointOpened, failures=3, reason="500")
    health.observe(opened(endpoint="http://a"))
    assert found(health.ready(), "model").ok
    health.observe(opened(endpoint="http://b"))
    health.observe(opened(endpoint="http://b"))
    assert found(health.ready(), "model") == Check(
        name="model", ok=False, detail="0 of 2 endpoints work"
    )
    health.observe(EndpointClosed(endpoint="http://b", open_s=1.0))
    health.observe(EndpointClosed(endpoint="http://b", open_s=1.0))  # said twice hurts nothing
    assert found(health.ready(), "model").detail == "1 of 2 endpoints work"


async def test_a_sink_that_is_down_is_borne_and_one_that_refuses_us_is_not(
    moments: Moments,
) -> None:
    health = moments.watched_by(Health())
    health.observe(UploadsDiverted(reason="503"))
    assert bad(health.ready()) == []
    assert "outbox" in found(health.ready(), "sink").detail
    health.observe(UploadsResumed(diverted_s=1.0))
    assert found(health.ready(), "sink").detail == "takes batches"
    health.observe(UploadsDiverted(reason="401", refused=True))
    assert bad(health.ready()) == ["sink"]


async def test_an_outbox_near_its_limit_is_not_ready(moments: Moments) -> None:
    health = moments.watched_by(Health())
    moments.outbox = outbox(rows=7, filled=round(1000 * OUTBOX_LIMIT) - 1)
    assert found(health.ready(), "outbox") == Check(
        name="outbox", ok=True, detail="7 batches, 90% full"
    )
    moments.outbox = outbox(rows=7, filled=round(1000 * OUTBOX_LIMIT))
    assert bad(health.ready()) == ["outbox"]


@pytest.mark.parametrize(
    ("store", "check"),
    [("outbox", "outbox"), ("outbox-replay", "outbox"), ("dead-letters", "dead-letters")],
)
async def test_a_store_that_takes_nothing_is_not_ready(
    moments: Moments, store: str, check: str
) -> None:
    health = moments.watched_by(Health())
    health.observe(StoreBlocked(store=store, kind="disk", detail="the disk is full"))
    assert bad(health.ready()) == [check]
    assert found(health.ready(), check).detail == "the disk is full"


async def test_handlers_are_not_ready_when_every_thread_is_abandoned(moments: Moments) -> None:
    health = moments.watched_by(Health(threads=2))
    moments.pipeline = pipeline(abandoned_threads=1)
    assert found(health.ready(), "handlers").detail == "1 of 2 threads abandoned"
    assert found(health.ready(), "handlers").ok
    moments.pipeline = pipeline(abandoned_threads=2)
    assert bad(health.ready()) == ["handlers"]


async def test_other_events_change_nothing(moments: Moments) -> None:
    health = moments.watched_by(Health())
    before = health.ready()
    event: Event = SourceRecovered()
    health.observe(event)
    assert health.ready() == before
    assert not health.detailed


# ------------------------------------------------------------------------------------------------------------ summary


async def test_the_summary_is_one_line_with_numbers_and_what_is_wrong(moments: Moments) -> None:
    health = Health()
    assert health.summary() == "starting"
    moments.watched_by(health)
    moments.pipeline = pipeline(in_flight=3, live_stations=70)
    moments.source = kafka(partition(0, 5), partition(1, None), partition(2, 7))
    moments.outbox = outbox(rows=2, filled=10)
    numbers = "3 batches open, 70 stations live, 3 partitions, lag 12, 2 batches in the outbox"
    assert health.summary() == f"running, {numbers}"
    moments.source = attrs.evolve(moments.source, broker_silent_s=None, pump_idle_s=99.0)
    assert health.summary() == f"NOT READY (pump, broker), {numbers}"
