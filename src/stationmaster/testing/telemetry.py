"""What comes in, made by hand: the bytes of a message, and what a handler gets of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import orjson

from stationmaster.batch import Batch, Message, Record, StationInput
from stationmaster.drafts import draft_batch
from stationmaster.messages import Limits, parse_message

if TYPE_CHECKING:
    from collections.abc import Mapping


def telemetry(*stations: str | Mapping[str, object], **fields: object) -> bytes:
    """Return a message of these stations, as it comes from Kafka.

    Args:
        stations: entries such as `{"stationId": "S001", "pm25": 9}`; an id alone is an entry without data.
        fields: the message's other top-level fields, such as `timestamp="2024-01-01T12:00:00Z"`.
    """
    entries = [{"stationId": item} if isinstance(item, str) else item for item in stations]
    return orjson.dumps({**fields, "stationData": entries})


def station_input(
    station_id: str,
    *readings: Mapping[str, object],
    fields: Mapping[str, object] | None = None,
    topic: str = "test",
    deadline: float = float("inf"),
) -> StationInput:
    """Return what a handler gets, to call it by hand, also outside of trio: parsed as a real message is.

    It has no `nursery`: only a running pipeline lends one, see `run_batch`.

    Args:
        station_id: whose it is.
        readings: one or more; none stands for one without data.
        fields: the message's other top-level fields.
        topic: where it came from.
        deadline: on trio's clock. It is told, not kept: nothing cancels the handler.

    Raises:
        ValueError: a message with this in it would be refused, or this entry of it.
    """
    value = telemetry(
        *({**reading, "stationId": station_id} for reading in readings or ({},)), **fields or {}
    )
    record = Record(topic=topic, partition=0, offset=0, timestamp_ms=0, value=value)
    message = parse_message(record, Limits())
    if not isinstance(message, Message):
        raise ValueError(f"no handler would get this: {message.reason} ({message.detail})")  # noqa: TRY004
    if message.bad_entries:
        raise ValueError(f"no handler would get this: {message.bad_entries[0].reason}")
    draft = draft_batch([message], by="message", group_id="")
    batch = Batch(
        batch_id=draft.batch_id,
        topic=topic,
        opened_at=datetime.now(UTC),
        deadline=deadline,
        ranges=draft.ranges,
        entries=draft.entries,
        last_message=draft.last_message,
        duplicates=draft.duplicates,
        size_bytes=draft.size_bytes,
    )
    return StationInput(station_id, batch.entries[station_id], batch, message)
