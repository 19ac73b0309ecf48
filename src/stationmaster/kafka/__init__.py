"""The Kafka source, and dead letters on a topic (needs the extra `kafka`): at-least-once, as a member of a group."""

from importlib.util import find_spec

if find_spec("confluent_kafka") is None:
    raise ModuleNotFoundError(
        "stationmaster.kafka needs the extra: pip install 'stationmaster[kafka]'",
        name="confluent_kafka",
    )

from stationmaster.kafka.dead_letters import KafkaDeadLetters, open_kafka_dead_letters
from stationmaster.kafka.settings import KafkaSettings
from stationmaster.kafka.source import (
    KafkaSource,
    KafkaStatistics,
    PartitionStatistics,
    open_kafka_source,
)

__all__ = [
    "KafkaDeadLetters",
    "KafkaSettings",
    "KafkaSource",
    "KafkaStatistics",
    "PartitionStatistics",
    "open_kafka_dead_letters",
    "open_kafka_source",
]
