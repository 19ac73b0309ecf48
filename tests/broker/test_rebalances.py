"""Members of a group that come, go, stall and are cut off."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import trio
from confluent_kafka import TopicPartition

from stationmaster.errors import SourceError
from stationmaster.events import (
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
    SourcePaused,
    SourceRecovered,
)
from stationmaster.kafka import KafkaSource, open_kafka_source, pump, watchdog
from stationmaster.kafka.handover import Handover
from tests.broker.groups import PATIENCE_S, Group, Member, everything, places

if TYPE_CHECKING:
    from tests.broker.cluster import Broker

COOPERATIVE: dict[str, Any] = {"assignor": "cooperative-sticky"}
RANGE: dict[str, Any] = {"assignor": "range"}
KIP_848: dict[str, Any] = {"group_protocol": "consumer"}


@pytest.fixture
def revoke_begins(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Give an event that is set when a member has begun to drain."""
    begins = trio.Event()
    revoking = Handover.revoking

    def tell(handover: Handover, drain: Any) -> None:
        revoking(handover, drain)
        begins.set()

    monkeypatch.setattr(Handover, "revoking", tell)
    return begins


# ------------------------------------------------------------------------------------------------ coming and going


@pytest.mark.usefixtures("patient_questions")
@pytest.mark.parametrize("kind", [COOPERATIVE, KIP_848], ids=["cooperative-sticky", "KIP-848"])
async def test_three_members_come_and_go_and_what_a_member_keeps_is_neither_revoked_nor_read_again(
    broker: Broker, kind: dict[str, Any]
) -> None:
    group = Group(broker, partitions=6, defaults=kind)
    group.fill(5)
    async with group.open_member() as first:
        await group.until_shared(first)
        await first.has_read(30)
        async with group.open_member() as second:
            await group.until_shared(first, second)
            group.fill(5)
            await group.until(lambda: len(places(first, second)) >= 60)
            async with group.open_member() as third:
                await group.until_shared(first, second, third)
                group.fill(5)
                await group.until(lambda: len(places(first, second, third)) >= 90)
                kept = set(first.held)
            await group.until_shared(first, second)
            group.fill(5)
            await group.until(lambda: len(places(first, second, third)) >= 120)
        await group.until_shared(first)
        group.fill(5)
        await group.until(lambda: len(places(first, second, third)) >= 150)

    assert places(first, second, third) == everything(
        range(6), 25
    )  # each once: none lost, none twice
    leaving = [part for event in first.of(PartitionsRevoked)[:-1] for _, part in event.partitions]
    assert not kept & set(leaving)  # (the last one is its own leaving)
    assert {record.generation for record in first.records if record.partition in kept} == {1}
    assert not first.of(PartitionsLost)
    assert not first.troubles | second.troubles | third.troubles
    assert group.committed() == dict.fromkeys(range(6), 25)


async def test_range_takes_everything_away_at_each_rebalance_and_still_reads_everything_once(
    broker: Broker,
) -> None:
    group = Group(broker, defaults=RANGE)
    group.fill(5)
    async with group.open_member() as first:
        await first.has_read(20)
        async with group.open_member() as second:
            await group.until_shared(first, second)
            group.fill(5)
            await group.until(lambda: len(places(first, second)) >= 40)
        await group.until_shared(first)
        group.fill(5)
        await group.until(lambda: len(places(first, second)) >= 60)
    assert places(first, second) == everything(range(4), 15)
    assert len(first.of(PartitionsRevoked)[0].partitions) == 4


@pytest.mark.usefixtures("patient_questions")
@pytest.mark.parametrize(
    "kind", [COOPERATIVE, RANGE, KIP_848], ids=["cooperative-sticky", "range", "KIP-848"]
)
async def test_with_three_members_on_one_partition_two_idle_in_health_and_one_takes_over_from_a_dead_owner(
    broker: Broker, kind: dict[str, Any]
) -> None:
    group = Group(broker, partitions=1, defaults=kind)
    group.fill(5)
    async with (
        group.open_member(bootstrap_servers=broker.relayed) as owner,
        trio.open_nursery() as nursery,
    ):
        await owner.has_read(5)
        await group.until_committed({0: 5})
        async with group.open_member() as second, group.open_member() as third:
            await group.until_joined(3)
            broker.relay.cut("stall")  # to the broker the same as death: no goodbye, only silence
            group.fill(5)
            await group.until(lambda: len(places(second, third)) >= 5)
            assert sorted(len(member.held) for member in (second, third)) == [0, 1]
            assert not second.troubles | third.troubles
            broker.relay.mend()
            await owner.hears(PartitionsLost)
        nursery.cancel_scope.cancel()
    assert places(second, third) == [(0, offset) for offset in range(5, 10)]


