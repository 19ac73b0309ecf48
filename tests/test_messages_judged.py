"""The parser against an independent judge: whatever the bytes, the outcome is that of the standard library."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stationmaster.batch import Message, Refusal
from stationmaster.messages import Limits, parse_message
from tests.telemetry import record

SMALL = Limits(
    message_bytes=400, json_depth=6, stations_per_message=3, station_id_chars=6, readings_bytes=400
)


class BadError(Exception):
    """The judge's verdict."""


def judge(value: bytes, limits: Limits) -> dict[str, Any]:
    """Decide by the standard library and the words of the rules alone; raises `BadError`."""
    if not 0 < len(value) <= limits.message_bytes or value.startswith(b"\xef\xbb\xbf"):
        raise BadError

    def integer(digits: str) -> int:
        if len(digits) > 25 or not -(2**63) <= int(digits) < 2**64:
            raise BadError
        return int(digits)

    def real(digits: str) -> float:
        if math.isinf(float(digits)):
            raise BadError
        return float(digits)

    def constant(name: str) -> None:
        raise BadError

    depths: dict[int, int] = {}

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, item in pairs:
            whole(key)
            whole(item)
        made = dict(pairs)
        depths[id(made)] = 1 + max((depth(item) for _, item in pairs), default=0)
        alive.append(made)
        return made

    def depth(item: Any) -> int:
        if isinstance(item, dict):
            return depths[id(item)]
        return 1 + max(map(depth, item), default=0) if isinstance(item, list) else 0

    def whole(item: Any) -> None:
        if isinstance(item, str):
            item.encode()
        elif isinstance(item, list):
            for part in item:
                whole(part)

    alive: list[dict[str, Any]] = []  # so that no id is used twice
    try:
        document = json.loads(
            value.decode(),
            parse_int=integer,
            parse_float=real,
            parse_constant=constant,
            object_pairs_hook=members,
        )
        whole(document)
    except (ValueError, RecursionError):
        raise BadError from None
    if depth(document) > limits.json_depth or not isinstance(document, dict):
        raise BadError
    entries = document.get("stationData")
    if not isinstance(entries, list) or len(entries) > limits.stations_per_message:
        raise BadError
    good = [entry for entry in entries if isinstance(entry, dict) and is_id(entry.get("stationId"))]
    if entries and not good:
        raise BadError
    return {**document, "stationData": good}


def is_id(value: object) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= SMALL.station_id_chars:
        return False
    kinds = {unicodedata.category(letter) for letter in value if letter != " "}
    return bool(kinds) and not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}


def agrees_with_the_judge(value: bytes) -> None:
    parsed = parse_message(record(value), SMALL)
    try:
        expected = judge(value, SMALL)
    except BadError:
        assert isinstance(parsed, Refusal), "the judge refuses it"
        return
    assert isinstance(parsed, Message), "the judge accepts it"
    ids = [entry.pop("stationId") for entry in expected["stationData"]]
    assert parsed.entries == tuple(zip(ids, expected["stationData"], strict=True))
    for name in ("stationData", "timestamp", "topic"):
        expected.pop(name, None)
    assert parsed.fields == expected


TEXTS = st.text(max_size=8) | st.text(
    st.characters(categories=["Cs", "Cc", "Lu", "Zs"]), max_size=3
)
TEXTS |= st.sampled_from(["[[[[[", "]]]]", '"', "\\", '\\"[', "1e400", "9" * 20])
NUMBERS = st.integers(-(2**66), 2**66) | st.floats() | st.sampled_from([2**64, 10**19, 1e22])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)
IDS = st.sampled_from(["S1", "S2", "", " ", "too long for it", 7, None, "S\n"]) | TEXTS
ENTRIES = st.builds(
    lambda name, rest: {**rest, "stationId": name}, IDS, st.dictionaries(TEXTS, TREES, max_size=2)
)
MESSAGES = st.fixed_dictionaries(
    {"stationData": st.lists(ENTRIES | LEAVES, max_size=4)},
    optional={"timestamp": LEAVES, "topic": LEAVES, "other": TREES},
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """JSON, mostly messages, some of them broken at one place."""
    document = draw(MESSAGES | TREES)
    escaped = draw(st.booleans())
    text = json.dumps(document, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + draw(st.sampled_from([b"", b"[", b"]", b'"', b"\\", b"0", b"\xff", b"e"]))
            + text[place + draw(st.integers(0, 1)) :]
        )
    return text


@settings(max_examples=600, deadline=None)
@given(documents())
@example(b'{"stationData":[],"a":"\\ud800","a":1}')
@example(b'{"stationData":[],"a":1e400,"a":1}')
@example(b'{"stationData":[],"a":["]",["]",["]",["]",["]",["]","["],"["],"["],"["],"["],"["]}')
def test_any_json_is_judged_as_the_standard_library_would(value: bytes) -> None:
    agrees_with_the_judge(value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64) | st.text('{}[]",:\\0e-. stationData', max_size=40).map(str.encode))
def test_any_bytes_are_judged_as_the_standard_library_would(value: bytes) -> None:
    agrees_with_the_judge(value)
