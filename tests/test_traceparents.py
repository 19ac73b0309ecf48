"""The `traceparent` of records, on their way into messages and batches."""

from __future__ import annotations

import attrs
import pytest

from stationmaster.batch import Message
from stationmaster.drafts import draft_batch
from stationmaster.messages import Limits, parse_message
from tests.telemetry import message_bytes, record

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def read(*headers: tuple[str, bytes | None], offset: int = 0) -> Message:
    one = attrs.evolve(record(message_bytes("S1"), offset=offset), headers=headers)
    parsed = parse_message(one, Limits())
    assert isinstance(parsed, Message)
    return parsed


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ((), None),
        ((("Traceparent", b"x"), ("trace", b"y")), None),
        ((("traceparent", PARENT.encode()),), PARENT),
        ((("traceparent", b"first"), ("traceparent", b"last"), ("z", b"")), "last"),
        ((("traceparent", b"good"), ("traceparent", None)), None),
        ((("traceparent", b"x" * 256),), "x" * 256),
        ((("traceparent", b"x" * 257),), None),
        ((("traceparent", b"\xc3\xa4"),), None),
    ],
)
def test_a_message_has_the_last_header_of_that_name(
    headers: tuple[tuple[str, bytes | None], ...], found: str | None
) -> None:
    assert read(*headers).traceparent == found


def test_a_batch_has_each_of_its_messages_once_in_order_and_the_first_128() -> None:
    messages = [
        read(("traceparent", str(number % 200).encode()), offset=number) for number in range(400)
    ]
    first = draft_batch([messages[1], messages[0], messages[201]], by="timestamp", group_id="g")
    assert list(first.traceparents) == ["1", "0"]
    whole = draft_batch(messages, by="timestamp", group_id="g")
    assert list(whole.traceparents) == [str(number) for number in range(128)]

    first.absorb(draft_batch([read(offset=500)], by="timestamp", group_id="g"))
    assert list(first.traceparents) == ["1", "0"]
    first.absorb(draft_batch(messages[100:], by="timestamp", group_id="g"))
    numbers = [1, 0, *range(100, 200), *range(2, 28)]
    assert list(first.traceparents) == [str(number) for number in numbers]
