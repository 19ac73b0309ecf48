"""Every metric of the service: its name, its kind, what it means, its labels. `docs/metrics.md` is made from this file.

Rules:
1. Base units (seconds, bytes); counters end in `_total`.
2. A label has few values that no message decides: a closed list, or what the configuration or the brokers name (topics,
   partitions, model servers). Never a station, a batch, or words out of an error. What is not in its closed list is
   `other`.
3. What has closed lists for labels begins at 0 with every value, and with every topic as soon as that is known, so that
   a first step is an increase and a ratio has both its terms.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import attrs

from stationmaster.batch import ClosedBy

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

OTHER: Final = "other"


@attrs.frozen
class Label:
    """A label and its values."""

    name: str
    values: tuple[str, ...] = ()
    """All there are; empty: they are named by `bound`."""
    bound: str = ""
    """What the values are, and what keeps them few."""

    def value(self, text: str) -> str:
        """Return the text if it is one of the closed list, else `other`; legal UTF-8 in any case."""
        if self.values:
            return text if text in self.values else OTHER
        return text.encode("utf-8", "backslashreplace").decode()


@attrs.frozen(kw_only=True, eq=False)
class Definition:
    """One metric."""

    name: str
    kind: Kind
    text: str
    """What it means; one sentence or two."""
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""
    asked: bool = False
    """Asked for at scrape time (see `moments`, `pauses`); else events move it."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of its labels."""
        return tuple(label.name for label in self.labels)

    @property
    def sample_names(self) -> tuple[str, ...]:
        """The names under which its samples are found."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))
        return (self.name,)


def _counter(name: str, text: str, *labels: Label, asked: bool = False) -> Definition:
    name = f"stationmaster_{name}_total"
    return Definition(name=name, kind="counter", text=text, labels=labels, asked=asked)


def _gauge(name: str, text: str, *labels: Label, asked: bool = False) -> Definition:
    name = f"stationmaster_{name}"
    return Definition(name=name, kind="gauge", text=text, labels=labels, asked=asked)


def _histogram(
    name: str, text: str, buckets: tuple[float, ...], *labels: Label, asked: bool = False
) -> Definition:
    name = f"stationmaster_{name}"
    return Definition(
        name=name, kind="histogram", text=text, labels=labels, buckets=buckets, asked=asked
    )


# ------------------------------------------------------------------------------------------------------------- labels

TOPIC = Label("topic", bound="the topics of the configuration")
_PARTITION = Label("partition", bound="the partitions that this process holds now")
_ENDPOINT = Label("endpoint", bound="the model servers of the configuration")
_CLOSED_BY = Label("closed_by", tuple(rule.value for rule in ClosedBy))
_OUTCOME = Label(
    "outcome", ("succeeded", "no_output", "failed", "timed_out", "missing", "rejected")
)
_BAD_ENTRY = Label(
    "reason",
    (
        "not-an-object",
        "readings-too-large",
        "station-id-blank",
        "station-id-missing",
        "station-id-not-printable",
        "station-id-not-text",
        "station-id-too-long",
        OTHER,
    ),
)
_LETTER = Label(
    "reason",
    (
        "empty-value",
        "json-too-deep",
        "lone-surrogate",
        "message-too-large",
        "no-station-data",
        "no-valid-entry",
        "not-an-object",
        "not-json",
        "not-utf8",
        "number-out-of-range",
        "rejected-upload",
        "too-many-stations",
        OTHER,
    ),
)
_HOOK = Label("reason", ("error", "timeout", "full", "closing", OTHER))
_ROUTE = Label("route", ("direct", "outbox"))
_STATUS = Label("status", ("2xx", "3xx", "4xx", "5xx", "none", OTHER))
_STORE = Label("store", ("outbox", "dead-letters", "outbox-replay", OTHER))
_REBALANCE = Label("kind", ("assigned", "revoked", "lost"))
_TROUBLE = Label(
    "kind",
    (
        "authentication",
        "authorization",
        "client",
        "close",
        "commit",
        "connection",
        "group-authorization",
        "max-poll-exceeded",
        "no-broker",
        "offset-reset",
        "stalled",
        "unknown-topic",
        OTHER,
    ),
)
_ROW_OUTCOME = Label(
    "outcome",
    (
        "answered",
        "failed",
        "expired",
        "cancelled",
        "queue_full",
        "too_large",
        "deadline_unreachable",
        "deadline_exceeded",
        "closed",
        OTHER,
    ),
)
_SEND_REASON = Label(
    "reason",
    (
        "full",
        "idle",
        "expected",
        "min",
        "hard",
        "latest",
        "drain",
        "flush",
        "retry",
        "bisect",
        OTHER,
    ),
)
_CALL_RESULT = Label("result", ("answered", "failed", "abandoned"))
_GENERATION = Label("generation", ("0", "1", "2"))
_PART = Label("part", ("pipeline", "batcher", "endpoints", "state", "kafka"))
_VERSION = Label("version", bound="one: the version that runs")

# ------------------------------------------------------------------------------------------------------------ buckets

_BATCH_S = (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 5.5, 6, 8, 10, 15, 30, 60, 120)
"""Fine around the usual deadlines (2, 3, 5 and 10 s), and beyond them as far as an upload is tried."""
_LATENESS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_UPLOAD_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WAIT_S = (1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
_DRAIN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60)
_CALL_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PAUSE_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

# ------------------------------------------------------------------------------------------------------------ batches

BATCHES_OPENED = _counter("batches_opened", "Batches opened: their deadline runs.", TOPIC)
BATCHES_EMPTY = _counter(
    "batches_empty", "Batches without stations: accounted for, nothing uploaded.", TOPIC
)
BATCHES_CLOSED = _counter(
    "batches_closed", "Batches decided, by the rule that closed them.", TOPIC, _CLOSED_BY
)
BATCHES_UPLOADED = _counter(
    "batches_uploaded",
    "Batches that the target accepted from the batch's own task (not out of the outbox).",
    TOPIC,
)
BATCHES_KEPT = _counter("batches_kept", "Batches that went into the outbox.")
BATCHES_REJECTED = _counter(
    "batches_rejected", "Batches that the target refused for good, by either route.", _ROUTE
)
BATCHES_HOMELESS = _counter(
    "batches_homeless",
    "Batches that could neither be uploaded nor kept: there is no outbox, the pipeline ends.",
)
BATCHES_DROPPED = _counter(
    "batches_dropped", "Batches that the end of a shutdown dropped: they come again.", TOPIC
)
BATCHES_WITHDRAWN = _counter(
    "batches_withdrawn",
    "Batches given up because their partitions left: they come again at the new owner.",
    TOPIC,
)
BATCH_JOINS = _counter("batch_joins", "How often messages joined an open batch of their time.")
BATCH_FOLLOW_UPS = _counter(
    "batch_follow_ups", "Closed batches of a time that had another batch before.", TOPIC
)
BATCH_DURATION = _histogram(
    "batch_duration_seconds",
    "From opening a batch to the target's acceptance, of batches uploaded directly.",
    _BATCH_S,
    TOPIC,
)
BATCH_LATENESS = _histogram(
    "batch_lateness_seconds",
    "From the deadline to the decision to upload, of batches that the deadline closed.",
    _LATENESS_S,
    TOPIC,
)
IN_FLIGHT_BATCHES = _gauge(
    "in_flight_batches", "Open batches, those in upload included.", asked=True
)
IN_FLIGHT_BYTES = _gauge("in_flight_bytes", "Size of the messages of open batches.", asked=True)
PARKED_BYTES = _gauge(
    "parked_bytes", "Size of messages that were polled and wait for room.", asked=True
)
DRAINING = _gauge(
    "draining", "1 while the pipeline polls no more and brings to an end what is open.", asked=True
)

# ----------------------------------------------------------------------------------------------------------- stations

STATION_OUTCOMES = _counter(
    "station_outcomes",
    "Expected stations of closed batches, by what became of them.",
    TOPIC,
    _OUTCOME,
)
LATE_RESULTS = _counter("late_results", "Answers that came after their batch was closed: dropped.")
ENTRIES_BAD = _counter(
    "entries_bad", "Entries of good messages that could not be used.", TOPIC, _BAD_ENTRY
)
ENTRIES_DUPLICATE = _counter(
    "entries_duplicate", "Entries beyond the first of a station in a closed batch.", TOPIC
)
MESSAGES_MISLABELLED = _counter(
    "messages_mislabelled", "Messages of closed batches whose topic field names another.", TOPIC
)
LIVE_STATIONS = _gauge("live_stations", "Stations that have a task now.", asked=True)
STATION_BREAKERS_OPEN = _gauge(
    "station_breakers_open", "Stations that are shut off now because their jobs timed out in a row."
)
STATION_BREAKER_OPENINGS = _counter("station_breaker_openings", "How often a station was shut off.")
STATION_TROUBLES = _counter(
    "station_troubles", "Helper tasks of handlers that failed; their station went on anew."
)
BATCH_HANDLER_TROUBLES = _counter(
    "batch_handler_troubles", "Calls of a batch handler that raised or reported wrongly."
)
RESULT_HOOK_TROUBLES = _counter(
    "result_hook_troubles", "Results that the result hook did not take.", _HOOK
)
ABANDONED_THREADS = _gauge(
    "abandoned_threads", "Threads of plain functions that were given up and still run."
)
THREAD_ABANDONMENTS = _counter(
    "thread_abandonments", "How often a plain function did not return in time."
)

# ------------------------------------------------------------------------------------------------------------- upload

UPLOAD_ATTEMPTS = _counter(
    "upload_attempts",
    "Requests to the target, by the class of its answer's status; none: there was no answer.",
    _ROUTE,
    _STATUS,
)
UPLOAD_ATTEMPT_DURATION = _histogram(
    "upload_attempt_duration_seconds", "How long one request to the target took.", _UPLOAD_S, _ROUTE
)
UPLOAD_DURATION = _histogram(
    "upload_duration_seconds",
    "From the decision to the target's acceptance, all attempts and pauses together.",
    _UPLOAD_S,
    TOPIC,
)
UPLOAD_SENT_BYTES = _counter(
    "upload_sent_bytes", "Size of what the target accepted, as sent.", _ROUTE
)
UPLOAD_DIVERTING = _gauge(
    "upload_diverting", "1 while the target is known to be down: batches go to the outbox at once."
)

# ------------------------------------------------------------------------------------------- outbox and dead letters

OUTBOX_ROWS = _gauge("outbox_rows", "Batches in the outbox.", asked=True)
OUTBOX_BYTES = _gauge("outbox_bytes", "Size of what lies in the outbox.", asked=True)
OUTBOX_MAX_BYTES = _gauge("outbox_max_bytes", "Room in the outbox.", asked=True)
OUTBOX_OLDEST_AGE = _gauge(
    "outbox_oldest_age_seconds",
    "Since the oldest batch in the outbox was kept; 0 when empty.",
    asked=True,
)
OUTBOX_DELIVERED = _counter(
    "outbox_delivered", "Batches that the target accepted out of the outbox."
)
OUTBOX_WAIT = _histogram(
    "outbox_wait_seconds", "How long a delivered batch lay in the outbox.", _WAIT_S
)
DEAD_LETTERS = _counter(
    "dead_letters", "Records and batches that became dead letters, by reason.", _LETTER
)
DEAD_LETTERS_KEPT = _counter("dead_letters_kept", "Dead letters that are durable.")
DEAD_LETTERS_ROWS = _gauge("dead_letters_rows", "Dead letters in the state file.", asked=True)
DEAD_LETTERS_BYTES = _gauge(
    "dead_letters_bytes", "Size of the dead letters in the state file.", asked=True
)
DEAD_LETTERS_MAX_BYTES = _gauge(
    "dead_letters_max_bytes", "Room for dead letters in the state file.", asked=True
)
STORE_BLOCKED = _gauge(
    "store_blocked",
    "1 while something that must be kept cannot be: consumption pauses until it can.",
    _STORE,
)
STORE_BLOCKAGES = _counter("store_blockages", "How often a store took nothing.", _STORE)
STATE_MOVED_ASIDE = _counter(
    "state_moved_aside", "Damaged state files that were moved aside at the start."
)

# ------------------------------------------------------------------------------------------------------------- source

REBALANCES = _counter(
    "rebalances", "How often partitions came, went, or were taken away.", _REBALANCE
)
DRAIN_DURATION = _histogram(
    "drain_duration_seconds",
    "How long a revoke waited for the open batches of its partitions.",
    _DRAIN_S,
)
UNDRAINED_REVOKES = _counter(
    "undrained_revokes", "Revokes whose open batches were not done in time: they come again."
)
COMMITS = _counter("commits", "Commits that the broker took.")
UNCOMMITTED_AGE = _gauge(
    "oldest_uncommitted_age_seconds",
    "Since the oldest batch or dead letter came whose offsets are not committed; 0 without any.",
    asked=True,
)
SOURCE_TROUBLES = _counter(
    "source_troubles",
    "Difficulties of the source, told when they begin and every minute while they last.",
    _TROUBLE,
)
SOURCE_IN_TROUBLE = _gauge(
    "source_in_trouble", "1 from a difficulty of the source to its recovery."
)
SOURCE_PAUSED = _gauge("source_paused", "1 while consumption is paused because there is no room.")
KAFKA_PARTITIONS = _gauge("kafka_partitions", "Partitions that this process holds.", asked=True)
KAFKA_LAG = _gauge(
    "kafka_lag_records",
    "Offsets up to the end of the log that the group has not committed.",
    TOPIC,
    _PARTITION,
    asked=True,
)
KAFKA_OUTSTANDING = _gauge(
    "kafka_outstanding_records",
    "Records that were handed out and are not accounted for.",
    TOPIC,
    _PARTITION,
    asked=True,
)
KAFKA_PUMP_IDLE = _gauge(
    "kafka_pump_idle_seconds",
    "Since the thread of the Kafka client began its last turn.",
    asked=True,
)
KAFKA_PUMP_LIMIT = _gauge(
    "kafka_pump_limit_seconds",
    "What that may be with what the thread does just now; beyond it the thread hangs.",
    asked=True,
)
KAFKA_BROKER_SILENT = _gauge(
    "kafka_broker_silent_seconds",
    "Since a broker last answered anything; absent until one did.",
    asked=True,
)
KAFKA_SETTLED = _gauge(
    "kafka_settled",
    "1 while the group has told which partitions are ours, and takes none away.",
    asked=True,
)
KAFKA_COMMIT_ERRORS = _counter(
    "kafka_commit_errors", "Offsets that the broker refused.", asked=True
)
KAFKA_LOST_PARTITIONS = _counter(
    "kafka_lost_partitions",
    "Partitions that were taken away without a chance to commit.",
    asked=True,
)
KAFKA_MAX_POLL_EXCEEDED = _counter(
    "kafka_max_poll_exceeded", "How often the group went on without this process.", asked=True
)
KAFKA_OFFSET_RESETS = _counter(
    "kafka_offset_resets",
    "How often a partition could not be read on from where it stood.",
    asked=True,
)
KAFKA_STALLS = _counter(
    "kafka_stalls",
    "How often a partition had records, delivered none, and was read again.",
    asked=True,
)
KAFKA_UNREADABLE_HEADERS = _counter(
    "kafka_unreadable_headers",
    "Records whose headers could not be read: they come without.",
    asked=True,
)

# ------------------------------------------------------------------------------------------------------------ batcher

BATCHER_ROWS = _counter(
    "batcher_rows", "Rows given to the batcher, by outcome.", _ROW_OUTCOME, asked=True
)
BATCHER_SHARED_ROWS = _counter(
    "batcher_shared_rows", "Rows that got the vector of an identical one.", asked=True
)
BATCHER_SENT_TEXTS = _counter("batcher_sent_texts", "Texts sent, each time they were.", asked=True)
BATCHER_CALLS = _counter("batcher_calls", "Calls begun, by why they were sent.", _SEND_REASON)
BATCHER_CALL_DURATION = _histogram(
    "batcher_call_duration_seconds", "How long a call took.", _CALL_S, _CALL_RESULT
)
BATCHER_CALL_ROWS = _histogram("batcher_call_rows", "Rows of a call.", _ROWS)
BATCHER_QUEUE_WAIT = _histogram(
    "batcher_queue_wait_seconds", "How long the oldest row of a call had waited.", _CALL_S
)
BATCHER_QUEUE_ROWS = _gauge("batcher_queue_rows", "Rows that wait.", asked=True)
BATCHER_QUEUE_BYTES = _gauge("batcher_queue_bytes", "Size of the rows that wait.", asked=True)
BATCHER_QUEUE_OLDEST_AGE = _gauge(
    "batcher_queue_oldest_age_seconds", "How long the oldest row waits; 0 if none does.", asked=True
)
BATCHER_IN_FLIGHT_CALLS = _gauge("batcher_in_flight_calls", "Calls under way.", asked=True)
BATCHER_IN_FLIGHT_ROWS = _gauge("batcher_in_flight_rows", "Rows of calls under way.", asked=True)
BATCHER_PAUSED = _gauge(
    "batcher_paused_seconds",
    "How long nothing will be sent because the model server asked for it.",
    asked=True,
)
BATCHER_CALL_ESTIMATE = _gauge(
    "batcher_call_estimate_seconds", "What a full call is believed to take.", asked=True
)
ENDPOINT_STATE = _gauge(
    "endpoint_state",
    "The breaker of a model server: 0 closed, 1 half-open, 2 open (no call but a probe goes there).",
    _ENDPOINT,
    asked=True,
)
ENDPOINT_IN_FLIGHT = _gauge(
    "endpoint_in_flight_calls", "Calls under way there.", _ENDPOINT, asked=True
)
ENDPOINT_CALLS = _counter("endpoint_calls", "Calls to this model server.", _ENDPOINT, asked=True)
ENDPOINT_FAILURES = _counter(
    "endpoint_failures", "Calls that failed there; refused texts are none.", _ENDPOINT, asked=True
)
ENDPOINT_PAUSES = _counter("endpoint_pauses", "How often it asked to wait.", _ENDPOINT)
CALLS_REROUTED = _counter(
    "calls_rerouted", "Calls that failed at this model server and went to another.", _ENDPOINT
)

# ------------------------------------------------------------------------------------------------------------ process

LOOP_LAG = _histogram(
    "event_loop_lag_seconds",
    "How late a timer of the event loop fired: four a second are set.",
    _PAUSE_S,
)
GC_PAUSE = _histogram(
    "gc_pause_seconds",
    "How long a garbage collection stopped everything.",
    _PAUSE_S,
    _GENERATION,
    asked=True,
)
BUILD_INFO = _gauge("build_info", "1, with the version that runs.", _VERSION)
SCRAPE_ERRORS = _counter(
    "scrape_errors",
    "Parts that could not be asked for their numbers during a scrape.",
    _PART,
    asked=True,
)


def _collect(first: Definition, last: Definition) -> tuple[Definition, ...]:
    """Return the definitions of this module from one to another, in order."""
    every = [value for value in globals().values() if isinstance(value, Definition)]
    return tuple(every[every.index(first) : every.index(last) + 1])


SECTIONS: Final = (
    ("Batches", _collect(BATCHES_OPENED, DRAINING)),
    ("Stations", _collect(STATION_OUTCOMES, THREAD_ABANDONMENTS)),
    ("Upload", _collect(UPLOAD_ATTEMPTS, UPLOAD_DIVERTING)),
    ("Outbox and dead letters", _collect(OUTBOX_ROWS, STATE_MOVED_ASIDE)),
    ("Source", _collect(REBALANCES, KAFKA_UNREADABLE_HEADERS)),
    ("Batcher and model servers", _collect(BATCHER_ROWS, CALLS_REROUTED)),
    ("Process", _collect(LOOP_LAG, SCRAPE_ERRORS)),
)
EVERY: Final = tuple(definition for _, section in SECTIONS for definition in section)
