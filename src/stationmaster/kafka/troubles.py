"""Difficulties of the Kafka client: their kinds, when each is said, and when all is well again. Pure.

Rules:
1. Kinds are few and fixed; what the client calls an error is sorted by its code, never by `retriable()` (that says
   no to transport errors).
2. A kind is said when it begins and again every minute while it lasts, never more often: one that comes and goes
   within the minute is not said again before the minute is over.
3. Recovery is said once, when the last difficulty that was said is over.
"""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING, Final

import attrs
from confluent_kafka import KafkaError

from stationmaster.errors import SourceError
from stationmaster.events import SourceRecovered, SourceTrouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from confluent_kafka import KafkaException

    from stationmaster.kafka.settings import KafkaSettings


class Kind(enum.Enum):
    """What is wrong. The value is the name in the event."""

    CONNECTION = "connection"
    """A broker cannot be reached."""
    NO_BROKER = "no-broker"
    """None can."""
    AUTHENTICATION = "authentication"
    AUTHORIZATION = "authorization"
    """A topic may not be read."""
    GROUP_AUTHORIZATION = "group-authorization"
    UNKNOWN_TOPIC = "unknown-topic"
    COMMIT = "commit"
    """The broker did not take offsets; they are sent again."""
    MAX_POLL = "max-poll-exceeded"
    """The pump was held up so long that the group went on without us; the client joins again."""
    OFFSET_RESET = "offset-reset"
    """The committed offset is not in the log any more (or not yet again): records were skipped or come twice."""
    STALLED = "stalled"
    """A partition has records and delivers none, although it was read again."""
    CLIENT = "client"
    """Anything else that the client calls an error and recovers from by itself."""


ENDED_BY_RECORDS: Final = frozenset(
    {
        Kind.CONNECTION,
        Kind.NO_BROKER,
        Kind.AUTHENTICATION,
        Kind.GROUP_AUTHORIZATION,
        Kind.MAX_POLL,
        Kind.OFFSET_RESET,
        Kind.CLIENT,
    }
)
"""What cannot be true any more when records arrive (another topic may still be unknown or forbidden)."""

ENDED_BY_AN_ANSWER: Final = frozenset(
    {Kind.CONNECTION, Kind.NO_BROKER, Kind.AUTHENTICATION, Kind.CLIENT}
)
"""What cannot be true any more when a broker answers a question."""

ENDED_BY_ALL_TOPICS: Final = frozenset({Kind.UNKNOWN_TOPIC, Kind.AUTHORIZATION, Kind.OFFSET_RESET})
"""What cannot be true any more when every topic's partitions are told."""

ENDED_BY_ASSIGNMENT: Final = frozenset({Kind.GROUP_AUTHORIZATION, Kind.MAX_POLL})

EVERY_S: Final = 60.0

_KINDS: Final = {
    KafkaError._ALL_BROKERS_DOWN: Kind.NO_BROKER,  # noqa: SLF001 (the client's public names begin so)
    KafkaError._TRANSPORT: Kind.CONNECTION,  # noqa: SLF001
    KafkaError._RESOLVE: Kind.CONNECTION,  # noqa: SLF001
    KafkaError._TIMED_OUT: Kind.CONNECTION,  # noqa: SLF001
    KafkaError._SSL: Kind.AUTHENTICATION,  # noqa: SLF001
    KafkaError._AUTHENTICATION: Kind.AUTHENTICATION,  # noqa: SLF001
    KafkaError.SASL_AUTHENTICATION_FAILED: Kind.AUTHENTICATION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED: Kind.AUTHORIZATION,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: Kind.AUTHORIZATION,
    KafkaError.GROUP_AUTHORIZATION_FAILED: Kind.GROUP_AUTHORIZATION,
    KafkaError._UNKNOWN_TOPIC: Kind.UNKNOWN_TOPIC,  # noqa: SLF001
    KafkaError._UNKNOWN_PARTITION: Kind.UNKNOWN_TOPIC,  # noqa: SLF001
    KafkaError.UNKNOWN_TOPIC_OR_PART: Kind.UNKNOWN_TOPIC,
    KafkaError._MAX_POLL_EXCEEDED: Kind.MAX_POLL,  # noqa: SLF001
}

