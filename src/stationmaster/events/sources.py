"""The source: partitions, offsets, and its troubles."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from stationmaster.batch import OffsetRange


@attrs.frozen(kw_only=True)
class PartitionsAssigned:
    """Partitions came to this process."""

    partitions: tuple[tuple[str, int], ...]


@attrs.frozen(kw_only=True)
class PartitionsRevoked:
    """Partitions left this process after their batches had time to finish."""

    partitions: tuple[tuple[str, int], ...]
    drain_s: float
    """Seconds that were waited."""
    drained: bool
    """Everything polled from them was accounted for and committed."""


@attrs.frozen(kw_only=True)
class PartitionsLost:
    """Partitions were taken away without a chance to commit: what was open comes again elsewhere."""

    partitions: tuple[tuple[str, int], ...]


@attrs.frozen(kw_only=True)
class OffsetsCommitted:
    """The broker took a commit: `last` of each range is the last accounted offset."""

    offsets: tuple[OffsetRange, ...]


@attrs.frozen(kw_only=True)
class SourceTrouble:
    """The source has a difficulty and goes on trying: `kind` is a short bounded name, `detail` is for people."""

    kind: str
    detail: str


@attrs.frozen(kw_only=True)
class SourceRecovered:
    """The source works again after trouble."""


@attrs.frozen(kw_only=True)
class SourcePaused:
    """Consumption was paused (`paused`) or resumed: the pipeline had no room."""

    paused: bool


SourceEvent: TypeAlias = (
    PartitionsAssigned
    | PartitionsRevoked
    | PartitionsLost
    | OffsetsCommitted
    | SourceTrouble
    | SourceRecovered
    | SourcePaused
)
