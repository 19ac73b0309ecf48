"""The configuration of the service: one frozen class per TOML table, and what must hold between tables.

`config/stationmaster.toml` says of every key what it is for; `config_reading.load_config` makes a `Config` from a
file. The types carry the ranges. Durations end in `_s`, sizes in `_bytes`; relative paths begin at the working
directory. A value made in code, not by `load_config`, is not checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from stationmaster.service.config_rules import (
    BUILT_IN_HANDLERS,
    Bytes,
    Complaint,
    Count,
    CountOrZero,
    Depth,
    HandlerName,
    HookName,
    Host,
    KafkaOptions,
    Name,
    Options,
    PathText,
    Port,
    Roster,
    Seconds,
    SecondsOrZero,
    Secret,
    Servers,
    Share,
    ShareOrZero,
    Statuses,
    Topic,
    Topics,
    Url,
    Urls,
    figure,
    is_loopback,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_UPLOAD_MARGIN_S: Final = 5.0
_MIB: Final = 1_048_576


@attrs.frozen(kw_only=True)
class SourceConfig:
    """`[source]`: where messages come from."""

    kind: Literal["kafka", "file"]


@attrs.frozen(kw_only=True)
class KafkaConfig:
    """`[kafka]`: needed for a source of this kind."""

    bootstrap_servers: Servers
    group_id: Name
    topics: Topics
    max_poll_messages: Count = 500
    poll_timeout_s: Seconds = 1.0
    commit_interval_s: Seconds = 1.0
    drain_timeout_s: Seconds | None = None
    """Absent in the file: computed when it is read, see `default_drain_timeout_s`."""
    assignor: Literal["cooperative-sticky", "range", "roundrobin"] = "cooperative-sticky"
    group_protocol: Literal["classic", "consumer"] = "classic"
    session_timeout_s: Seconds | None = None
    """None: the client's own."""
    instance_id: Name | None = None
    start: Literal["earliest", "latest"] = "earliest"
    progress_timeout_s: Seconds = 30.0
    security_protocol: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = "plaintext"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    """None: only without SASL."""
    username: Name | None = None
    password_file: PathText | None = None
    password: Secret | None = None
    """Read from `password_file` or the environment, never from the configuration file."""
    ca_file: PathText | None = None
    """None: the system's certificate authorities."""
    certificate_file: PathText | None = None
    key_file: PathText | None = None
    options: KafkaOptions = attrs.field(factory=dict, repr=False)
    """librdkafka's own keys; may hold a password from the environment."""


@attrs.frozen(kw_only=True)
class FileConfig:
    """`[file]`: needed for a source of this kind."""

    path: PathText
    topic: Topic | None = None
    """None: the file's stem."""


@attrs.frozen(kw_only=True)
class BatchConfig:
    """`[batch]`: what is one batch, when it is closed, how many are open."""

    by: Literal["message", "poll", "timestamp"] = "message"
    deadline_s: Seconds = 5.0
    high_priority_deadline_s: Seconds = 3.0
    quorum: Share = 1.0
    max_in_flight: Count = 64
    max_in_flight_bytes: Bytes = 64 * _MIB
    max_parked_bytes: Bytes = 64 * _MIB


@attrs.frozen(kw_only=True)
class TopicConfig:
    """`[[topic]]`: what one topic has of its own; None: as `[batch]` says."""

    name: Topic
    by: Literal["message", "poll", "timestamp"] | None = None
    deadline_s: Seconds | None = None
    quorum: Share | None = None
    priority: Literal["normal", "high"] = "normal"
    roster: Roster = ()


@attrs.frozen(kw_only=True)
class StationsConfig:
    """`[stations]`: what is done for each station."""

    handler: HandlerName = "embed"
    options: Options = attrs.field(factory=dict, repr=False)
    """Handed to the handler as they are."""
    on_result: HookName | None = None
    """None: nothing hears of single results."""
    threads: Count = 32
    ordered: bool = True
    queue_capacity: Count = 64
    max_live: Count = 20_000
    idle_s: Seconds = 600.0
    job_timeout_s: Seconds | None = None
    """None: only the batch's deadline bounds a job."""
    breaker_failures: CountOrZero = 3
    breaker_probe_s: Seconds = 10.0
    gc_freeze: bool = True


