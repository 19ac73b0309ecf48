"""What health asks of the source: whether the client's thread turns, and whether the group has settled."""

from __future__ import annotations

import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import trio

from stationmaster.kafka import inspection, open_kafka_source, pump
from stationmaster.kafka.handover import Handover
from stationmaster.kafka.pump import Pump
from stationmaster.testing import RecordingObserver
from tests.processes import wait_until

if TYPE_CHECKING:
    import pytest

    from tests.kafka.clients import Group


def idle_pump(group: Group, **settings: Any) -> Pump:
    """Return a pump whose thread never began."""
    commands: SimpleQueue[Any] = SimpleQueue()
    return Pump(
        commands=commands,
        settings=group.settings(**settings),
        handover=Handover(RecordingObserver(), commands),
        token=trio.lowlevel.current_trio_token(),
    )


async def test_a_turn_may_take_as_long_as_what_is_done_in_it(group: Group) -> None:
    idle = idle_pump(group, drain_timeout_s=7.0, close_timeout_s=20.0)
    usual = idle.turn_limit_s
    assert usual == 10.5
    idle._revoking = True
    assert idle.turn_limit_s == usual + 7.0 + 180.0
    idle._revoking, idle._stopping = False, True
    assert idle.turn_limit_s == usual + 20.0
    idle._consumer.close()


async def test_a_classic_member_is_settled_between_an_assignment_and_a_loss(group: Group) -> None:
    group.fill(1)
    async with open_kafka_source(group.settings()) as source:
        assert not source.statistics().is_settled
        await source.poll()
        now = source.statistics()
        assert now.is_settled
        assert now.pump_alive
        assert now.broker_silent_s is not None
    await wait_until(lambda: not source.statistics().pump_alive)


async def test_with_kip_848_a_member_without_partitions_is_settled_after_a_while(
    group: Group,
) -> None:
    idle = idle_pump(group, group_protocol="consumer")

    def settled() -> bool:
        return idle.is_settled

    assert not settled()  # no broker has answered
    idle.inspector.heard()
    assert not settled()
    idle.inspector.first_heard_at = time.monotonic() - pump._IDLE_S
    assert settled()
    idle._revoking = True
    assert not settled()  # something is taken away
    idle._revoking = False
    idle._on_lost(idle._consumer, [])
    assert not settled()  # begins anew
    idle._consumer.close()


async def test_a_broker_that_is_silent_once_is_asked_again_before_anybody_hears_of_it(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "PROBE_EVERY_S", 0.05)
    monkeypatch.setattr(inspection, "_AGAIN_S", 1.5)
    group.fill(1)
    observer = RecordingObserver()
    async with open_kafka_source(group.settings(), observer=observer) as source:
        await source.poll()
        await wait_until(lambda: source.statistics().is_settled)
        group.broker.stop()
        try:
            await wait_until(lambda: source._pump.inspector._missed)
            assert source.statistics().troubles == ()
        finally:
            group.broker.go_on()  # all tests share it
        await wait_until(lambda: not source._pump.inspector._missed)
