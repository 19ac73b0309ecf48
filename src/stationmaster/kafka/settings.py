"""What the Kafka source can be told, and the client configuration that comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from stationmaster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_OWNED: Final = {
    "bootstrap.servers": "bootstrap_servers",
    "metadata.broker.list": "bootstrap_servers",
    "group.id": "group_id",
    "group.instance.id": "instance_id",
    "group.protocol": "group_protocol",
    "partition.assignment.strategy": "assignor",
    "session.timeout.ms": "session_timeout_s",
    "auto.offset.reset": "start",
    "security.protocol": "security_protocol",
    "sasl.mechanism": "sasl_mechanism",
    "sasl.mechanisms": "sasl_mechanism",
    "sasl.username": "username",
    "sasl.password": "password",
    "ssl.ca.location": "ca_file",
    "ssl.certificate.location": "certificate_file",
    "ssl.key.location": "key_file",
}
_CHOICES: Final = {
    "security_protocol": ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl"),
    "sasl_mechanism": (None, "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
}
_OFFSETS_ARE_OURS: Final = frozenset(
    {
        "enable.auto.commit",
        "auto.commit.enable",
        "auto.commit.interval.ms",
        "enable.auto.offset.store",
        "enable.partition.eof",
    }
)


@attrs.frozen(kw_only=True)
class KafkaSettings:
    """Which topics to read, and how.

    Raises:
        ConfigError: names every fault. (What only the client itself can judge is refused when the source opens.)
    """

    bootstrap_servers: str
    """`host:port`, several with commas between them."""
    group_id: str
    topics: tuple[str, ...]
    max_poll_messages: int = 500
    poll_timeout_s: float = 1.0
    """The longest single wait for messages in the client's thread. More than 0.1 s counts as 0.1 s, because commits and
    the order to close wait behind it; `poll` itself waits until there are messages."""
    commit_interval_s: float = 1.0
    drain_timeout_s: float = 7.0
    """How long a revoke may wait for what was handed out: the batches' deadline and a margin."""
    progress_timeout_s: float = 30.0
    """After this long without a record of a partition that has some, it is read again from where it stands; if that
    does not help either, the source has the trouble `stalled`, and at the eighth time in a row it leaves the group and
    joins it again. A partition is not watched while the source is paused, or so far behind that the client always has
    something in hand."""
    close_timeout_s: float = 10.0
    """How long closing may take, the last commit included; a client that hangs longer is left behind."""
    assignor: Literal["cooperative-sticky", "range", "roundrobin"] = "cooperative-sticky"
    """How a classic group shares its partitions out. All members must use the same.

    With `cooperative-sticky` a commit that met a rebalance could lose the assignment (librdkafka#4059, since 1.6);
    mended by librdkafka#4908, merged in March 2025. The extra `kafka` asks for confluent-kafka 2.12, which is younger.
    """
    group_protocol: Literal["classic", "consumer"] = "classic"
    """`consumer` (KIP-848) needs Kafka 4.0; the broker then decides on session and assignment."""
    session_timeout_s: float | None = None
    """After this long without a sign of life the group goes on without us; None: the client's own default, 45 s."""
    instance_id: str | None = None
    """Static membership: a restart within the session timeout gets its partitions back without a rebalance."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where a group without committed offsets begins."""
    security_protocol: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = "plaintext"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    username: str | None = None
    password: str | None = attrs.field(default=None, repr=False)
    ca_file: str | None = None
    """Certificates (PEM) that the brokers' ones are checked against; None: those that the system trusts."""
    certificate_file: str | None = None
    """Our own certificate (PEM), where the brokers ask for one; its key is in `key_file`."""
    key_file: str | None = None
    options: Mapping[str, str | int | float | bool] = attrs.field(factory=dict, repr=False)
    """Further settings of the client (librdkafka's names). Not shown in `repr`: they may hold passwords."""

    def __attrs_post_init__(self) -> None:
        """Find every fault."""
        faults = [
            f"kafka.{name}: must not be empty"
            for name in ("bootstrap_servers", "group_id", "topics")
            if not getattr(self, name)
        ]
        faults += [
            f"kafka.topics: {topic!r} is a pattern or empty; name each topic"
            for topic in self.topics
            if not topic or topic.startswith("^")
        ]
        faults += [
            f"kafka.{name}: must be more than 0"
            for name in (
                "max_poll_messages",
                "poll_timeout_s",
                "commit_interval_s",
                "progress_timeout_s",
                "close_timeout_s",
            )
            if not getattr(self, name) > 0
        ]
        if not self.drain_timeout_s >= 0:
            faults.append("kafka.drain_timeout_s: must not be less than 0")
        if self.session_timeout_s is not None and self.group_protocol == "consumer":
            faults.append(
                "kafka.session_timeout_s: the broker decides it with group_protocol 'consumer'; leave it out"
            )
        faults += self._security_faults()
        for key in self.options:
            if key in _OFFSETS_ARE_OURS:
                faults.append(
                    f"kafka.options: {key} cannot be set: an offset is committed only after its batch was delivered"
                )
            elif key in _OWNED:
                faults.append(f"kafka.options: {key} cannot be set here; use kafka.{_OWNED[key]}")
        if faults:
            raise ConfigError(faults)

    def _security_faults(self) -> list[str]:
        faults = [
            f"kafka.{name}: must be one of {', '.join(repr(each) for each in allowed if each)}"
            for name, allowed in _CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        if faults:
            return faults
        protocol = self.security_protocol
        for names, wanted in (
            (("sasl_mechanism", "username", "password"), protocol.startswith("sasl")),
            (("ca_file", "certificate_file", "key_file"), protocol.endswith("ssl")),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not wanted:
                    faults.append(
                        f"kafka.{name}: means nothing with security_protocol {protocol!r}; leave it out"
                    )
                elif value == "":
                    faults.append(f"kafka.{name}: must not be empty")
                elif (
                    value is None and wanted and name in {"sasl_mechanism", "username", "password"}
                ):
                    faults.append(f"kafka.{name}: is needed with security_protocol {protocol!r}")
        if (self.certificate_file is None) != (self.key_file is None):
            missing = "key_file" if self.key_file is None else "certificate_file"
            faults.append(f"kafka.{missing}: certificate_file and key_file are needed together")
        return faults

    @property
    def is_incremental(self) -> bool:
        """Whether a rebalance hands over only what changes."""
        return self.group_protocol == "consumer" or self.assignor == "cooperative-sticky"

    def client_configuration(self) -> dict[str, Any]:
        """Return librdkafka's configuration: our defaults, then `options`, then what is ours alone."""
        ours: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap_servers,
            "group.id": self.group_id,
            "group.protocol": self.group_protocol,
            "auto.offset.reset": self.start,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": False,
        }
        if self.group_protocol == "classic":
            ours["partition.assignment.strategy"] = self.assignor
            if self.session_timeout_s is not None:
                ours["session.timeout.ms"] = round(self.session_timeout_s * 1000)
        ours |= self._security_configuration()
        if self.instance_id is not None:
            ours["group.instance.id"] = self.instance_id
        return {
            "allow.auto.create.topics": False,
            "queued.max.messages.kbytes": 16_384,  # the client's prefetch; its own default is 64 MB
            "topic.metadata.refresh.interval.ms": 15_000,  # a topic that appears is found within 30 s
            "reconnect.backoff.max.ms": 2_000,  # the client's own 10 s are added to a broker's every outage
            "fetch.wait.max.ms": 100,  # some brokers answer a waiting fetch only at its end
            "log_level": 4,  # warnings: offset resets are told only there
            **self.options,
            **ours,
        }

    def _security_configuration(self) -> dict[str, str]:
        keys = {
            "security.protocol": self.security_protocol,
            "sasl.mechanisms": self.sasl_mechanism,
            "sasl.username": self.username,
            "sasl.password": self.password,
            "ssl.ca.location": self.ca_file,
            "ssl.certificate.location": self.certificate_file,
            "ssl.key.location": self.key_file,
        }
        return {key: value for key, value in keys.items() if value is not None}


def key_in(said: str) -> str:
    """Return which of our keys the client complains of: `kafka.ca_file` for "ssl.ca.location failed", say."""
    for theirs, ours in _OWNED.items():
        if theirs in said:
            return f"kafka.{ours}"
    return "kafka.options"
