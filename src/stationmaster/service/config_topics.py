"""What must hold between `[[topic]]` tables, and between them and the rest of the configuration."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from stationmaster.service.config_rules import Complaint, figure, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def faults_of_topics(
    values: Mapping[str, Any], topics: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[tuple[str, ...], Complaint]]:
    """Yield what is wrong with topics whose keys are each right by themselves.

    Args:
        values: `table.key` -> value; what is absent, because it is wrong itself, is not judged.
        topics: each topic's key -> value, likewise.

    Yields:
        The keys involved, the one to blame first, and the complaint.
    """
    key, read = _topics_read(values)
    for index, topic in enumerate(topics):
        path = f"topic[{index}]"
        name = topic.get("name")
        if name is not None and read is not None and name not in read:
            wrong = f"{shown(name)} is not read"
            yield (f"{path}.name", key), Complaint(wrong, f"one of {key}: {', '.join(read)}")
        if name is not None and any(name == other.get("name") for other in topics[:index]):
            wrong = f"{shown(name)} has a table already"
            yield (f"{path}.name",), Complaint(wrong, "each topic once")
        most = values.get("limits.station_id_chars")
        for place, station_id in enumerate(topic.get("roster", ())):
            if most is not None and len(station_id) > most:
                wrong = f"has {len(station_id)} characters"
                expected = f"at most {most}, limits.station_id_chars: no message can name it"
                yield (f"{path}.roster[{place}]",), Complaint(wrong, expected)
        yield from _faults_of_deadline(values, f"{path}.deadline_s", topic.get("deadline_s"))
    yield from _faults_without_roster(values, topics, read)


def _faults_of_deadline(
    values: Mapping[str, Any], path: str, deadline_s: float | None
) -> Iterator[tuple[tuple[str, ...], Complaint]]:
    keys = "stations.idle_s", "shutdown.grace_s"
    if deadline_s is None or not values.keys() >= set(keys):
        return
    idle_s, grace_s = (values[key] for key in keys)
    if idle_s <= deadline_s + grace_s:
        wrong = f"{figure(deadline_s)} is too long"
        expected = f"less than {idle_s - grace_s:g}, stations.idle_s - shutdown.grace_s"
        yield (path, *keys), Complaint(wrong, f"{expected}: a station with work is not idle")


def _faults_without_roster(
    values: Mapping[str, Any], topics: Sequence[Mapping[str, Any]], read: Sequence[str] | None
) -> Iterator[tuple[tuple[str, ...], Complaint]]:
    """Yield where batches are cut by timestamp and nobody knows whom to wait for."""
    why = "the stations that are waited for"
    general = values.get("batch.by") == "timestamp"
    for index, topic in enumerate(topics):
        by = topic.get("by")
        if topic.get("roster") == () and (by == "timestamp" or (general and by is None)):
            where = (f"topic[{index}].roster", f"topic[{index}].by", "batch.by")
            yield where, Complaint('is empty, and by is "timestamp"', why)
    bare = [name for name in read or () if all(name != topic.get("name") for topic in topics)]
    if general and bare:
        wrong = f'is "timestamp", and these have no [[topic]] with a roster: {", ".join(bare)}'
        yield ("batch.by",), Complaint(wrong, f"for each topic a roster, {why}")


def _topics_read(values: Mapping[str, Any]) -> tuple[str, Sequence[str] | None]:
    """Return the key that says which topics are read, and these; None if that is not known."""
    if values.get("source.kind") == "kafka":
        return "kafka.topics", values.get("kafka.topics")
    if values.get("source.kind") == "file" and "file.path" in values and "file.topic" in values:
        name = PurePath(values["file.path"]).name
        topic = values["file.topic"] or name.removesuffix(".gz").removesuffix(".jsonl")
        return "file.topic", (topic,)
    return "", None
