"""The configuration as the settings of the parts that it is for, and the checks that only those know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from stationmaster.batcher import BatchPolicy
from stationmaster.errors import ConfigError
from stationmaster.handlers import EmbedOptions
from stationmaster.kafka import KafkaSettings
from stationmaster.messages import Limits
from stationmaster.service.config_rules import BUILT_IN_HANDLERS
from stationmaster.settings import PipelineSettings, TopicSettings

if TYPE_CHECKING:
    from stationmaster.service.config import Config, KafkaConfig


def check_settings(config: Config) -> None:
    """Check what only the parts themselves know about their settings.

    Raises:
        ConfigError: with every fault.
    """
    faults: list[str] = []
    if config.stations.handler in BUILT_IN_HANDLERS:
        try:
            EmbedOptions.read(config.stations.options)
        except ConfigError as error:
            faults += error.faults
    if config.kafka is not None:
        try:
            kafka_settings(config.kafka)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)


def kafka_settings(config: KafkaConfig) -> KafkaSettings:
    """Translate `[kafka]`.

    Raises:
        ConfigError: with every fault.
    """
    told = attrs.asdict(config, recurse=False)
    del told["password_file"]
    password = told.pop("password")
    return KafkaSettings(**told, password=password.reveal() if password is not None else None)


def batch_policy(
    config: Config, *, max_rows: int | None = None, max_tokens: int | None = None
) -> BatchPolicy:
    """Translate `[batcher]`, whose `max_in_flight` is for each model server.

    Args:
        config: all of it.
        max_rows: rows of one call that every model server takes, if that is known.
        max_tokens: tokens of one call that they compute together, if known. It only lowers a configured bound: what is
            more takes turns there, and our count is an estimate that must not refuse what a server would take.
    """
    policy = BatchPolicy(**attrs.asdict(config.batcher))
    servers = len(config.embeddings.urls) if config.embeddings else 1
    rows, tokens = policy.max_batch_rows, policy.max_batch_tokens
    if max_rows is not None:
        rows = min(rows, max_rows)
    if tokens is not None and max_tokens is not None:
        tokens = min(tokens, max_tokens)
    return attrs.evolve(
        policy,
        max_in_flight=policy.max_in_flight * servers,
        max_batch_rows=rows,
        min_batch_rows=min(policy.min_batch_rows, rows),
        max_batch_tokens=tokens,
    )


def pipeline_settings(config: Config) -> PipelineSettings:
    """Translate what concerns batches, stations and their bounds."""
    batch, stations, limits, upload = config.batch, config.stations, config.limits, config.upload
    return PipelineSettings(
        # Each topic has its own then: without a roster `load_config` refuses it.
        by="message" if batch.by == "timestamp" else batch.by,
        deadline_s=batch.deadline_s,
        high_priority_deadline_s=batch.high_priority_deadline_s,
        quorum=batch.quorum,
        topics={
            topic.name: TopicSettings(
                by=topic.by or batch.by,
                deadline_s=topic.deadline_s,
                quorum=topic.quorum,
                priority=topic.priority,
                roster=topic.roster,
            )
            for topic in config.topic
        },
        max_in_flight=batch.max_in_flight,
        max_in_flight_bytes=batch.max_in_flight_bytes,
        max_parked_bytes=batch.max_parked_bytes,
        queue_capacity=stations.queue_capacity,
        max_live=stations.max_live,
        idle_s=stations.idle_s,
        threads=stations.threads,
        ordered=stations.ordered,
        job_timeout_s=stations.job_timeout_s,
        breaker_failures=stations.breaker_failures,
        breaker_probe_s=stations.breaker_probe_s,
        limits=Limits(
            message_bytes=limits.message_bytes,
            json_depth=limits.json_depth,
            stations_per_message=limits.stations_per_message,
            station_id_chars=limits.station_id_chars,
            readings_bytes=limits.readings_bytes,
        ),
        result_bytes=limits.result_bytes,
        report_bytes=limits.report_bytes,
        upload_timeout_s=upload.timeout_s,
        upload_empty=upload.empty,
        grace_s=config.shutdown.grace_s,
        group_id=config.kafka.group_id if config.kafka else "",
    )
