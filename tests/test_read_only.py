"""JSON that all stations of a message share: it looks like any other, and nobody can change it for the others."""

from __future__ import annotations

import copy
import json
import pickle
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from stationmaster import Outcome, open_pipeline
from stationmaster.batch import Message
from stationmaster.messages import Limits, parse_message
from stationmaster.read_only import ReadOnlyDict, ReadOnlyList, read_only
from stationmaster.testing import MemorySource, RecordingSink
from tests.telemetry import message_bytes, record

if TYPE_CHECKING:
    from collections.abc import Callable

    from stationmaster import BatchReport, StationInput
    from stationmaster.abc import StationHandler

FIELDS = {"unit": "ug/m3", "site": {"tags": ["urban", {"lanes": 4}], "height": None}}


async def report_of(handler: StationHandler, *station_ids: str) -> BatchReport:
    """Return the report of one message of these stations, with `FIELDS` beside them."""
    source, sink = MemorySource(), RecordingSink()
    source.put("air", 0, message_bytes(*station_ids, **FIELDS))
    source.end()
    async with open_pipeline(source, handler=handler, sink=sink) as pipeline:
        await pipeline.wait_finished()
    [report] = sink.reports.values()
    return report


async def test_a_handler_that_changes_a_messages_fields_fails_alone_and_its_neighbours_see_them_whole() -> (
    None
):
    async def handle(station: StationInput) -> Any:
        site: Any = station.fields["site"]
        if station.station_id == "vandal":
            site["tags"][1]["lanes"] = 0
        return {"site": site}

    report = await report_of(handle, "first", "vandal", "last")
    outcomes = {one.station_id: one.outcome for one in report.results}
    assert outcomes == {
        "first": Outcome.SUCCEEDED,
        "vandal": Outcome.FAILED,
        "last": Outcome.SUCCEEDED,
    }
    told = {one.station_id: one.reason for one in report.results}
    assert told["vandal"] == (
        "TypeError: this dict is shared by all stations of its message, and read-only: "
        "change a copy.deepcopy() of it"
    )
    for one in report.results:
        if one.outcome is Outcome.SUCCEEDED:
            assert orjson.loads(one.encoded) == {
                "stationId": one.station_id,
                "site": FIELDS["site"],
            }


async def test_a_handler_may_change_a_deep_copy_of_the_fields_and_its_own_readings() -> None:
    async def handle(station: StationInput) -> Any:
        mine = copy.deepcopy({**station.fields, **station.readings[0]})
        mine["site"]["tags"].append(station.station_id)
        return mine

    report = await report_of(handle, "A", "B")
    tags = [one.value and one.value["site"]["tags"][2] for one in report.results]
    assert tags == ["A", "B"]


async def test_whoever_does_not_ask_for_the_fields_does_not_pay_and_all_that_ask_get_the_same() -> (
    None
):
    message = parse_message(record(message_bytes("A", **FIELDS)), Limits())
    assert isinstance(message, Message)
    assert type(message._fields) is dict
    assert message.fields is message.fields
    assert message.fields == FIELDS


def test_it_is_written_as_json_and_compares_like_any_other() -> None:
    shared = read_only(FIELDS)
    assert orjson.dumps(shared) == orjson.dumps(FIELDS)
    assert json.dumps(shared) == json.dumps(FIELDS)
    assert shared == FIELDS
    assert repr(shared) == repr(FIELDS)
    assert list(shared["site"]["tags"]) == FIELDS["site"]["tags"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("__setitem__", ("unit", 1)),
        ("__delitem__", ("unit",)),
        ("__ior__", ({"unit": 1},)),
        ("clear", ()),
        ("pop", ("unit",)),
        ("popitem", ()),
        ("setdefault", ("new", 1)),
        ("update", ({"unit": 1},)),
    ],
)
def test_a_shared_dict_refuses_every_change(method: str, arguments: tuple[Any, ...]) -> None:
    shared = read_only({"unit": "m"})
    with pytest.raises(TypeError, match=r"^this dict is shared by all stations"):
        getattr(shared, method)(*arguments)
    assert shared == {"unit": "m"}


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("__setitem__", (0, 9)),
        ("__delitem__", (0,)),
        ("__iadd__", ([9],)),
        ("__imul__", (2,)),
        ("append", (9,)),
        ("clear", ()),
        ("extend", ([9],)),
        ("insert", (0, 9)),
        ("pop", ()),
        ("remove", (3,)),
        ("reverse", ()),
        ("sort", ()),
    ],
)
def test_a_shared_list_refuses_every_change(method: str, arguments: tuple[Any, ...]) -> None:
    shared = read_only([3, 1, 2])
    with pytest.raises(TypeError, match=r"^this list is shared by all stations"):
        getattr(shared, method)(*arguments)
    assert shared == [3, 1, 2]


@pytest.mark.parametrize(("kind", "plain"), [(ReadOnlyDict, dict), (ReadOnlyList, list)])
def test_no_change_that_python_knows_is_forgotten(kind: type, plain: type) -> None:
    known = {name for name in vars(plain) if callable(getattr(plain, name))}
    harmless = {
        *(
            "__class_getitem__",
            "__contains__",
            "__eq__",
            "__ge__",
            "__getattribute__",
            "__getitem__",
        ),
        *("__gt__", "__init__", "__iter__", "__le__", "__len__", "__lt__", "__ne__", "__new__"),
        *("__or__", "__repr__", "__reversed__", "__ror__", "__sizeof__", "__add__", "__mul__"),
        *("__rmul__", "__hash__", "copy", "fromkeys", "get", "items", "keys", "values"),
        *("count", "index"),
    }
    assert {name for name in known if name not in vars(kind)} <= harmless


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))],
    ids=["deepcopy", "pickle"],
)
def test_deep_copies_are_plain_all_the_way_down(copied: Callable[[Any], Any]) -> None:
    mine = copied(read_only(FIELDS))
    assert mine == FIELDS
    levels = [mine, mine["site"], mine["site"]["tags"], mine["site"]["tags"][1]]
    assert [type(level) for level in levels] == [dict, dict, list, dict]
    tags = copied(read_only([[1], {}]))
    assert [type(level) for level in (tags, *tags)] == [list, list, dict]


def test_shallow_copies_are_plain_at_the_outermost_level() -> None:
    shared = read_only({"tags": [1]})
    for mine in (copy.copy(shared), shared.copy(), dict(shared), {**shared}, shared | {}):
        assert type(mine) is dict
        assert type(mine["tags"]) is ReadOnlyList
    tags = shared["tags"]
    for own in (copy.copy(tags), tags.copy(), list(tags), [*tags], tags[:]):
        assert type(own) is list


def test_the_deepest_json_that_a_message_may_hold_can_be_read_and_copied() -> None:
    fields: Any = 0
    for _ in range(127):
        fields = {"x": [fields]}
    value = message_bytes("A", **fields)
    message = parse_message(record(value), Limits(json_depth=256))
    assert isinstance(message, Message)
    assert message.fields == fields
    assert copy.deepcopy(message.fields) == fields
