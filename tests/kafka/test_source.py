"""Polling, committing, backpressure and closing, against librdkafka's mock cluster: real sockets, threads, clock."""

from __future__ import annotations

import threading
import tracemalloc

import pytest
import trio

from stationmaster.events import (
    OffsetsCommitted,
    PartitionsAssigned,
    SourcePaused,
    SourceTrouble,
)
from stationmaster.kafka import KafkaSource, PartitionStatistics, open_kafka_source, pump
from stationmaster.kafka.handover import Command
from tests.kafka.clients import (
    PATIENCE_S,
    Group,
    Listener,
    account,
    everything,
    free_port,
    open_forwarder,
    places,
    produce_raw,
    read,
)


@pytest.mark.usefixtures("patient_questions")
async def test_a_commit_goes_through_while_polling_goes_on(group: Group) -> None:
    listener = Listener()
    async with (
        open_kafka_source(group.settings(), observer=listener) as source,
        trio.open_nursery() as nursery,
    ):
        await listener.hears(PartitionsAssigned)
        group.fill(3)
        account(source, await read(source, 3))
        nursery.start_soon(source.poll)  # waits, and the thread polls
        taken = await listener.hears(OffsetsCommitted, lambda event: event.offsets[0].last == 2)
        assert group.committed() == {0: 3}
        nursery.cancel_scope.cancel()
    assert taken.offsets[0].topic == group.topic
    assert not listener.of(SourceTrouble)


async def test_commits_only_ever_move_forward_and_name_every_offset_once(group: Group) -> None:
    group.fill(60)
    listener = Listener()
    settings = group.settings(max_poll_messages=1, commit_interval_s=0.001)
    async with open_kafka_source(settings, observer=listener) as source:
        for _ in range(60):
            (record,) = await source.poll()
            account(source, [record])
    spans = [span for event in listener.of(OffsetsCommitted) for span in event.offsets]
    covered = [offset for span in spans for offset in range(span.first, span.last + 1)]
    assert covered == list(range(60))
    assert len(spans) > 1


async def test_statistics_tell_lag_and_what_is_outstanding(group: Group) -> None:
    group.fill(5)
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        assert source.statistics().partitions == ()
        await listener.hears(PartitionsAssigned)
        idle = next(p for p in source.statistics().partitions if p.partition == 1)
        assert (idle.generation, idle.committed, idle.outstanding) == (1, None, 0)
        assert source.statistics().rebalances == 1
        records = await read(source, 5)
        account(source, records[:3])
        await listener.hears(OffsetsCommitted, lambda event: event.offsets[0].last == 2)
        group.fill(2)
        await read(source, 2)
        account(source, records[3:4])
        await listener.hears(OffsetsCommitted, lambda event: event.offsets[0].last == 3)
        busy = next(p for p in source.statistics().partitions if p.partition == 0)
        assert (busy.committed, busy.high_watermark, busy.lag, busy.outstanding) == (4, 7, 3, 3)
        assert not source.statistics().paused
        assert source.statistics().pump_idle_s < PATIENCE_S


async def test_lag_is_known_before_the_first_record_comes(group: Group) -> None:
    group.fill(5)
    group.fill(2, [1])
    group.broker.commit(group.name, group.topic, 3)
    group.broker.commit(group.name, group.topic, 2, partition=1)
    async with open_kafka_source(group.settings(max_poll_messages=1)) as source:
        assert await known_lags(source) == [2, 0, 0, 0]
        assert [p.outstanding for p in by_number(source)] == [0, 0, 0, 0]


async def known_lags(source: KafkaSource) -> list[int | None]:
    """Wait until the lag of every partition is known; return them in order."""
    with trio.fail_after(PATIENCE_S):
        while None in (lags := [p.lag for p in by_number(source)]) or not lags:
            await trio.to_thread.run_sync(next_look, source)
    return lags


def by_number(source: KafkaSource) -> list[PartitionStatistics]:
    return sorted(source.statistics().partitions, key=lambda each: each.partition)


def next_look(source: KafkaSource) -> None:
    """Wait in a thread for the pump's next turn."""
    began = source._pump.last_turn
    while source._pump.last_turn == began:
        threading.Event().wait(0.001)


async def test_a_record_whose_header_has_a_name_that_is_not_utf_8_comes_without_headers(
    group: Group,
) -> None:
    group.fill(100)  # until the interpreter has specialised the calls
    produce_raw(group.broker.bootstrap_servers, group.topic, b"odd", header=(b"\xff\xfe", b"v"))
    group.broker.produce(group.topic, [b"even"], headers=[("trace", b"1")])
    async with open_kafka_source(group.settings()) as source:
        records = await read(source, 102)
        assert source.statistics().unreadable_headers == 1
        account(source, records)
    odd, even = records[-2:]
    assert (odd.value, odd.headers) == (b"odd", ())
    assert (even.value, even.headers) == (b"even", (("trace", b"1"),))
    assert group.committed() == {0: 102}


