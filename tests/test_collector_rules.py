"""The collector against a plain model: whatever happens in whatever order, counts, rule and report fit together."""

from __future__ import annotations

import math
from collections import Counter

import attrs
import trio
from hypothesis import given
from hypothesis import strategies as st

from stationmaster.abc import NullObserver
from stationmaster.batch import ClosedBy, Outcome, StationResult
from stationmaster.collector import Collector
from stationmaster.events import LateResult
from stationmaster.testing import RecordingObserver
from tests.telemetry import NOON, batch

NAMES = [f"S{number}" for number in range(8)]
ANSWERS = {Outcome.SUCCEEDED, Outcome.NO_OUTPUT, Outcome.FAILED}


def collector(
    *station_ids: str, roster: tuple[str, ...] = (), quorum: float = 1.0, waits: bool = False
) -> Collector:
    # A dictionary of its own, as a draft's: what joins is added to it.
    opened = batch(*station_ids)
    opened = attrs.evolve(opened, roster=roster, entries=dict(opened.entries))
    return Collector(
        opened, opened=0.0, quorum=quorum, report_bytes=1_000, observer=NullObserver(), waits=waits
    )


def never() -> None:
    raise AssertionError


def join(collecting: Collector, *station_ids: str) -> None:
    entries = collecting.batch.entries
    assert isinstance(entries, dict)
    entries.update(dict.fromkeys(station_ids, ({},)))
    collecting.join(station_ids)


def result(station_id: str, outcome: Outcome = Outcome.SUCCEEDED) -> StationResult:
    return StationResult(station_id, outcome)


steps = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from([*sorted(ANSWERS, key=str), Outcome.REJECTED]),
    ),
    max_size=12,
)


@given(
    station_ids=st.lists(st.sampled_from(NAMES), unique=True),
    roster=st.lists(st.sampled_from(NAMES), unique=True),
    quorum=st.sampled_from([0.01, 0.3, 0.5, 0.75, 0.99, 1.0]),
    waits=st.booleans(),
    steps=steps,
)
def test_done_counts_and_rule_are_those_of_the_definition(
    station_ids: list[str],
    roster: list[str],
    quorum: float,
    waits: bool,
    steps: list[tuple[str, Outcome]],
) -> None:
    async def main() -> None:
        collecting = collector(*station_ids, roster=tuple(roster), quorum=quorum, waits=waits)
        first: dict[str, Outcome] = {}
        absent = [name for name in roster if name not in station_ids]
        awaited = len(station_ids) + (len(absent) if waits else 0)

        def state() -> tuple[bool, bool]:
            answers = sum(outcome in ANSWERS for outcome in first.values())
            rejected = sum(outcome is Outcome.REJECTED for outcome in first.values())
            needed = max(1, math.ceil(quorum * (awaited - rejected) - 1e-9))
            return len(first) == awaited, quorum < 1 and answers >= needed

        was_done = any(state())
        assert collecting.done.is_set() == was_done
        for station_id, outcome in steps:
            if station_id in station_ids:
                collecting.settle(result(station_id, outcome))
                first.setdefault(station_id, outcome)
                was_done = was_done or any(state())
                assert collecting.done.is_set() == was_done
        report = collecting.close(closed_at=NOON)
        complete, by_quorum = state()
        assert report.closed_by is (
            ClosedBy.COMPLETE if complete else ClosedBy.QUORUM if by_quorum else ClosedBy.DEADLINE
        )
        assert [item.station_id for item in report.results] == [*station_ids, *absent]
        told = {item.station_id: item.outcome for item in report.results}
        for name in station_ids:
            assert told[name] is first.get(name, Outcome.TIMED_OUT)
        assert all(told[name] is Outcome.MISSING for name in absent)
        assert {key: n for key, n in report.counts.items() if n} == Counter(told.values())

    trio.run(main)


async def test_a_station_of_the_roster_without_data_is_missing_and_not_waited_for() -> None:
    collecting = collector("A", roster=("A", "B", "C"))
    assert not collecting.done.is_set()
    collecting.settle(result("A"))
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.COMPLETE
    assert [(item.station_id, item.outcome, item.reason) for item in report.results[1:]] == [
        ("B", Outcome.MISSING, "no data in the batch"),
        ("C", Outcome.MISSING, "no data in the batch"),
    ]


async def test_a_batch_without_data_and_with_a_roster_is_complete_at_once() -> None:
    collecting = collector(roster=("A", "B"))
    assert collecting.done.is_set()
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.COMPLETE
    assert report.counts[Outcome.MISSING] == 2


async def test_the_quorum_is_a_share_of_those_that_can_answer() -> None:
    # 10 expected, 4 missing, 2 rejected: half of the remaining 4.
    collecting = collector(*NAMES[:6], roster=(*NAMES, "X", "Y"), quorum=0.5)
    for name in NAMES[:2]:
        collecting.settle(result(name, Outcome.REJECTED))
    collecting.settle(result(NAMES[2]))
    assert not collecting.done.is_set()
    collecting.settle(result(NAMES[3]))
    assert collecting.close(closed_at=NOON).closed_by is ClosedBy.QUORUM


async def test_a_batch_that_waits_is_complete_when_the_whole_roster_came_and_answered() -> None:
    collecting = collector("A", roster=("A", "B"), waits=True)
    collecting.settle(result("A"))
    assert not collecting.done.is_set()
    join(collecting, "B", "C")
    collecting.settle(result("B"))
    assert not collecting.done.is_set()  # C is on no roster, and expected now
    collecting.settle(result("C"))
    assert collecting.close(closed_at=NOON).closed_by is ClosedBy.COMPLETE


async def test_who_never_came_to_a_batch_that_waits_is_missing_in_the_end() -> None:
    collecting = collector("A", roster=("A", "B"), waits=True)
    collecting.settle(result("A"))
    report = collecting.close(closed_at=NOON)
    assert report.closed_by is ClosedBy.DEADLINE
    assert report.results[1].outcome is Outcome.MISSING
    assert report.results[1].reason == "no data when the deadline closed the batch"


async def test_nobody_joins_what_is_decided_or_a_station_that_has_begun() -> None:
    collecting = collector("A", "B", roster=("A", "B", "C"), waits=True)
    assert collecting.takes(["A", "C"])
    collecting.begin("A", lambda: None)
    assert not collecting.takes(["C", "A"])
    assert collecting.takes(["B"])
    collecting.end("A")
    collecting.begin_call(frozenset({"B"}), never)
    assert not collecting.takes(["C", "B"])
    collecting.end_call(never)
    assert collecting.takes(["B"])
    collecting.settle(result("A"))
    assert not collecting.takes(["A"])
    join(collecting, "C")
    for name in "BC":
        collecting.settle(result(name))
    assert not collecting.takes(["D"])

    by_quorum = collector("A", roster=("A", "B"), waits=True, quorum=0.5)
    by_quorum.settle(result("A"))
    assert not by_quorum.takes(["B"])

    closed = collector("A", roster=("A", "B"), waits=True)
    closed.close(closed_at=NOON)
    assert not closed.takes(["B"])

    assert not collector("A").takes(["B"])  # one that does not wait


async def test_late_answers_of_any_kind_are_told_and_late_rejections_are_not() -> None:
    observer = RecordingObserver()
    collecting = Collector(batch(*NAMES), opened=0.0, quorum=1.0, report_bytes=9, observer=observer)
    collecting.close(closed_at=NOON)
    for name, outcome in zip(NAMES, [*ANSWERS, Outcome.REJECTED], strict=False):
        collecting.settle(result(name, outcome))
    assert len(observer.of(LateResult)) == 3
