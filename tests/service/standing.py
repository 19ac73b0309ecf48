"""How a Kafka source stands, for those who only look at it: all well, but for what a test says."""

from __future__ import annotations

from typing import Any

import attrs

from stationmaster.kafka import KafkaStatistics, PartitionStatistics


def partition(number: int, lag: int | None = 0, **changed: Any) -> PartitionStatistics:
    """Return a partition that nothing was read of yet."""
    fresh = PartitionStatistics(
        topic="air",
        partition=number,
        generation=1,
        committed=None,
        high_watermark=None,
        lag=lag,
        outstanding=0,
    )
    return attrs.evolve(fresh, **changed)


def kafka(*partitions: PartitionStatistics, **changed: Any) -> KafkaStatistics:
    """Return a source with these partitions."""
    well = KafkaStatistics(
        partitions=partitions,
        paused=False,
        max_poll_exceeded=0,
        rebalances=0,
        lost_partitions=0,
        last_drain_s=None,
        commit_errors=0,
        offset_resets=0,
        stalls=0,
        unreadable_headers=0,
        dropped_polls=0,
        pump_idle_s=0.1,
        pump_limit_s=10.0,
        pump_alive=True,
        broker_silent_s=0.5,
        is_settled=True,
    )
    return attrs.evolve(well, **changed)