async def test_a_pump_with_nothing_to_poll_keeps_nothing(group: Group) -> None:
    listener = Listener()
    settings = group.settings(poll_timeout_s=0.001)
    async with open_kafka_source(settings, observer=listener) as source:
        # The book of the partitions is growth too: all of it is there before anything is measured.
        await listener.hears(PartitionsAssigned)
        await known_lags(source)
        await turn(source, 50)
        tracemalloc.start()
        try:
            await turn(source, 200)
            before = ours(tracemalloc.take_snapshot())
            await turn(source, 800)
            after = ours(tracemalloc.take_snapshot())
        finally:
            tracemalloc.stop()
    assert after - before < 800  # not a byte a turn


async def turn(source: KafkaSource, times: int) -> None:
    """Let the pump's thread go round so many times."""

    def wait() -> None:
        for _ in range(times):
            next_look(source)

    with trio.fail_after(PATIENCE_S):
        await trio.to_thread.run_sync(wait)


def ours(snapshot: tracemalloc.Snapshot) -> int:
    """Return the bytes that the source's own lines hold."""
    filters = [tracemalloc.Filter(True, "*/stationmaster/kafka/*")]
    return sum(each.size for each in snapshot.filter_traces(filters).traces)


# ----------------------------------------------------------------------------------------------------- backpressure


async def test_when_nobody_polls_the_partitions_are_paused_and_nothing_is_lost_or_doubled(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_STALL_S", 0.2)
    group.fill(40, range(4))
    listener = Listener()
    settings = group.settings(max_poll_messages=10)
    async with open_kafka_source(settings, observer=listener) as source:
        await listener.hears(SourcePaused)
        assert source.statistics().paused
        group.fill(1, [0])  # arrives while all is paused
        records = await read(source, 161)
        await listener.hears(SourcePaused, lambda event: not event.paused)
    assert sorted(places(records)) == sorted([*everything(40, range(4)), (0, 40)])


async def test_a_partition_that_is_assigned_during_a_pause_is_paused_as_well(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_STALL_S", 0.0)
    group.fill(3)
    port = free_port()
    listener = Listener()
    settings = group.settings(bootstrap_servers=f"127.0.0.1:{port}")
    async with open_kafka_source(settings, observer=listener) as source:
        source._pump._credits = 0
        await listener.hears(SourcePaused)
        async with open_forwarder(port, group.broker.bootstrap_servers):
            await listener.hears(PartitionsAssigned)
            with trio.move_on_after(0.5):
                await source.poll()
                pytest.fail("a record came although there was no credit")
            assert not source._pump._kept  # none came at all, not even to be kept
            source._handover.commands.put(Command.MORE)
            assert places(await read(source, 3)) == everything(3)


@pytest.mark.parametrize("at_most", [1, 10])
async def test_a_message_that_comes_during_a_pause_all_the_same_is_kept(
    group: Group, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    monkeypatch.setattr(pump, "_STALL_S", 0.1)
    group.fill(30)
    listener = Listener()
    settings = group.settings(max_poll_messages=at_most)
    async with open_kafka_source(settings, observer=listener) as source:
        await listener.hears(SourcePaused)
        resumed, kept = threading.Event(), threading.Event()

        keep_house = pump.Pump._keep_house

        def resume_once(self: pump.Pump, now: float) -> None:  # in the thread that owns the client
            keep_house(self, now)
            if not resumed.is_set():
                resumed.set()
                self._consumer.resume(self._consumer.assignment())
            elif self._kept:
                kept.set()

        monkeypatch.setattr(pump.Pump, "_keep_house", resume_once)
        assert await trio.to_thread.run_sync(kept.wait, PATIENCE_S)
        monkeypatch.undo()
        assert places(await read(source, 30)) == everything(30)


async def test_closing_with_polls_that_nobody_took_drops_and_counts_them(group: Group) -> None:
    group.fill(50)
    listener = Listener()
    settings = group.settings(max_poll_messages=10)
    async with open_kafka_source(settings, observer=listener) as source:
        await listener.hears(SourcePaused)
    assert source.statistics().dropped_polls == pump.CREDITS
    assert group.committed() == {}
    async with open_kafka_source(settings) as source:
        assert places(await read(source, 50)) == everything(50)


async def test_a_last_commit_that_breaks_leaves_no_client_open(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("cannot be asked any more")

    group.fill(1)
    with pytest.raises(RuntimeError, match="cannot be asked any more"):  # noqa: PT012 - what leaving raises
        async with open_kafka_source(group.settings()) as source:
            await read(source, 1)
            monkeypatch.setattr(pump.Pump, "_commit_the_rest", break_down)
    with pytest.raises(RuntimeError, match="closed"):
        source._pump._consumer.assignment()


async def test_after_closing_a_poll_is_refused(group: Group) -> None:
    async with open_kafka_source(group.settings()) as source:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await source.poll()
