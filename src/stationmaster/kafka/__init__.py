"""The Kafka source (needs the extra `kafka`): at-least-once reading of topics as a member of a consumer group."""

from stationmaster.kafka.settings import KafkaSettings
from stationmaster.kafka.source import (
    KafkaSource,
    KafkaStatistics,
    PartitionStatistics,
    open_kafka_source,
)

__all__ = [
    "KafkaSettings",
    "KafkaSource",
    "KafkaStatistics",
    "PartitionStatistics",
    "open_kafka_source",
]
