"""Drafts: what messages hold together, their ids and their ranges."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import attrs

from stationmaster.batch import Message, OffsetRange
from stationmaster.drafts import Draft, draft_batch
from tests.telemetry import message

if TYPE_CHECKING:
    from collections.abc import Sequence


def by_message(*stations: Any, **place: Any) -> Draft:
    return draft_batch([message(*stations, **place)], by="message", group_id="group")


def by_poll(*messages: Message, group_id: str = "group") -> Draft:
    return draft_batch(messages, by="poll", group_id=group_id)


def test_the_id_of_a_message_names_its_record_and_is_the_same_after_a_redelivery() -> None:
    place = {"topic": "wind", "partition": 2, "offset": 12345, "timestamp_ms": 1_999}
    assert by_message("A", **place, generation=1).batch_id == "wind_2_12345_1"
    assert by_message("A", **place, generation=9).batch_id == "wind_2_12345_1"


def test_the_seconds_in_an_id_are_rounded_down_even_before_the_epoch() -> None:
    assert by_message("A", timestamp_ms=-1).batch_id == "air_0_0_-1"
    assert by_message("A", timestamp_ms=1_700_000_000_999).batch_id == "air_0_0_1700000000"


def test_the_id_of_a_poll_depends_on_the_group_the_ranges_and_when_each_begins() -> None:
    same = [
        by_poll(message("A", offset=3), message("B", offset=5)),
        by_poll(message("C", offset=3), message("D", offset=5, timestamp_ms=9, generation=0)),
        by_poll(message("A", offset=3, generation=4), message("B", offset=5, generation=4)),
    ]
    others = [
        by_poll(message("A", offset=3), message("B", offset=5), group_id="another"),
        by_poll(message("A", offset=3), message("B", offset=6)),
        by_poll(message("A", offset=2), message("B", offset=5)),
        by_poll(message("A", offset=3, partition=1), message("B", offset=5, partition=1)),
        by_poll(message("A", offset=3, topic="wind"), message("B", offset=5, topic="wind")),
        by_poll(message("A", offset=3, timestamp_ms=9), message("B", offset=5)),
    ]
    assert len({draft.batch_id for draft in same}) == 1
    assert len({draft.batch_id for draft in [*same, *others]}) == 7
    topic, digest = same[0].batch_id.split("_")
    assert topic == "air"
    assert len(digest) == 16
    assert int(digest, 16)


def test_ids_stay_what_they_are_from_one_release_to_the_next() -> None:
    # A target tells a batch that comes again after an update by its id.
    draft = by_poll(message("A", offset=3), message("B", offset=5, partition=1, timestamp_ms=9))
    assert draft.batch_id == "air_29188fbc45c1a733"


def test_the_ranges_of_a_poll_stand_for_partition_and_generation_in_order() -> None:
    draft = by_poll(
        message("A", partition=1, offset=7),
        message("A", partition=0, offset=3, generation=1),
        message("A", partition=1, offset=9),
        message("A", partition=0, offset=4, generation=2),
    )
    assert draft.ranges == (
        OffsetRange(topic="air", partition=0, first=3, last=3, generation=1),
        OffsetRange(topic="air", partition=0, first=4, last=4, generation=2),
        OffsetRange(topic="air", partition=1, first=7, last=9, generation=0),
    )


def test_a_range_ends_before_a_refused_record_and_gaps_do_not_end_it() -> None:
    messages = [message("A", offset=offset) for offset in (0, 1, 5, 7, 9)]
    messages.insert(2, message("A", partition=1, offset=5))
    messages[3] = attrs.evolve(messages[3], follows=4)
    messages[4] = attrs.evolve(messages[4], follows=5)
    draft = draft_batch(messages, by="poll", group_id="")
    assert [(r.partition, r.first, r.last) for r in draft.ranges] == [
        (0, 0, 1),
        (0, 5, 9),
        (1, 5, 5),
    ]


def test_the_readings_of_a_station_come_together_in_order_with_its_last_message() -> None:
    first = message(
        {"stationId": "B", "x": 1}, {"stationId": "A", "x": 2}, {"stationId": "B", "x": 3}
    )
    second = message({"stationId": "C"}, {"stationId": "A", "x": 4}, 7, offset=1)
    draft = by_poll(first, second)
    assert list(draft.entries) == ["B", "A", "C"]
    assert draft.entries == {"B": ({"x": 1}, {"x": 3}), "A": ({"x": 2}, {"x": 4}), "C": ({},)}
    assert draft.last_message == {"B": first, "A": second, "C": second}
    assert [bad.reason for bad in draft.bad_entries] == ["not-an-object"]
    assert draft.size_bytes == first.size_bytes + second.size_bytes


def by_time(*places: tuple[int, int, int | None], **settings: Any) -> Draft:
    """A draft of messages at (partition, offset, the offset before)."""
    messages = [
        attrs.evolve(message("A", partition=partition, offset=offset), follows=follows)
        for partition, offset, follows in places
    ]
    return draft_batch(messages, by="timestamp", group_id="group", **settings)


def spans(draft: Draft) -> Sequence[tuple[int, int, int]]:
    return [(r.partition, r.first, r.last) for r in draft.ranges]


def test_a_range_ends_where_a_record_of_another_batch_stands_between() -> None:
    draft = by_time((0, 5, 4), (1, 2, 1), (0, 7, 6), (0, 9, 7), (1, 3, 2))
    assert spans(draft) == [(0, 5, 5), (0, 7, 9), (1, 2, 3)]


def test_what_joins_goes_on_with_a_range_only_if_nothing_stands_between() -> None:
    draft = by_time((0, 5, 4), (1, 2, 1))
    draft.absorb(by_time((0, 6, 5), (0, 8, 7), (2, 1, None)))
    draft.absorb(by_time((0, 9, 8), (1, 4, 3)))
    assert spans(draft) == [(0, 5, 6), (0, 8, 9), (1, 2, 2), (1, 4, 4), (2, 1, 1)]


def test_the_id_changes_when_something_joins_and_is_that_of_all_together() -> None:
    parts = by_time((0, 5, 4))
    alone = parts.batch_id
    parts.absorb(by_time((0, 6, 5)))
    parts.absorb(by_time((1, 2, 1)))
    together = by_time((0, 5, 4), (0, 6, 5), (1, 2, 1))
    assert parts.batch_id == together.batch_id != alone


def test_what_joins_brings_readings_in_order_and_counts_what_is_double() -> None:
    first = message({"stationId": "A", "x": 1}, {"stationId": "B", "x": 2}, 7)
    second = message({"stationId": "A", "x": 3}, {"stationId": "A", "x": 4}, {"stationId": "C"}, 8)
    draft = draft_batch([first], by="timestamp", group_id="")
    draft.absorb(draft_batch([second], by="timestamp", group_id=""))
    assert draft.entries == {
        "A": ({"x": 1}, {"x": 3}, {"x": 4}),
        "B": ({"x": 2},),
        "C": ({},),
    }
    assert draft.last_message == {"A": second, "B": first, "C": second}
    assert draft.duplicates == 2
    assert draft.size_bytes == first.size_bytes + second.size_bytes
    assert [bad.index for bad in draft.bad_entries] == [2, 3]
    assert draft_batch([first, second], by="poll", group_id="").duplicates == 2


def test_a_message_alone_is_drafted_as_among_others() -> None:
    alone = by_message({"stationId": "B", "x": 1}, {"stationId": "A", "x": 2})
    assert list(alone.entries.items()) == [("B", ({"x": 1},)), ("A", ({"x": 2},))]
    assert alone.duplicates == 0
    twice = by_message({"stationId": "B", "x": 1}, "A", {"stationId": "B", "x": 2}, 7)
    assert list(twice.entries.items()) == [("B", ({"x": 1}, {"x": 2})), ("A", ({},))]
    assert twice.duplicates == 1
    assert [bad.index for bad in twice.bad_entries] == [3]
    twice.add([message({"stationId": "A", "x": 3}, offset=1)])
    assert twice.entries["A"] == ({}, {"x": 3})
    assert twice.duplicates == 2


def test_a_message_more_costs_the_same_however_many_its_draft_holds_of_a_station() -> None:
    one = message({"stationId": "A", "x": 1}, 7)
    messages = [attrs.evolve(one, offset=n, follows=n - 1) for n in range(4_100)]
    draft = draft_batch(messages[:1], by="timestamp", group_id="")
    for each in messages[1:4_000]:
        draft.add([each])
    copies = 0
    tracemalloc.start()
    try:
        for each in messages[4_000:]:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            draft.add([each])
            assert list(draft.station_ids) == ["A"]
            copies += tracemalloc.get_traced_memory()[1] - before > 4_000 * 8 / 2
    finally:
        tracemalloc.stop()
    assert copies <= 2  # a list may have to move, once in a while
    assert len(draft.entries["A"]) == len(draft.bad_entries) == 4_100
    assert spans(draft) == [(0, 0, 4_099)]


def test_what_is_added_after_a_look_and_before_another_joins_keeps_its_order() -> None:
    first, *others, last = (message(*[7] * x, {"stationId": "A", "x": x}) for x in range(7))
    draft = draft_batch([first], by="timestamp", group_id="")
    draft.add(others[:1])
    assert draft.entries == {"A": ({"x": 0}, {"x": 1})}
    assert [bad.index for bad in draft.bad_entries] == [0]
    draft.add(others[1:3])
    other = draft_batch(others[3:4], by="timestamp", group_id="")
    other.add(others[4:])
    table = draft.entries
    draft.absorb(other)
    draft.absorb(draft_batch([last], by="timestamp", group_id=""))
    assert draft.entries is table  # the batch that it became shares it
    assert [reading["x"] for reading in table["A"]] == list(range(7))
    assert [bad.index for bad in draft.bad_entries] == [n for x in range(7) for n in range(x)]
    assert len(other.bad_entries) == 4 + 5
    assert draft.duplicates == 6
