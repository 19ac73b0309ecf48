"""How a pipeline cuts, times and bounds its batches, for all topics and for each; and a moment of one."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import attrs

from stationmaster.errors import ConfigError
from stationmaster.messages import Limits, why_bad_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Boundary: TypeAlias = Literal["message", "poll", "timestamp"]
Priority: TypeAlias = Literal["normal", "high"]

_CHANGEABLE: Final = frozenset(
    {"deadline_s", "high_priority_deadline_s", "quorum", "roster", "topics"}
)


def _in_order(station_ids: Iterable[str]) -> tuple[str, ...]:
    return tuple(station_ids)


@attrs.frozen(kw_only=True)
class BatchRules:
    """What holds for the batches of one topic."""

    by: Boundary
    deadline_s: float
    quorum: float
    is_urgent: bool
    """Of high priority: opened before others."""
    roster: tuple[str, ...]
    """Stations that are always expected."""


@attrs.frozen(kw_only=True)
class TopicSettings:
    """What one topic has of its own; None: as for all topics."""

    by: Boundary | None = None
    deadline_s: float | None = None
    quorum: float | None = None
    priority: Priority = "normal"
    roster: tuple[str, ...] | None = attrs.field(
        default=None, converter=attrs.converters.optional(_in_order)
    )


@attrs.frozen(kw_only=True)
class PipelineSettings:
    """How batches are cut, timed and bounded. Durations in seconds, sizes in bytes.

    Raises:
        ConfigError: on nonsense, all faults at once.
    """

    by: Boundary = "message"
    deadline_s: float = 5.0
    high_priority_deadline_s: float = 3.0
    """Of topics of high priority that have no deadline of their own, if it is shorter than `deadline_s`."""
    quorum: float = 1.0
    """0 < quorum <= 1; below 1 a batch closes when that share of its stations answered."""
    roster: tuple[str, ...] = attrs.field(default=(), converter=_in_order)
    """Stations that are always expected, whether a message names them or not."""
    topics: Mapping[str, TopicSettings] = attrs.field(factory=dict)
    """Topic -> what it has of its own."""
    max_in_flight: int = 64
    """Open batches, those in upload included."""
    max_in_flight_bytes: int = 64 * 1024 * 1024
    max_parked_bytes: int = 64 * 1024 * 1024
    """Of messages that wait for room while polling goes on; only where a topic's batches are cut by timestamp."""
    queue_capacity: int = 64
    """Jobs that may wait at one station; at least `max_in_flight`, or full queues reject what had room."""
    max_live: int = 20_000
    threads: int = 32
    """Calls of a plain function that may run at once, those included that were given up and still go on."""
    ordered: bool = True
    """Whether a batch handler gets a topic's batches one at a time, in order; else all that are open at once."""
    idle_s: float = 600.0
    job_timeout_s: float | None = None
    """Of one station's job, if it is to be shorter than its batch's deadline leaves."""
    breaker_failures: int = 3
    """Jobs of a station that time out in a row, after which it is rejected at once; 0: never."""
    breaker_probe_s: float = 10.0
    """From one probe of such a station to the next."""
    limits: Limits = attrs.field(factory=Limits)
    result_bytes: int = 1024 * 1024
    report_bytes: int = 32 * 1024 * 1024
    upload_timeout_s: float = 60.0
    """For all attempts of one batch together; then it goes to the outbox, or has no home."""
    upload_empty: bool = False
    """Whether a batch without stations is uploaded too."""
    grace_s: float = 15.0
    """How long a cancelled pipeline may go on delivering what is open."""
    group_id: str = ""
    """Goes into the ids of batches of several messages."""
    _general: BatchRules = attrs.field(init=False, repr=False, eq=False)
    _rules: Mapping[str, BatchRules] = attrs.field(init=False, repr=False, eq=False)

    @_general.default
    def _resolve_general(self) -> BatchRules:
        return self._resolve(TopicSettings())

    @_rules.default
    def _resolve_topics(self) -> dict[str, BatchRules]:
        return {name: self._resolve(topic) for name, topic in self.topics.items()}

    def _resolve(self, topic: TopicSettings) -> BatchRules:
        is_urgent = topic.priority == "high"
        usual = (
            min(self.deadline_s, self.high_priority_deadline_s) if is_urgent else self.deadline_s
        )
        return BatchRules(
            by=self.by if topic.by is None else topic.by,
            deadline_s=usual if topic.deadline_s is None else topic.deadline_s,
            quorum=self.quorum if topic.quorum is None else topic.quorum,
            is_urgent=is_urgent,
            roster=self.roster if topic.roster is None else topic.roster,
        )

    def rules(self, topic: str) -> BatchRules:
        """Return what holds for a topic's batches."""
        return self._rules.get(topic, self._general)

    def all_rules(self) -> Iterator[BatchRules]:
        """Yield what holds for topics without settings of their own, then for each that has some."""
        yield self._general
        yield from self._rules.values()

    def fixed_changes(self, other: PipelineSettings) -> tuple[str, ...]:
        """Return what differs and cannot change while a pipeline runs: all but how batches are timed, and rosters."""
        names = [
            field.name
            for field in attrs.fields(PipelineSettings)
            if field.init
            and field.name not in _CHANGEABLE
            and getattr(self, field.name) != getattr(other, field.name)
        ]
        names += [
            f"topics[{name!r}].by"
            for name in {**self.topics, **other.topics}
            if self.by == other.by and self.rules(name).by != other.rules(name).by
        ]
        return tuple(names)

    def __attrs_post_init__(self) -> None:
        """Check the settings together."""
        faults = [
            f"{name}: {getattr(self, name)!r} is not above 0"
            for name in (
                "deadline_s",
                "high_priority_deadline_s",
                "max_in_flight",
                "max_in_flight_bytes",
                "max_parked_bytes",
                "queue_capacity",
                "max_live",
                "threads",
                "idle_s",
                "breaker_probe_s",
                "result_bytes",
                "report_bytes",
                "upload_timeout_s",
            )
            if not getattr(self, name) > 0
        ]
        faults += self._faults_of_rules("", self._general)
        if self.job_timeout_s is not None and not self.job_timeout_s > 0:
            faults.append(f"job_timeout_s: {self.job_timeout_s!r} is not above 0")
        if self.idle_s < self.breaker_probe_s:
            faults.append(
                f"idle_s: {self.idle_s:g} is below breaker_probe_s ({self.breaker_probe_s:g})"
            )
        if not self.breaker_failures >= 0:
            faults.append(f"breaker_failures: {self.breaker_failures!r} is below 0")
        if not self.grace_s >= 0:
            faults.append(f"grace_s: {self.grace_s!r} is below 0")
        if self.queue_capacity < self.max_in_flight:
            faults.append(
                f"queue_capacity: {self.queue_capacity} is below max_in_flight ({self.max_in_flight})"
            )
        longest = max(rules.deadline_s for rules in self.all_rules())
        if self.idle_s <= longest:
            faults.append(f"idle_s: {self.idle_s:g} is not above deadline_s ({longest:g})")
        for name, topic in self.topics.items():
            rules = self._rules[name]
            if not rules.deadline_s > 0 and topic.deadline_s is not None:
                faults.append(f"topics[{name!r}].deadline_s: {rules.deadline_s!r} is not above 0")
            if topic.priority not in get_args(Priority):
                faults.append(
                    f"topics[{name!r}].priority: {topic.priority!r} is none of "
                    f"{', '.join(get_args(Priority))}"
                )
            told = {key for key in ("by", "quorum", "roster") if getattr(topic, key) is not None}
            faults += self._faults_of_rules(f"topics[{name!r}].", rules, told)
        if faults:
            raise ConfigError(faults)

    def _faults_of_rules(
        self, where: str, rules: BatchRules, told: Iterable[str] = ("by", "quorum", "roster")
    ) -> Iterator[str]:
        """Yield what is wrong with a topic's rules, as far as it is told there."""
        if "by" in told and rules.by not in get_args(Boundary):
            yield f"{where}by: {rules.by!r} is none of {', '.join(get_args(Boundary))}"
        if "quorum" in told and not 0 < rules.quorum <= 1:
            yield f"{where}quorum: {rules.quorum!r} is not in 0 < quorum <= 1"
        if rules.by == "timestamp" and not rules.roster and ("by" in told or "roster" in told):
            yield f"{where}roster: is empty; by = 'timestamp' needs one, or it cannot tell who is still to come"
        if "roster" in told:
            for station_id in rules.roster:
                if (reason := why_bad_id(station_id, self.limits)) is not None:
                    yield f"{where}roster: {station_id!r}: {reason}"


