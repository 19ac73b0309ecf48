"""What an operator does with Kafka's command-line tools: topics, offsets, groups, access; and producing."""

from __future__ import annotations

import time
import uuid
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # the client's own word for its public names
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewPartitions,
    NewTopic,
    OffsetSpec,
    ResourcePatternType,
    ResourceType,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future

T = TypeVar("T")

ANSWER_S: Final = 15.0


@attrs.define(eq=False)
class Operator:
    """Works on the broker at this address. Blocks: some ms a call, 15 s at most. Any thread, one at a time."""

    bootstrap: str
    _admin: AdminClient | None = attrs.field(default=None, init=False)

    def new_name(self, prefix: str) -> str:
        """Return a name that nobody else uses."""
        return f"{prefix}-{uuid.uuid4().hex[:12]}"

    # --------------------------------------------------------------------------------------------------------- topics

    def create_topic(
        self, name: str | None = None, partitions: int = 4, config: Mapping[str, str] | None = None
    ) -> str:
        """Create a topic and wait until it has leaders; returns its name (a new one if none is given)."""
        name = name or self.new_name("topic")
        _only(self.admin.create_topics([NewTopic(name, partitions, 1, config=dict(config or {}))]))
        self._await_leaders(name, partitions)
        return name

    def delete_topic(self, name: str) -> None:
        """Delete a topic."""
        _only(self.admin.delete_topics([name]))

    def add_partitions(self, name: str, total: int) -> None:
        """Let a topic have so many partitions from now on."""
        _only(self.admin.create_partitions([NewPartitions(name, total)]))
        self._await_leaders(name, total)

    def delete_records(self, topic: str, before: Mapping[int, int]) -> None:
        """Cut the log: of each partition everything before the offset."""
        cuts = [TopicPartition(topic, number, offset) for number, offset in before.items()]
        for answer in self.admin.delete_records(cuts).values():
            answer.result(ANSWER_S)

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Return the log's end of every partition: the offset that the next record gets."""
        return self._offsets(topic, OffsetSpec.latest())  # type: ignore[no-untyped-call]

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Return the first offset that every partition still holds."""
        return self._offsets(topic, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    def produce(
        self,
        topic: str,
        values: Sequence[bytes | None],
        *,
        partition: int = 0,
        timestamp_ms: int = 0,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        """Append the values to a partition, in order, and wait until they are there.

        Raises:
            KafkaException: the broker does not take one of them.
        """
        # A new client each time: none remembers what was refused, or waits before it connects again.
        producer = Producer(self._client | {"linger.ms": 5})
        faults: list[KafkaError] = []

        def note(error: KafkaError | None, _: object) -> None:
            if error is not None:
                faults.append(error)

        more: dict[str, Any] = {"timestamp": timestamp_ms, "headers": list(headers)}
        for value in values:
            producer.produce(topic, value, partition=partition, on_delivery=note, **more)
            producer.poll(0)
        left = producer.flush(ANSWER_S)
        if faults:
            raise KafkaException(faults[0])
        assert left == 0, f"{left} of {len(values)} records for {topic} wait for an answer"

    # --------------------------------------------------------------------------------------------------------- groups

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """Return the group's committed offset of every partition that has one."""
        asked = [ConsumerGroupTopicPartitions(group)]
        try:
            found = _only(self.admin.list_consumer_group_offsets(asked)).topic_partitions
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return {}
            raise
        return {
            each.partition: each.offset
            for each in found
            if each.topic == topic and each.offset >= 0
        }

    def commit(self, group: str, topic: str, offset: int, *, partition: int = 0) -> None:
        """Commit an offset for a group that has no members."""
        with closing(Consumer(self._client | {"group.id": group})) as consumer:
            consumer.commit(offsets=[TopicPartition(topic, partition, offset)], asynchronous=False)

    def members(self, group: str) -> dict[str, list[tuple[str, int]]]:
        """Return what the broker has as the group's members: member id -> its (topic, partition)s, sorted."""
        found = _only(self.admin.describe_consumer_groups([group]))
        return {
            member.member_id: sorted(
                (each.topic, each.partition) for each in member.assignment.topic_partitions
            )
            for member in found.members
        }

    # --------------------------------------------------------------------------------------------------------- access

    def deny(self, topic: str) -> None:
        """From now on nobody may do anything with this topic."""
        _only(self.admin.create_acls([self._only_root_may(topic)]))

    def allow(self, topic: str) -> None:
        """End that."""
        acl = self._only_root_may(topic)
        fields = (acl.restype, acl.name, acl.resource_pattern_type, acl.principal, acl.host)
        _only(
            self.admin.delete_acls([AclBindingFilter(*fields, acl.operation, acl.permission_type)])
        )

    def _only_root_may(self, topic: str) -> AclBinding:
        # A topic with any rule is closed to all whom no rule lets in: this one lets in somebody who does not exist.
        return AclBinding(
            ResourceType.TOPIC,
            topic,
            ResourcePatternType.LITERAL,
            "User:root",
            "*",
            AclOperation.READ,
            AclPermissionType.ALLOW,
        )

    # -------------------------------------------------------------------------------------------------------- helpers

    def forget(self) -> None:
        """Use a new client from now on: after a restart the old one waits for a coordinator that is no more."""
        self._admin = None

    @property
    def admin(self) -> AdminClient:
        """The client for everything else."""
        if self._admin is None:
            self._admin = AdminClient(self._client)
        return self._admin

    @property
    def _client(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self.bootstrap,
            "log_level": 0,
            "reconnect.backoff.max.ms": 200,
        }

    def _offsets(self, topic: str, which: OffsetSpec) -> dict[int, int]:
        described = self.admin.list_topics(topic, timeout=ANSWER_S).topics[topic]
        asked = {TopicPartition(topic, number): which for number in described.partitions}
        answers = self.admin.list_offsets(asked)
        return {each.partition: answer.result(ANSWER_S).offset for each, answer in answers.items()}

    def _await_leaders(self, name: str, partitions: int) -> None:
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            found = self.admin.list_topics(name, timeout=ANSWER_S).topics[name]
            leaders = [each.leader for each in found.partitions.values()]
            if found.error is None and len(leaders) == partitions and min(leaders) >= 0:
                return
            time.sleep(0.01)  # the broker tells nobody
        raise TimeoutError(f"no leaders for {name} after {ANSWER_S:g} s")


def _only(answers: Mapping[Any, Future[T]]) -> T:
    (answer,) = answers.values()
    return answer.result(ANSWER_S)
