"""Gatherings: where messages of a time go, and how much is remembered."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import attrs

from stationmaster import gatherings as module
from stationmaster.gatherings import Gatherings
from tests.telemetry import NOON

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

KEY = ("air", NOON)


@attrs.define(eq=False)
class Fake:
    """An open batch in which these stations have begun."""

    begun: set[str] = attrs.field(factory=set)

    def takes(self, station_ids: Iterable[str], /) -> bool:
        return not self.begun.intersection(station_ids)


def test_the_oldest_batch_that_takes_all_stations_is_the_place() -> None:
    first, second, other = Fake({"A"}), Fake({"B"}), Fake()
    gatherings: Gatherings[Fake] = Gatherings()
    gatherings.enter(KEY, first)
    gatherings.enter(KEY, second)
    gatherings.enter(("wind", NOON), other)
    assert gatherings.place_for(KEY, ["C"]) is first
    assert gatherings.place_for(KEY, ["C", "A"]) is second
    assert gatherings.place_for(KEY, ["A", "B"]) is None
    assert gatherings.place_for(("air", NOON + timedelta(seconds=1)), ["C"]) is None
    gatherings.leave(KEY, first, delivered=True)
    assert gatherings.place_for(KEY, ["C"]) is second


def test_a_time_is_followed_while_a_batch_is_open_and_after_one_was_delivered() -> None:
    batch = Fake()
    gatherings: Gatherings[Fake] = Gatherings()
    assert not gatherings.follows(KEY)
    gatherings.enter(KEY, batch)
    assert gatherings.follows(KEY)
    gatherings.leave(KEY, batch, delivered=False)
    assert not gatherings.follows(KEY)
    gatherings.enter(KEY, batch)
    gatherings.leave(KEY, batch, delivered=True)
    assert gatherings.follows(KEY)


def test_times_are_remembered_up_to_a_bound_the_latest_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 3)
    gatherings: Gatherings[Fake] = Gatherings()
    keys = [("air", NOON + timedelta(minutes=minute)) for minute in range(4)]
    for key in (*keys[:3], keys[0], keys[3]):
        batch = Fake()
        gatherings.enter(key, batch)
        gatherings.leave(key, batch, delivered=True)
    assert [gatherings.follows(key) for key in keys] == [True, False, True, True]
