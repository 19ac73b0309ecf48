"""What a producer is told and what it answers: records to be produced, the fate of each, its settings. Pure."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final

import attrs
from confluent_kafka import KafkaError

if TYPE_CHECKING:
    from stationmaster.kafka.settings import KafkaSettings

LARGEST_BYTES: Final = 96 * 1024 * 1024
"""What the client takes at all; the broker's own limit is nearly always lower."""

# What only a consumer knows; a producer would warn of each.
_CONSUMERS_OWN: Final = (
    "allow.auto.create.topics",
    "auto.",
    "enable.auto.",
    "enable.partition.eof",
    "fetch.",
    "group.",
    "heartbeat.",
    "isolation.",
    "max.poll.",
    "partition.assignment.",
    "queued.",
    "session.timeout.ms",
)


@attrs.frozen(kw_only=True)
class Outgoing:
    """A record to be produced."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    partition: int | None = None
    """None: by its key, or any."""
    timestamp_ms: int = 0
    """0: now."""


class Fate(enum.Enum):
    """What became of a record."""

    ACKNOWLEDGED = enum.auto()
    """All replicas in sync have it."""
    TOO_LARGE = enum.auto()
    """It was refused for its size, by itself: trying again cannot help."""
    REFUSED = enum.auto()
    """It was refused for another reason of its own: topic, partition, timestamp, permission."""
    LATE = enum.auto()
    """Nobody acknowledged it in time: it may have arrived or not."""


@attrs.frozen(kw_only=True)
class Delivery:
    """The answer for one record."""

    fate: Fate
    detail: str = ""
    """Why not, for people."""


_TOO_LARGE: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})
_REFUSED: Final = frozenset(
    {
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.POLICY_VIOLATION,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001 (the client's public names begin so)
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
    }
)

ACKNOWLEDGED: Final = Delivery(fate=Fate.ACKNOWLEDGED)


def judge(error: KafkaError | None) -> Delivery:
    """Say what the client's word on one record means."""
    if error is None:
        return ACKNOWLEDGED
    code = error.code()
    if code in _TOO_LARGE:
        fate = Fate.TOO_LARGE
    elif code in _REFUSED:
        fate = Fate.REFUSED
    else:
        fate = Fate.LATE
    return Delivery(fate=fate, detail=error.str())


def producer_configuration(settings: KafkaSettings, *, delivery_s: float) -> dict[str, Any]:
    """Return librdkafka's configuration of a producer that connects like the source does."""
    connection = {
        key: value
        for key, value in settings.client_configuration().items()
        if not key.startswith(_CONSUMERS_OWN)
    }
    return {
        **connection,
        "acks": "all",
        "enable.idempotence": True,
        "linger.ms": 0,  # whoever produces waits for the answer
        "message.timeout.ms": round(delivery_s * 1000),
        "message.max.bytes": LARGEST_BYTES,
        "queue.buffering.max.kbytes": 2 * LARGEST_BYTES // 1024,
        "log_level": 0,  # every trouble is in a delivery, or in the error callback
    }
