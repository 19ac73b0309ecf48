"""Partitions that come and go, against librdkafka's mock cluster: real sockets, threads, clock."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from confluent_kafka import TopicPartition

from stationmaster.events import (
    OffsetsCommitted,
    PartitionsLost,
    PartitionsRevoked,
    SourcePaused,
    SourceRecovered,
    SourceTrouble,
)
from stationmaster.kafka import KafkaSource, open_kafka_source, pump, watchdog
from tests.kafka.clients import (
    PATIENCE_S,
    Group,
    Listener,
    account,
    count_committed,
    everything,
    in_the_thread,
    places,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stationmaster.abc import Withdrawn
    from stationmaster.kafka.assignment import Holding, Key


CLASSIC: Final[dict[str, Any]] = {
    "group_protocol": "classic",
    "assignor": "range",
    "session_timeout_s": 3.5,  # the mock cluster lets the first join for 3 s, others for a second less than this
    "options": {"heartbeat.interval.ms": 200},
}


async def test_a_revoke_waits_for_what_was_handed_out_and_commits_it(
    group: Group, revoke_begins: trio.Event
) -> None:
    group.fill(10, range(4))
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        records = await read(source, 40)
        async with open_kafka_source(group.settings()) as joined:
            with trio.fail_after(PATIENCE_S):
                await revoke_begins.wait()
            account(source, records[:-1])
            assert not listener.of(PartitionsRevoked)
            account(source, records[-1:])
            revoked = await listener.hears(PartitionsRevoked)
            assert revoked.drained
            gone = {partition for _, partition in revoked.partitions}
            assert len(gone) == 2
            assert source.statistics().last_drain_s == revoked.drain_s
            assert source.statistics().rebalances == 2
            assert {group.committed()[partition] for partition in gone} == {10}
            group.fill(1, range(4))
            theirs = await read(joined, 2)
            ours = await read(source, 2)
    assert sorted(places(theirs)) == [(partition, 10) for partition in sorted(gone)]
    assert {record.generation for record in ours} == {1}  # retained: the generation stays


@pytest.mark.slow
async def test_a_revoke_ends_at_its_limit_and_late_work_is_not_committed(group: Group) -> None:
    group.fill(10, range(4))
    listener = Listener()
    settings = group.settings(drain_timeout_s=0.2)
    async with open_kafka_source(settings, observer=listener) as source:
        records = await read(source, 40)
        async with open_kafka_source(settings) as joined:
            revoked = await listener.hears(PartitionsRevoked)
            assert not revoked.drained
            gone = {partition for _, partition in revoked.partitions}
            account(source, records)  # too late for those two
            theirs = await read(joined, 20)
            assert sorted(places(theirs)) == everything(10, sorted(gone))
    kept = {0, 1, 2, 3} - gone
    assert group.committed() == dict.fromkeys(sorted(kept), 10)


@pytest.mark.slow
async def test_what_waits_unpolled_of_a_revoked_partition_is_dropped_and_read_by_its_next_owner(
    group: Group,
) -> None:
    group.fill(10, range(4))
    listener = Listener()
    settings = group.settings(max_poll_messages=10)
    async with open_kafka_source(settings, observer=listener) as source:
        await listener.hears(SourcePaused)
        async with open_kafka_source(group.settings()) as joined:
            revoked = await listener.hears(PartitionsRevoked)
            assert revoked.drained  # nothing was handed out
            theirs = await read(joined, 20)
            ours = await read(source, 20)
    assert sorted(places([*theirs, *ours])) == everything(10, range(4))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, CLASSIC], ids=["consumer", "classic"])
async def test_a_partition_that_leaves_while_all_is_paused_is_read_when_it_comes_back(
    group: Group, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(pump, "_STALL_S", 0.0)
    group.fill(10, range(4))
    listener = Listener()
    missing = set(everything(10, range(4)))

    async def read_on(source: KafkaSource) -> None:
        while missing:
            missing.difference_update(places(await source.poll()))

    settings = group.settings(max_poll_messages=10, **more)
    with trio.fail_after(2 * PATIENCE_S):
        async with (
            open_kafka_source(settings, observer=listener) as source,
            trio.open_nursery() as nursery,
        ):
            await listener.hears(SourcePaused)
            async with open_kafka_source(group.settings(**more)) as joined:
                await listener.hears(PartitionsRevoked)
                nursery.start_soon(read_on, source)  # from here on it is never paused for long
                await listener.hears(SourcePaused, lambda event: not event.paused)
                await read(joined, 20)  # a member that leaves while it joins is missed 30 s later


@pytest.mark.parametrize(
    "more", [{}, pytest.param(CLASSIC, marks=pytest.mark.slow)], ids=["consumer", "classic"]
)
async def test_a_partition_that_stands_still_for_good_is_read_after_leaving_and_joining_again(
    group: Group, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    usual = watchdog.HOPELESS
    monkeypatch.setattr(watchdog, "HOPELESS", 3)
    group.fill(3)
    listener = Listener()
    silent = threading.Event()
    join = pump.Pump._join

    def go_silent(pump: pump.Pump) -> None:
        pump._consumer.pause([TopicPartition(group.topic, 0)])  # of which the pump knows nothing
        silent.set()

    def join_again(pump: pump.Pump) -> None:
        # From here on a machine that is busy for a second is not to be taken for one more partition that stands still.
        monkeypatch.setattr(watchdog, "HOPELESS", usual)
        join(pump)

    settings = group.settings(progress_timeout_s=0.3, **more)
    async with open_kafka_source(settings, observer=listener) as source:
        account(source, await read(source, 3))
        await listener.hears(OffsetsCommitted)
        monkeypatch.setattr(pump.Pump, "_join", join_again)
        in_the_thread(monkeypatch, go_silent)
        assert await trio.to_thread.run_sync(silent.wait, PATIENCE_S)
        with trio.fail_after(PATIENCE_S):
            while not listener.of(PartitionsRevoked):
                group.fill(1)  # more and more: a fetch under way may know the end of a single one
                await trio.sleep(0.05)
        again = await read(source, 1)
        await listener.hears(SourceRecovered)
        assert not source.statistics().paused
    assert len(listener.of(PartitionsRevoked)) == 2  # the second at the end
    assert places(again[:1]) == [(0, 3)]
    assert {each.generation for each in again} == {2}


@pytest.mark.slow
async def test_a_partition_that_comes_back_has_a_new_generation_and_begins_at_its_commit(
    group: Group,
) -> None:
    group.fill(4, range(4))
    listener = Listener()
    settings = group.settings(drain_timeout_s=0.1)
    async with open_kafka_source(settings, observer=listener) as source:
        records = await read(source, 16)
        account(source, [record for record in records if record.offset < 2])
        async with open_kafka_source(settings) as joined:
            revoked = await listener.hears(PartitionsRevoked)
            gone = {partition for _, partition in revoked.partitions}
            await read(joined, 1)  # a member that leaves while it joins is missed only 30 s later
        again = await read(source, 4)
    assert sorted(places(again)) == [(p, offset) for p in sorted(gone) for offset in (2, 3)]
    assert {record.generation for record in again} == {2}


@pytest.mark.usefixtures("patient_questions")
async def test_closing_while_a_revoke_waits_ends_the_wait(
    group: Group, revoke_begins: trio.Event
) -> None:
    group.fill(10, range(4))
    listener = Listener()
    async with AsyncExitStack() as stack:
        leaving = open_kafka_source(group.settings(drain_timeout_s=1000), observer=listener)
        async with leaving as source:
            await read(source, 40)
            joined = await stack.enter_async_context(open_kafka_source(group.settings()))
            with trio.fail_after(PATIENCE_S):
                await revoke_begins.wait()
        assert not listener.of(SourceTrouble)
        assert not any(event.drained for event in listener.of(PartitionsRevoked))
        assert sorted(places(await read(joined, 40))) == everything(10, range(4))


async def test_partitions_that_are_lost_are_never_committed(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.fill(4)
    listener = Listener()
    # (Two questions of the pump that a busy broker leaves open take a second of its turn.)
    settings = group.settings(options={"max.poll.interval.ms": 2000}, commit_interval_s=1000)
    withdrawn: list[Withdrawn] = []
    lost = threading.Event()
    keep_house, forget = pump.Pump._keep_house, pump.Pump._forget

    def be_held_up(self: pump.Pump, now: float) -> None:
        if not lost.is_set():
            time.sleep(
                2.5
            )  # the client looks twice a second; what it finds is heard in this thread's next poll
        keep_house(self, now)

    def notice(self: pump.Pump, holdings: Sequence[Holding]) -> tuple[Key, ...]:
        lost.set()
        return forget(self, holdings)

    async with open_kafka_source(settings, observer=listener) as source:
        source.watch_withdrawals(withdrawn.append)
        records = await read(source, 4)
        account(source, records)
        monkeypatch.setattr(pump.Pump, "_forget", notice)
        monkeypatch.setattr(pump.Pump, "_keep_house", be_held_up)
        await listener.hears(PartitionsLost)
        assert [sorted(each) for each in withdrawn] == [[(group.topic, p, 1) for p in range(4)]]
        assert source.statistics().max_poll_exceeded == 1
        assert source.statistics().lost_partitions == 4
        again = await read(source, 4)
        assert {record.generation for record in again} == {2}
        await listener.hears(SourceRecovered)
    assert group.committed() == {}
    assert "max-poll-exceeded" in {event.kind for event in listener.of(SourceTrouble)}


async def test_a_log_that_was_made_anew_begins_a_new_generation(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.fill(4)
    listener = Listener()
    withdrawn: list[Withdrawn] = []
    async with open_kafka_source(group.settings(), observer=listener) as source:
        source.watch_withdrawals(withdrawn.append)
        old = await read(source, 4)
        again = TopicPartition(group.topic, 0, 1)
        in_the_thread(monkeypatch, lambda pump: pump._consumer.seek(again))
        new = await read(source, 3)
        account(source, old)
        account(source, new)
    assert places(new) == [(0, 1), (0, 2), (0, 3)]
    assert {record.generation for record in old} == {1}
    assert {record.generation for record in new} == {2}
    assert withdrawn == [[(group.topic, 0, 1)]]
    (reset,) = [each for each in listener.of(SourceTrouble) if each.kind == "offset-reset"]
    assert "goes back from offset 4 to 1" in reset.detail
    assert group.committed() == {0: 4}


async def test_records_of_a_partition_that_is_not_held_are_dropped(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.fill(1)
    forgotten = threading.Event()

    def forget(pump: pump.Pump) -> None:
        pump._assignment.forget(list(pump._assignment.find_all([TopicPartition(group.topic, 1)])))
        forgotten.set()

    async with open_kafka_source(group.settings()) as source:
        await read(source, 1)
        in_the_thread(monkeypatch, forget)
        assert await trio.to_thread.run_sync(forgotten.wait, 10.0)
        group.fill(3, [1])
        group.fill(3, [2])
        assert places(await read(source, 3)) == [(2, 0), (2, 1), (2, 2)]


@pytest.mark.slow
@pytest.mark.usefixtures("patient_questions")
async def test_an_eager_group_whose_commit_is_refused_reads_those_records_again(
    group: Group, revoke_begins: trio.Event
) -> None:
    group.fill(5, range(4))
    listener = Listener()
    settings = group.settings(
        group_protocol="classic",
        assignor="range",
        session_timeout_s=6,
        options={"heartbeat.interval.ms": 200},
    )
    async with open_kafka_source(settings, observer=listener) as source:
        records = await read(source, 20)
        account(source, [record for record in records if record.offset < 4])
        await listener.hears(OffsetsCommitted, lambda _: count_committed(listener) == 16)
        async with open_kafka_source(settings) as joined:
            with trio.fail_after(PATIENCE_S):
                await revoke_begins.wait()
            account(source, [record for record in records if record.offset == 4])
            # Kafka refuses commits in one phase of a classic group's rebalance, this broker in all of them.
            revoked = await listener.hears(PartitionsRevoked)
            assert (len(revoked.partitions), revoked.drained) == (4, False)
            assert [event.kind for event in listener.of(SourceTrouble)] == ["commit"]
            assert group.committed() == dict.fromkeys(range(4), 4)
            again: set[tuple[int, int]] = set()

            async def take(one: KafkaSource) -> None:
                while len(again) < 4:
                    polled = await one.poll()
                    account(one, polled)
                    again.update(places(polled))
                nursery.cancel_scope.cancel()

            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(take, source)
                    nursery.start_soon(take, joined)
    assert again == {(partition, 4) for partition in range(4)}


CHILD = """
import sys, trio
from stationmaster.batch import OffsetRange
from stationmaster.events import OffsetsCommitted
from stationmaster.kafka import KafkaSettings, open_kafka_source