# ----------------------------------------------------------------------------------------------------------- drains


async def test_a_drain_leaves_nothing_to_be_read_twice(
    broker: Broker, revoke_begins: trio.Event
) -> None:
    group = Group(broker)
    group.fill(10)
    async with group.open_member(accounts=False, drain_timeout_s=PATIENCE_S) as first:
        await first.has_read(40)
        async with group.open_member() as second:
            with trio.fail_after(PATIENCE_S):
                await revoke_begins.wait()
            first.account(first.records)
            await group.until_shared(first, second)
            group.fill(1)
            await second.has_read(2)
            assert places(second) == [(partition, 10) for partition in sorted(second.held)]
    assert all(event.drained for event in first.of(PartitionsRevoked)[:1])


async def test_without_a_drain_the_next_owner_reads_all_of_it_again(broker: Broker) -> None:
    group = Group(broker)
    group.fill(10)
    async with group.open_member(accounts=False, drain_timeout_s=0) as first:
        await first.has_read(40)
        async with group.open_member() as second:
            revoked = await first.hears(PartitionsRevoked)
            assert not revoked.drained
            first.account(first.records)  # too late for what has left
            await group.until_shared(first, second)
            await second.has_read(20)
            assert places(second) == everything(second.held, 10)
    assert group.committed() == dict.fromkeys(range(4), 10)


# ------------------------------------------------------------------------------------------------- stalls and silence


async def test_a_commit_of_partitions_that_another_member_has_by_now_is_refused_told_and_survived(
    broker: Broker,
) -> None:
    group = Group(broker)
    group.fill(10)
    async with group.open_member(accounts=False, bootstrap_servers=broker.relayed) as late:
        await late.has_read(40)
        broker.relay.cut("stall")
        late.account(late.records)  # the commit is on its way now, and gets nowhere
        await late.hears(PartitionsLost)  # the client counts the session's seconds too
        async with group.open_member() as heir:
            await heir.has_read(40)
            assert places(heir) == everything(range(4), 10)
            await group.until_committed(dict.fromkeys(range(4), 10))
            group.fill(5)
            await heir.has_read(60)
            await group.until_committed(dict.fromkeys(range(4), 15))

            broker.relay.mend()
            refused = await late.troubled("commit")
            assert group.topic in refused.detail
            assert late.source.statistics().commit_errors == 4
            await group.until_shared(late, heir)  # it is back
            assert group.committed() == dict.fromkeys(
                range(4), 15
            )  # the late commit took nothing back
            late.accounts = True
            group.fill(5)
            await group.until(lambda: len({*places(late, heir)}) == 80)
            await late.hears(SourceRecovered)
        await group.until_committed(dict.fromkeys(range(4), 20))


async def test_a_member_that_is_held_up_past_max_poll_loses_its_partitions_and_joins_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(broker)
    group.fill(5)
    stalling = {"max.poll.interval.ms": 3000}
    async with group.open_member(accounts=False, options=stalling) as stalled:
        await stalled.has_read(20)
        go_on = threading.Event()
        house = pump.Pump._keep_house

        def hang(self: pump.Pump, now: float) -> None:
            if self is stalled.source._pump:
                go_on.wait(PATIENCE_S)
            house(self, now)

        monkeypatch.setattr(pump.Pump, "_keep_house", hang)
        async with group.open_member() as other:
            await other.has_read(20)  # it took over
            go_on.set()
            await stalled.troubled("max-poll-exceeded")
            await stalled.hears(PartitionsLost)
            stalled.account(stalled.records)  # of an older generation
            await group.until_shared(stalled, other)
            await stalled.hears(SourceRecovered)
            assert stalled.source.statistics().max_poll_exceeded == 1
            assert group.committed() == dict.fromkeys(range(4), 5)
            stalled.accounts = True
            group.fill(5)
            await group.until(lambda: len({*places(stalled, other)}) == 40)
    assert group.committed() == dict.fromkeys(range(4), 10)


async def test_a_pause_survives_an_assignment(broker: Broker) -> None:
    group = Group(broker)
    group.fill(10)
    idle = Member(group, accounts=False)
    settings = group.settings(max_poll_messages=1)
    async with open_kafka_source(settings, observer=idle) as source:
        idle.source = source
        async with group.open_member() as busy:
            await group.until_shared(busy, idle)
            group.fill(10)
            await idle.hears(SourcePaused)  # nobody polls: two polls wait, of one record each
        await group.until_shared(idle)
        assert source.statistics().paused
        assert not source._pump._kept  # nothing came in spite of it
        with trio.fail_after(PATIENCE_S):
            while len({*places(busy, idle)}) < 80:
                records = await source.poll()
                idle.records += records
                idle.account(records)
    assert places(busy, idle) == everything(range(4), 20)


