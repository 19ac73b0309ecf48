"""What another process sees of the state file: rows of the outbox, dead letters, and which of them. Pure."""

from __future__ import annotations

import enum

import attrs


class Move(enum.Enum):
    """What became of a rejected upload that was to go back into the outbox."""

    DONE = enum.auto()
    HELD = enum.auto()
    """It stays: the outbox still holds its batch."""
    GONE = enum.auto()
    """There is no such letter any more."""


@attrs.frozen(kw_only=True)
class OutboxRow:
    """A batch that the target has not taken. Times are seconds since the epoch."""

    seq: int
    batch_id: str
    topic: str
    ranges: str
    """JSON: `[{"partition", "first", "last"}]`."""
    body_bytes: int
    kept_at: float
    attempts: int
    next_try: float
    """0: at once."""
    last_error: str


@attrs.frozen(kw_only=True)
class LetterRow:
    """A dead letter without its value, see `stationmaster.batch.DeadLetter`."""

    seq: int
    reason: str
    detail: str
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    headers: str
    """JSON: `[[name, base64 or null]]`."""
    batch_id: str
    """Empty for a record; else this is an upload that the target rejected."""
    first_seen: float
    value_bytes: int


@attrs.frozen(kw_only=True)
class Chosen:
    """Which dead letters: all that fit every condition given."""

    reason: str | None = None
    topic: str | None = None
    since: int = 0
    """Only those with a higher `seq`."""
    uploads: bool | None = None
    """True: rejected uploads only; False: records only."""

    def where(self, last: int) -> tuple[str, tuple[object, ...]]:
        """Return the condition in SQL and its values, but for `since`, for rows up to this `seq`."""
        wanted: list[tuple[str, object]] = [("seq <= ?", last)]
        if self.reason is not None:
            wanted.append(("reason = ?", self.reason))
        if self.topic is not None:
            wanted.append(("topic = ?", self.topic))
        if self.uploads is not None:
            wanted.append(("(batch_id <> '') = ?", self.uploads))
        return " AND ".join(text for text, _ in wanted), tuple(value for _, value in wanted)


@attrs.frozen(kw_only=True)
class Summary:
    """How much there is."""

    rows: int
    body_bytes: int
    """Of bodies or values alone."""
    oldest: float | None
    """When the oldest was kept, in seconds since the epoch; None if there are none."""
