"""`[[topic]]`: what one topic has of its own, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stationmaster.errors import ConfigError
from stationmaster.service.config_reading import load_config
from stationmaster.service.config_rendering import render
from stationmaster.service.translation import pipeline_settings

if TYPE_CHECKING:
    from stationmaster.service.config import Config
    from stationmaster.settings import BatchRules

SAMPLE = Path(__file__).parents[2] / "config" / "stationmaster.toml"

BASE = """
source.kind = "kafka"
stations.handler = "plants.answers:rate"
upload.url = "http://localhost:8002/batches"

[kafka]
bootstrap_servers = "localhost:9092"
group_id = "stationmaster"
topics = ["wind", "air", "sun"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "stationmaster.toml"


def load(file: Path, topics: str, *overrides: str) -> Config:
    file.write_text(BASE + topics)
    return load_config(file, overrides=overrides, environ={})


def rules(config: Config, topic: str) -> BatchRules:
    return pipeline_settings(config).rules(topic)


def faults(file: Path, topics: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, topics, *overrides)
    return list(caught.value.faults)


def test_what_a_topic_leaves_out_is_as_in_batch(file: Path) -> None:
    config = load(
        file,
        """
        [batch]
        by = "poll"
        deadline_s = 4
        quorum = 0.75
        [[topic]]
        name = "wind"
        by = "message"
        deadline_s = 2
        quorum = 0.5
        roster = ["S1", "S2"]
        [[topic]]
        name = "air"
        """,
    )
    wind, air, sun = (rules(config, topic) for topic in ("wind", "air", "sun"))
    assert (wind.by, wind.deadline_s, wind.quorum, wind.roster) == ("message", 2, 0.5, ("S1", "S2"))
    assert (air.by, air.deadline_s, air.quorum, air.roster) == ("poll", 4, 0.75, ())
    assert air == sun


@pytest.mark.parametrize(
    ("batch", "topic", "deadline_s"),
    [
        ("", "", 3.0),
        ("batch.high_priority_deadline_s=1.5", "", 1.5),
        ("batch.deadline_s=2.0", "", 2.0),
        ("", "deadline_s = 4", 4.0),
    ],
)
def test_a_topic_of_high_priority_has_the_shorter_deadline_unless_it_has_its_own(
    file: Path, batch: str, topic: str, deadline_s: float
) -> None:
    text = f'[[topic]]\nname = "wind"\npriority = "high"\n{topic}'
    wind = rules(load(file, text, *filter(None, [batch])), "wind")
    assert wind.is_urgent
    assert wind.deadline_s == deadline_s


def test_every_topic_may_be_cut_by_timestamp_if_each_has_a_roster(file: Path) -> None:
    tables = "".join(
        f'[[topic]]\nname = "{name}"\nroster = ["S1"]\n' for name in ("wind", "air", "sun")
    )
    config = load(file, tables, "batch.by=timestamp", "batch.max_parked_bytes=1000")
    assert [rules(config, name).by for name in ("wind", "air", "sun")] == ["timestamp"] * 3
    assert pipeline_settings(config).max_parked_bytes == 1000


def test_a_topic_of_a_file_source_is_the_files_name_unless_it_is_told(file: Path) -> None:
    base = """
        source.kind = "file"
        stations.handler = "plants.answers:rate"
        upload.url = "http://localhost:8002/batches"
        file.path = "data/air70.jsonl.gz"
        """
    file.write_text(base + '[[topic]]\nname = "air70"\nroster = ["S1"]')
    assert rules(load_config(file, environ={}), "air70").roster == ("S1",)
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ={}, overrides=["file.topic=air"])
    assert caught.value.faults == (
        'topic[0].name: "air70" is not read; expected one of file.topic: air (from --set file.topic)',
    )


def test_the_drain_waits_for_the_longest_deadline_of_all_topics(file: Path) -> None:
    config = load(file, '[[topic]]\nname = "wind"\ndeadline_s = 20\n')
    assert config.kafka is not None
    assert config.kafka.drain_timeout_s == 25.0