@pytest.mark.parametrize("kind", [COOPERATIVE, RANGE, KIP_848], ids=["coop", "range", "kip848"])
async def test_a_partition_that_leaves_while_all_is_paused_is_read_when_it_comes_back(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    monkeypatch.setattr(pump, "_STALL_S", 0.1)
    group = Group(broker, defaults=kind)
    group.fill(10)
    idle = Member(group, accounts=False)
    settings = group.settings(max_poll_messages=10)
    async with (
        open_kafka_source(settings, observer=idle) as idle.source,
        trio.open_nursery() as nursery,
    ):
        await idle.hears(SourcePaused)  # nobody polls
        async with group.open_member(accounts=False) as other:
            await idle.hears(PartitionsRevoked)
            nursery.start_soon(idle.read)
            await idle.hears(SourcePaused, lambda event: not event.paused)
            await other.has_read(20)
        await group.until(lambda: len({*places(idle)}) == 40)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", [COOPERATIVE, RANGE, KIP_848], ids=["coop", "range", "kip848"])
async def test_a_partition_that_stands_still_for_good_is_read_after_leaving_and_joining_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    usual = watchdog.HOPELESS
    monkeypatch.setattr(watchdog, "HOPELESS", 3)
    group = Group(broker, defaults=kind)
    group.fill(5)
    silent = threading.Event()
    house, join = pump.Pump._keep_house, pump.Pump._join

    def go_silent(self: pump.Pump, now: float) -> None:
        if not silent.is_set():
            self._consumer.pause(
                [TopicPartition(group.topic, 0)]
            )  # of which the pump knows nothing
            silent.set()
        house(self, now)

    def join_again(self: pump.Pump) -> None:
        # From here on a machine that is busy for a second is not to be taken for one more partition that stands still.
        monkeypatch.setattr(watchdog, "HOPELESS", usual)
        join(self)

    async with group.open_member(progress_timeout_s=0.3) as member:
        await member.has_read(20)
        monkeypatch.setattr(pump.Pump, "_join", join_again)
        await group.until_committed(dict.fromkeys(range(4), 5))
        monkeypatch.setattr(pump.Pump, "_keep_house", go_silent)
        assert await trio.to_thread.run_sync(silent.wait, PATIENCE_S)
        count = 5
        with trio.fail_after(PATIENCE_S):
            while not member.of(PartitionsRevoked):
                group.fill(1)  # more and more: a fetch under way may know the end of a single one
                count += 1
                await trio.sleep(0.1)
        await member.has_read(4 * count)
        assert len(member.of(PartitionsRevoked)) == 1
        assert places(member) == everything(range(4), count)
        await group.until_committed(dict.fromkeys(range(4), count))


# ------------------------------------------------------------------------------------------------- static membership


async def test_a_static_member_that_restarts_gets_its_partitions_back_and_the_others_notice_nothing(
    broker: Broker,
) -> None:
    group = Group(broker, defaults={"session_timeout_s": 20.0})
    async with group.open_member(instance_id="one") as first:
        await group.until_shared(first)
        async with group.open_member(instance_id="two") as second:
            await group.until_shared(first, second)
            share = set(second.held)
        seen = len(first.events)
        group.fill(3)
        async with group.open_member(instance_id="two") as again:
            await group.until_shared(first, again)
            await group.until(lambda: len(places(first, second, again)) >= 12)
            assert again.held == share
        assert not [
            event
            for event in first.events[seen:]
            if isinstance(event, PartitionsAssigned | PartitionsRevoked | PartitionsLost)
        ]


@pytest.mark.parametrize(
    ("kind", "loser"), [(COOPERATIVE, 0), (KIP_848, 1)], ids=["cooperative-sticky", "KIP-848"]
)
async def test_of_two_members_with_one_instance_id_one_ends_with_an_error_that_names_the_cause(
    broker: Broker, kind: dict[str, Any], loser: int
) -> None:
    group = Group(broker, defaults=kind)
    group.fill(1)
    settings = group.settings(instance_id="same")

    async def read_on(source: KafkaSource) -> NoReturn:
        while True:
            await source.poll()

    with pytest.raises(SourceError, match=r"the same kafka\.instance_id 'same'"):  # noqa: PT012
        async with open_kafka_source(settings) as first:
            await first.poll()  # it has joined
            async with open_kafka_source(settings) as second:
                with trio.fail_after(PATIENCE_S):
                    await read_on((first, second)[loser])
