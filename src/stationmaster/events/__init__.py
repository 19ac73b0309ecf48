"""What happened, as frozen values: the one seam for logs, metrics, the status page and tests.

Cut by part; all of it is imported from here.
"""

from __future__ import annotations

from typing import TypeAlias

from stationmaster.events.batcher import (
    BatcherEvent,
    CallAbandoned,
    CallDone,
    CallFailed,
    CallStarted,
    RequestSubmitted,
)
from stationmaster.events.batches import (
    BatchClosed,
    BatchDropped,
    BatchEvent,
    BatchJoined,
    BatchOpened,
    BatchWithdrawn,
    EmptyBatch,
    MessageRefused,
)
from stationmaster.events.endpoints import (
    CallRerouted,
    EndpointClosed,
    EndpointEvent,
    EndpointOpened,
    EndpointPaused,
)
from stationmaster.events.sources import (
    OffsetsCommitted,
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
    SourceEvent,
    SourcePaused,
    SourceRecovered,
    SourceTrouble,
)
from stationmaster.events.stations import (
    BatchHandlerTrouble,
    LateResult,
    ResultHookTrouble,
    StationAnswered,
    StationBreakerClosed,
    StationBreakerOpened,
    StationEvent,
    StationTrouble,
    ThreadAbandoned,
    ThreadReturned,
)
from stationmaster.events.stores import (
    DeadLettersKept,
    OutboxDelivered,
    OutboxRejected,
    OutboxRetried,
    StateMovedAside,
    StoreBlocked,
    StoreEvent,
    StoreUnblocked,
)
from stationmaster.events.uploads import (
    UploadAttempted,
    UploadDone,
    UploadEvent,
    UploadFailed,
    UploadKept,
    UploadRejected,
    UploadRetried,
    UploadsDiverted,
    UploadsResumed,
)

Event: TypeAlias = (
    BatchEvent
    | StationEvent
    | UploadEvent
    | StoreEvent
    | SourceEvent
    | BatcherEvent
    | EndpointEvent
)
"""What an observer may be told; the parts are unions of their own."""

__all__ = [  # noqa: RUF022 - by part, as the page of the interface shows them
    "Event",
    # batches
    "BatchEvent",
    "MessageRefused",
    "EmptyBatch",
    "BatchOpened",
    "BatchJoined",
    "BatchClosed",
    "BatchDropped",
    "BatchWithdrawn",
    # stations
    "StationEvent",
    "StationAnswered",
    "LateResult",
    "StationTrouble",
    "StationBreakerOpened",
    "StationBreakerClosed",
    "ThreadAbandoned",
    "ThreadReturned",
    "BatchHandlerTrouble",
    "ResultHookTrouble",
    # uploads
    "UploadEvent",
    "UploadAttempted",
    "UploadRetried",
    "UploadDone",
    "UploadRejected",
    "UploadFailed",
    "UploadKept",
    "UploadsDiverted",
    "UploadsResumed",
    # stores
    "StoreEvent",
    "OutboxDelivered",
    "OutboxRetried",
    "OutboxRejected",
    "DeadLettersKept",
    "StoreBlocked",
    "StoreUnblocked",
    "StateMovedAside",
    # sources
    "SourceEvent",
    "PartitionsAssigned",
    "PartitionsRevoked",
    "PartitionsLost",
    "OffsetsCommitted",
    "SourceTrouble",
    "SourceRecovered",
    "SourcePaused",
    # batcher
    "BatcherEvent",
    "RequestSubmitted",
    "CallStarted",
    "CallDone",
    "CallFailed",
    "CallAbandoned",
    # endpoints
    "EndpointEvent",
    "CallRerouted",
    "EndpointPaused",
    "EndpointOpened",
    "EndpointClosed",
]