def test_all_faults_of_topics_are_told_at_once_with_their_paths(file: Path) -> None:
    told = faults(
        file,
        """
        [[topic]]
        name = "wnd"
        deadline_s = 0
        priority = "highest"
        [[topic]]
        name = "air"
        by = "timestamp"
        rooster = 7
        [[topic]]
        name = "air"
        quorum = "half"
        roster = ["S1", " ", "S1", 7]
        deadline_s = 590
        [[topic]]
        """,
    )
    assert told == [
        "topic[0].deadline_s: 0 is out of range; expected a number of seconds > 0 and <= 86400",
        'topic[0].priority: "highest" is no choice; expected "normal" or "high"',
        (
            "topic[1].rooster: is unknown (did you mean roster?); "
            "expected one of name, by, deadline_s, quorum, priority, roster"
        ),
        'topic[2].quorum: "half" is a string; expected a share > 0 and <= 1',
        "topic[2].roster[1]: is empty; expected a station's id of at most 1024 printable characters",
        (
            "topic[2].roster[3]: 7 is a whole number; "
            "expected a station's id of at most 1024 printable characters"
        ),
        (
            "topic[3].name: is missing; expected a topic's name "
            "(letters, digits, '.', '_', '-'; at most 249)"
        ),
        'topic[0].name: "wnd" is not read; expected one of kafka.topics: wind, air, sun',
        'topic[2].name: "air" has a table already; expected each topic once',
        (
            "topic[2].deadline_s: 590 is too long; "
            "expected less than 585, stations.idle_s - shutdown.grace_s: a station with work is not idle"
        ),
        'topic[1].roster: is empty, and by is "timestamp"; expected the stations that are waited for',
    ]


@pytest.mark.parametrize(
    ("topics", "fault"),
    [
        ("topic = 7", "topic: 7 is a whole number; expected any number of tables [[topic]]"),
        ("topic = [7]", "topic[0]: 7 is a whole number; expected a table [topic[0]]"),
        ("[topic]", "topic: is a table; expected any number of tables [[topic]]"),
        (
            '[[topic]]\nname = "air"\nroster = ["a", "b", "a"]',
            "topic[0].roster[2]: stands in the list twice; expected a list of different station ids",
        ),
        (
            f'[[topic]]\nname = "air"\nroster = ["{"x" * 129}"]',
            (
                "topic[0].roster[0]: has 129 characters; "
                "expected at most 128, limits.station_id_chars: no message can name it"
            ),
        ),
    ],
)
def test_a_topic_of_the_wrong_form_is_one_fault(file: Path, topics: str, fault: str) -> None:
    file.write_text(topics + BASE if topics.startswith("topic") else BASE + topics)
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ={})
    assert caught.value.faults == (fault,)


def test_by_timestamp_for_all_names_the_topics_without_a_roster(file: Path) -> None:
    assert faults(file, '[[topic]]\nname = "air"\nroster = ["S1"]', "batch.by=timestamp") == [
        (
            'batch.by: is "timestamp", and these have no [[topic]] with a roster: wind, sun; '
            "expected for each topic a roster, the stations that are waited for (from --set batch.by)"
        )
    ]
    assert faults(file, '[[topic]]\nname = "air"', "batch.by=timestamp")[0] == (
        'topic[0].roster: is empty, and by is "timestamp"; expected the stations that are waited for'
        " (from --set batch.by)"
    )


def test_a_topic_cannot_be_set_from_elsewhere_than_the_file(file: Path) -> None:
    file.write_text(BASE)
    with pytest.raises(ConfigError) as caught:
        load_config(
            file, overrides=["topic.quorum=1"], environ={"STATIONMASTER_TOPIC__NAME": "air"}
        )
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "topic.name",
        "topic.quorum",
    ]
    assert all("cannot be set here" in fault for fault in caught.value.faults)


def test_topics_are_rendered_and_load_again(file: Path, tmp_path: Path) -> None:
    config = load(
        file,
        '[[topic]]\nname = "air"\nby = "timestamp"\nroster = ["S 1", "S2"]\n'
        '[[topic]]\nname = "sun"\npriority = "high"\n',
    )
    again = tmp_path / "again.toml"
    again.write_text(render(config))
    assert load_config(again, environ={}) == config
    assert len(config.topic) == 2


def test_the_samples_topic_is_one_that_can_be_read(tmp_path: Path) -> None:
    text = SAMPLE.read_text()
    begin = text.index("#[[topic]]")
    end = text.index("\n\n", begin)
    block = text[begin:end].replace("\n#", "\n").removeprefix("#")
    lines: list[Any] = [line for line in block.splitlines() if not line.startswith(" ")]
    sample = tmp_path / "sample.toml"
    sample.write_text(text[:begin] + "\n".join(lines) + text[end:])
    assert load_config(sample, environ={}).topic[0].roster == ("S001", "S002")