@attrs.frozen(kw_only=True)
class LimitsConfig:
    """`[limits]`: the largest of everything that comes from outside."""

    message_bytes: Bytes = _MIB
    json_depth: Depth = 32
    stations_per_message: Count = 10_000
    station_id_chars: Count = 128
    readings_bytes: Bytes = 65_536
    result_bytes: Bytes = _MIB
    report_bytes: Bytes = 32 * _MIB


@attrs.frozen(kw_only=True)
class BatcherConfig:
    """`[batcher]`: when a call to the model server leaves, and how much may wait."""

    max_batch_rows: Count = 32
    min_batch_rows: Count = 1
    max_wait_s: SecondsOrZero = 0.005
    hard_timeout_s: Seconds = 0.05
    send_when_idle: bool = True
    max_batch_bytes: Bytes = _MIB
    max_batch_tokens: Count | None = None
    max_queue_rows: Count = 1_024
    max_queue_bytes: Bytes = 64 * _MIB
    max_in_flight: Count = 4
    share_identical: bool = False
    grace_s: SecondsOrZero = 5.0


@attrs.frozen(kw_only=True)
class EmbeddingsConfig:
    """`[embeddings]`: the model servers; needed for the handler `embed`."""

    urls: Urls
    model: Name
    api: Literal["openai", "tei"] = "openai"
    key_file: PathText | None = None
    key: Secret | None = None
    """Read from `key_file` or the environment, never from the configuration file."""
    dimensions: Count | None = None
    """None: the first answer fixes it."""
    encoding: Literal["base64", "float"] = "base64"
    timeout_s: Seconds = 30.0
    breaker_failures: Count = 3
    breaker_probe_s: Seconds = 1.0


@attrs.frozen(kw_only=True)
class UploadConfig:
    """`[upload]`: where closed batches go."""

    url: Url
    token_file: PathText | None = None
    token: Secret | None = None
    """Read from `token_file` or the environment, never from the configuration file."""
    timeout_s: Seconds = 60.0
    attempt_timeout_s: Seconds = 10.0
    connections: Count = 8
    compression: Literal["none", "gzip"] = "none"
    empty: bool = False
    accepted: Statuses = ()


@attrs.frozen(kw_only=True)
class OutboxConfig:
    """`[outbox]`: where batches wait that the target does not take now. Its file holds the dead letters too."""

    path: PathText = "stationmaster-state.db"
    max_bytes: Bytes = 1024 * _MIB
    max_backoff_s: Seconds = 30.0


@attrs.frozen(kw_only=True)
class DeadLettersConfig:
    """`[dead_letters]`: where messages that cannot be used go, and batches that the target refuses for good."""

    kind: Literal["sqlite", "kafka"] = "sqlite"
    max_bytes: Bytes = 256 * _MIB
    topic: Topic | None = None
    """Needed for the kind "kafka"."""


@attrs.frozen(kw_only=True)
class WebConfig:
    """`[web]`: probes, metrics and the status page; without the table there are none."""

    host: Host = "127.0.0.1"
    port: Port = 8080
    token_file: PathText | None = None
    token: Secret | None = None
    """Read from `token_file` or the environment, never from the configuration file."""


@attrs.frozen(kw_only=True)
class LogConfig:
    """`[log]`: what is told to the operator."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


@attrs.frozen(kw_only=True)
class TracingConfig:
    """`[tracing]`: spans for OpenTelemetry; without the table there are none."""

    endpoint: Url | None = None
    """None: as OpenTelemetry's own environment variables say, see docs/tracing.md."""
    ratio: ShareOrZero = 0.1
    station_spans: CountOrZero = 100


@attrs.frozen(kw_only=True)
class ShutdownConfig:
    """`[shutdown]`: how long work under way may take after SIGTERM."""

    grace_s: SecondsOrZero = 15.0


@attrs.frozen(kw_only=True)
class Config:
    """Everything the service is told. A table that may be None is only needed for some settings of another."""

    source: SourceConfig
    kafka: KafkaConfig | None = None
    file: FileConfig | None = None
    batch: BatchConfig = attrs.field(factory=BatchConfig)
    topic: tuple[TopicConfig, ...] = ()
    stations: StationsConfig = attrs.field(factory=StationsConfig)
    limits: LimitsConfig = attrs.field(factory=LimitsConfig)
    batcher: BatcherConfig = attrs.field(factory=BatcherConfig)
    embeddings: EmbeddingsConfig | None = None
    upload: UploadConfig
    outbox: OutboxConfig = attrs.field(factory=OutboxConfig)
    dead_letters: DeadLettersConfig = attrs.field(factory=DeadLettersConfig)
    web: WebConfig | None = None
    log: LogConfig = attrs.field(factory=LogConfig)
    tracing: TracingConfig | None = None
    shutdown: ShutdownConfig = attrs.field(factory=ShutdownConfig)