@attrs.frozen(kw_only=True)
class OpenBatchStatistics:
    """A moment of one open batch."""

    batch_id: str
    topic: str
    opened: float
    """On trio's clock, as `deadline`."""
    deadline: float
    answered: int
    """Stations with an outcome; 0 once it is decided."""
    expected: int
    delivering: bool
    """It is decided, and its upload under way."""


@attrs.frozen(kw_only=True)
class PipelineStatistics:
    """A moment of the pipeline."""

    in_flight: int
    in_flight_bytes: int
    live_stations: int
    draining: bool
    blocked: tuple[str, ...] = ()
    """Stores that something waits for: `outbox`, `dead-letters`. Consumption pauses when the slots are used up."""
    parked_bytes: int = 0
    """Of messages that were polled and wait for room."""
    late_results: int = 0
    """Answers that came after their batch was closed: dropped."""
    missing: int = 0
    """Stations of a roster that closed batches had no data of."""
    joined: int = 0
    """How often messages joined an open batch of their time."""
    follow_ups: int = 0
    """Batches of a time that had another batch before."""
    duplicates: int = 0
    """Entries beyond the first of a station in one batch."""
    abandoned_threads: int = 0
    """Threads of a plain function that go on although their job was given up; each holds one of `threads`."""
    open_breakers: int = 0
    """Stations that are rejected at once, because they timed out again and again."""
    oldest_deadline: float = inf
    """The earliest of the open batches, uploads included, on trio's clock; infinity if none is open."""