_ONE_NAME_TWICE: Final = (KafkaError.FENCED_INSTANCE_ID, KafkaError.UNRELEASED_INSTANCE_ID)


def kind_of(code: int) -> Kind:
    """Sort an error code of the client that is not fatal."""
    return _KINDS.get(code, Kind.CLIENT)


@attrs.define(eq=False)
class _Trouble:
    detail: str
    lasts: bool = True
    said: bool = False
    """Said since it began (the last time)."""
    said_at: float = float("-inf")


@attrs.define(eq=False)
class Troubles:
    """What is wrong at present."""

    _say: Callable[[SourceTrouble | SourceRecovered], None]
    _clock: Callable[[], float] = time.monotonic
    _known: dict[Kind, _Trouble] = attrs.field(factory=dict, init=False)

    def begin(self, kind: Kind, detail: str) -> None:
        """Take note of a difficulty, new or not."""
        trouble = self._known.setdefault(kind, _Trouble(detail))
        trouble.detail, trouble.lasts = detail, True
        self._say_when_due(kind, trouble)

    def end(self, kinds: Iterable[Kind]) -> None:
        """Take note that these are over."""
        over = [self._known[kind] for kind in kinds if kind in self._known]
        told = any(trouble.said for trouble in over)
        for trouble in over:
            trouble.lasts = trouble.said = False
        if told and not any(trouble.said for trouble in self._known.values()):
            self._say(SourceRecovered())

    def repeat(self) -> None:
        """Say again what lasts, where it is time. To be called about every second."""
        for kind, trouble in self._known.items():
            if trouble.lasts:
                self._say_when_due(kind, trouble)

    def lasts(self, kind: Kind) -> bool:
        """Tell whether this difficulty is there now."""
        trouble = self._known.get(kind)
        return trouble is not None and trouble.lasts

    @property
    def lasting(self) -> tuple[str, ...]:
        """The names of those that are there now; any thread may ask."""
        return tuple(kind.value for kind in Kind if self.lasts(kind))

    @property
    def is_cut_off(self) -> bool:
        """Whether no broker can be reached."""
        return self.lasts(Kind.NO_BROKER)

    @property
    def any_last(self) -> bool:
        """Whether anything is wrong now."""
        return any(trouble.lasts for trouble in self._known.values())

    def _say_when_due(self, kind: Kind, trouble: _Trouble) -> None:
        now = self._clock()
        if now - trouble.said_at >= EVERY_S:
            trouble.said, trouble.said_at = True, now
            self._say(SourceTrouble(kind=kind.value, detail=trouble.detail))


def source_error(error: KafkaException, settings: KafkaSettings) -> SourceError:
    """Say what ends the source, and the way out."""
    said = error.args[0]
    words = f"{said.str()} ({said.name()})"
    # Most fatal errors come as `_FATAL`, and only their text says which.
    if any(said.code() == code or KafkaError(code).str() in said.str() for code in _ONE_NAME_TWICE):
        text = (
            f"another member of group {settings.group_id!r} has the same kafka.instance_id {settings.instance_id!r}: "
            f"{words}. Give every process an instance_id of its own, or none; nothing uncommitted is lost"
        )
    else:
        text = (
            f"the Kafka client cannot go on: {words}. Mend the cause, then start again; "
            "nothing uncommitted is lost"
        )
    mapped = SourceError(text)
    mapped.__cause__ = error
    return mapped


@attrs.frozen
class ClientLog:
    """Stands for the `logging.Logger` that the client takes; everything of use in its log is made an event."""

    _on_line: Callable[[str, str], None]

    def log(self, level: int, template: str, facility: str, client: str, line: str) -> None:  # noqa: ARG002
        """Take one line; called in the pump's thread while it polls."""
        self._on_line(facility, line)