def default_drain_timeout_s(config: Config) -> float:
    """Return how long batches of a revoked partition may take: the longest deadline, and 5 s for uploads."""
    deadlines = [topic.deadline_s for topic in config.topic if topic.deadline_s is not None]
    return max([config.batch.deadline_s, *deadlines]) + _UPLOAD_MARGIN_S


def needed_tables(tree: Mapping[str, Any]) -> frozenset[str]:
    """Return the tables that this tree of unchecked values cannot do without."""
    needed = {"source", "upload"}
    match tree.get("source"):
        case {"kind": "kafka" | "file" as kind}:
            needed.add(kind)
    match tree.get("stations"):
        case {"handler": handler} if handler not in BUILT_IN_HANDLERS:
            pass
        case _:
            needed.add("embeddings")
    return frozenset(needed)


# (what must be at least, what, why)
_AT_LEAST: Final = (
    ("stations.queue_capacity", "batch.max_in_flight", "each open batch may queue one job"),
    ("stations.idle_s", "stations.breaker_probe_s", "else it is forgotten before it is tried"),
    ("batch.max_in_flight_bytes", "limits.message_bytes", "the largest message must fit"),
    ("limits.report_bytes", "limits.result_bytes", "the largest result must fit"),
    ("batcher.max_batch_rows", "batcher.min_batch_rows", "a call has both bounds"),
    ("batcher.hard_timeout_s", "batcher.max_wait_s", "both count from a row's arrival"),
    ("batcher.max_queue_rows", "batcher.max_batch_rows", "a full call must fit"),
    ("batcher.max_queue_bytes", "batcher.max_batch_bytes", "a full call must fit"),
    ("upload.timeout_s", "upload.attempt_timeout_s", "one attempt must fit"),
)


def faults_between(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Complaint]]:
    """Yield what is wrong between keys that are each right by themselves.

    Args:
        values: `table.key` -> value; what is absent, because it is wrong itself, is not judged.

    Yields:
        The keys involved, the one to blame first, and the complaint.
    """
    for key, other, why in _AT_LEAST:
        if key in values and other in values and values[key] < values[other]:
            least = figure(values[other])
            wrong = f"{figure(values[key])} is less than {other} ({least})"
            yield (key, other), Complaint(wrong, f"at least {least}: {why}")

    keys = "stations.idle_s", "batch.deadline_s", "shutdown.grace_s"
    if values.keys() >= set(keys):
        idle, deadline, grace = (values[key] for key in keys)
        if idle <= deadline + grace:
            more_than = f"more than {deadline + grace:g}, batch.deadline_s + shutdown.grace_s"
            reason = "a station with work must not count as idle"
            yield keys, Complaint(f"{figure(idle)} is too short", f"{more_than}: {reason}")

    kind, topic, topics = "dead_letters.kind", "dead_letters.topic", "kafka.topics"
    if values.get(kind) == "kafka":
        if values.get(topic, "") is None:
            yield (topic, kind), Complaint("is missing", f'a topic: {kind} is "kafka"')
        elif values.get(topic) in values.get(topics, ()):
            wrong = f"is one of {topics}"
            yield (topic, topics), Complaint(wrong, "another: dead letters would be read again")
        if values.get("source.kind") == "file":
            yield (kind, "source.kind"), Complaint('is "kafka"', '"sqlite" with a file source')

    protocol, timeout = "kafka.group_protocol", "kafka.session_timeout_s"
    if values.get(protocol) == "consumer" and values.get(timeout) is not None:
        wrong = f'cannot be set with {protocol} = "consumer"'
        yield (timeout, protocol), Complaint(wrong, "that it is left out: the broker decides")

    host, file = "web.host", "web.token_file"
    has_token = values.get(file, "") is not None or values.get("web.token") is not None
    if not has_token and host in values and not is_loopback(values[host]):
        wrong = f"is missing, and {host} ({shown(values[host])}) is no loopback address"
        yield (file, host), Complaint(wrong, "a file that holds a token: others reach this page")