class Teller:
    detailed = False

    def observe(self, event):
        if isinstance(event, OffsetsCommitted):
            print("committed", event.offsets[0].last, flush=True)

async def main(servers, group, topic):
    settings = KafkaSettings(bootstrap_servers=servers, group_id=group, topics=(topic,), assignor="range",
                             session_timeout_s=6, commit_interval_s=0.05)
    async with open_kafka_source(settings, observer=Teller()) as source:
        seen = 0
        while True:
            for r in await source.poll():
                seen += 1
                if seen <= 30:
                    source.account(OffsetRange(topic=r.topic, partition=r.partition, first=r.offset, last=r.offset,
                                               generation=r.generation))
                print("seen", r.offset, flush=True)

trio.run(main, *sys.argv[1:])
"""


@pytest.mark.slow
async def test_after_a_kill_the_next_member_begins_where_the_commits_ended(group: Group) -> None:
    group.fill(50)
    child = [sys.executable, "-c", CHILD, group.broker.bootstrap_servers, group.name, group.topic]
    process = await trio.lowlevel.open_process(child, stdout=subprocess.PIPE)
    assert process.stdout is not None
    async with process.stdout:
        said = b""
        with trio.fail_after(PATIENCE_S):
            while not (b"seen 49\n" in said and b"committed 29\n" in said):
                said += await process.stdout.receive_some()
        process.send_signal(signal.SIGKILL)
        await process.wait()
    settings = group.settings(group_protocol="classic", assignor="range", session_timeout_s=6)
    async with open_kafka_source(settings) as source:
        records = await read(source, 20)
    assert places(records) == [(0, offset) for offset in range(30, 50)]
