from __future__ import annotations

import math
import re
import tomllib
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stationmaster.errors import ConfigError
from stationmaster.service.config import BatchConfig, Config
from stationmaster.service.config_reading import load_config
from stationmaster.service.config_rendering import render
from stationmaster.service.config_rules import Secret, shown, toml_text
from stationmaster.service.config_schema import TABLES
from stationmaster.service.translation import check_settings, kafka_settings, pipeline_settings

CONFIG = Path(__file__).parents[2] / "config"

MINIMAL = """
[source]
kind = "kafka"

[kafka]
bootstrap_servers = "localhost:9092"
group_id = "stationmaster"
topics = ["stations"]

[embeddings]
urls = ["http://localhost:8001/v1"]
model = "readings-128"

[upload]
url = "http://localhost:8002/batches"
"""

REQUIRED: dict[str, dict[str, Any]] = {
    "source": {"kind": "kafka"},
    "kafka": {
        "bootstrap_servers": "localhost:9092",
        "group_id": "stationmaster",
        "topics": ["stations"],
    },
    "file": {"path": "stations.jsonl"},
    "embeddings": {"urls": ["http://localhost:8001/v1"], "model": "readings-128"},
    "upload": {"url": "http://localhost:8002/batches"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "stationmaster.toml"
    path.write_text(MINIMAL)
    return path


def load(path: Path, *overrides: str, **environ: str) -> Config:
    return load_config(path, overrides=overrides, environ=environ)


def secrets_of(config: Config) -> tuple[str | None, str | None]:
    """The model server's key and the upload target's token."""
    assert config.embeddings is not None
    key, token = config.embeddings.key, config.upload.token
    return (
        key.reveal() if key is not None else None,
        token.reveal() if token is not None else None,
    )


def faults_of(path: Path, *overrides: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides, **environ)
    return list(caught.value.faults)


def load_tree(path: Path, tree: dict[str, Any]) -> Config:
    path.write_text("\n".join(f"{toml_text(key)} = {toml_text(tree[key])}" for key in tree))
    return load(path)


def faults_in(path: Path, **tables: object) -> list[str]:
    """The faults of a configuration with everything that is required, and these keys over it."""
    tree: dict[str, Any] = {name: dict(table) for name, table in REQUIRED.items()}
    for name, table in tables.items():
        tree[name] = {**tree.get(name, {}), **table} if isinstance(table, dict) else table
    with pytest.raises(ConfigError) as caught:
        load_tree(path, tree)
    return list(caught.value.faults)


# -------------------------------------------------------------------------------------------------------- good files


def test_a_minimal_file_takes_the_defaults_of_the_classes(file: Path) -> None:
    config = load(file)

    assert config.batch.deadline_s == 5.0
    assert config.batch.max_in_flight_bytes == 64 * 1024 * 1024
    assert config.kafka is not None
    assert config.kafka.topics == ("stations",)
    assert config.file is None
    assert config.embeddings is not None
    assert config.embeddings.urls == ("http://localhost:8001/v1",)
    assert config.upload.accepted == ()
    assert secrets_of(config) == (None, None)


def test_a_whole_number_is_fine_where_a_fraction_may_stand_and_becomes_one(file: Path) -> None:
    deadline_s = load(file, "batch.deadline_s=3").batch.deadline_s

    assert deadline_s == 3.0
    assert type(deadline_s) is float


def test_the_drain_time_follows_from_the_deadline_unless_it_is_configured(file: Path) -> None:
    derived = load(file, "batch.deadline_s=2.0").kafka
    given_ = load(file, "batch.deadline_s=2.0", "kafka.drain_timeout_s=30").kafka

    assert derived is not None
    assert derived.drain_timeout_s == 7.0
    assert given_ is not None
    assert given_.drain_timeout_s == 30.0


def test_a_file_source_with_an_own_handler_needs_neither_kafka_nor_a_model_server(
    file: Path,
) -> None:
    file.write_text(
        """
        source.kind = "file"
        file.path = "stations.jsonl"
        stations.handler = "plants.answers:rate"
        stations.options = { fields = ["power", "wind"], since = 2026-01-02 }
        upload.url = "https://target.example:8443/batches?site=north"
        """
    )

    config = load(file)

    assert config.kafka is None
    assert config.embeddings is None
    assert config.stations.options == {"fields": ["power", "wind"], "since": date(2026, 1, 2)}


@pytest.mark.parametrize(
    "servers", ["broker:9092", "a.example:1,b-2:65535", "[::1]:9092, 10.0.0.1:9092"]
)
def test_servers_are_hosts_with_ports(file: Path, servers: str) -> None:
    kafka = load(file, f"kafka.bootstrap_servers={servers}").kafka

    assert kafka is not None
    assert kafka.bootstrap_servers == servers


# ------------------------------------------------------------------------------------------------------------ faults


def test_six_different_faults_give_exactly_six_lines_each_with_its_path(file: Path) -> None:
    file.write_text(
        """
        [source]
        kind = "kafak"

        [batch]
        deadline_s = -1
        deadlin_s = 3

        [batcher]
        send_when_idle = "false"

        [embeddings]
        urls = ["http://localhost:8001/v1"]
        model = 7

        [upload]
        timeout_s = 60
        """
    )

    assert faults_of(file) == [
        'source.kind: "kafak" is no choice; expected "kafka" or "file"',
        (
            "batch.deadlin_s: is unknown (did you mean deadline_s?); "
            "expected one of by, deadline_s, high_priority_deadline_s, quorum, max_in_flight, "
            "max_in_flight_bytes, max_parked_bytes"
        ),
        "batch.deadline_s: -1 is out of range; expected a number of seconds > 0 and <= 86400",
        'batcher.send_when_idle: "false" is a string; expected true or false',
        (
            "embeddings.model: 7 is a whole number; "
            "expected a text of at most 1024 printable characters"
        ),
        "upload.url: is missing; expected an http or https URL without credentials",
    ]


@pytest.mark.parametrize(
    ("table", "key", "value", "wrong"),
    [
        ("batch", "max_in_flight", "7", '"7" is a string'),
        ("batch", "max_in_flight", True, "true is a boolean"),
        ("batch", "max_in_flight", 7.0, "7.0 is a number with a fraction"),
        ("batch", "max_in_flight", [7], "is a list"),
        ("batch", "max_in_flight", {"n": 7}, "is a table"),
        ("batch", "max_in_flight", date(2026, 1, 2), "2026-01-02 is a date or time"),
        ("batch", "max_in_flight", 0, "0 is out of range"),
        ("batch", "max_in_flight", 2**80, "an integer beyond 64 bits is out of range"),
        ("batch", "deadline_s", "5", '"5" is a string'),
        ("batch", "deadline_s", True, "true is a boolean"),
        ("batch", "deadline_s", 0, "0 is out of range"),
        ("batch", "deadline_s", math.nan, "nan is out of range"),
        ("batch", "deadline_s", math.inf, "inf is out of range"),
        ("batch", "deadline_s", 10**400, "inf is out of range"),
        ("batch", "deadline_s", 86_400.5, "86400.5 is out of range"),
        ("batch", "quorum", 0, "0 is out of range"),
        ("batch", "quorum", 1.01, "1.01 is out of range"),
        ("batch", "by", "hour", '"hour" is no choice'),
        ("batch", "by", 1, "1 is a whole number"),
        ("batcher", "send_when_idle", 1, "1 is a whole number"),
        ("batcher", "max_wait_s", -0.001, "-0.001 is out of range"),
        ("limits", "json_depth", 257, "257 is out of range"),
        ("kafka", "group_id", "  ", "is empty"),
        ("kafka", "group_id", "a\nb", "holds characters that cannot be printed"),
        ("kafka", "group_id", "x" * 1025, "has more than 1024 characters"),
        ("kafka", "bootstrap_servers", "localhost", '"localhost" is no host:port'),
        ("kafka", "bootstrap_servers", "a:1,b:65536", '"b:65536" is no host:port'),
        ("kafka", "bootstrap_servers", "a:1,", '"" is no host:port'),
        ("kafka", "topics", [], "is empty"),
        ("kafka", "topics", "stations", '"stations" is a string'),
        ("kafka", "options", 1, "1 is a whole number"),
        ("file", "topic", "wind power", '"wind power" is not of this form'),
        ("stations", "handler", "plants", '"plants" is none of them'),
        ("stations", "handler", "plants.answers:1st", '"plants.answers:1st" is none of them'),
        ("stations", "handler", "p" * 70 + ":", f'"{"p" * 60}"... is none of them'),
        ("stations", "options", {"seed": 2**64}, "holds an integer beyond 64 bits"),
        ("stations", "job_timeout_s", 0, "0 is out of range"),
        ("stations", "breaker_failures", -1, "-1 is out of range"),
        ("stations", "breaker_failures", 1.0, "1.0 is a number with a fraction"),
        ("stations", "breaker_probe_s", 0, "0 is out of range"),
        ("embeddings", "urls", [], "is empty"),
        ("embeddings", "urls", [f"http://host-{number}" for number in range(65)], "has 65 entries"),
        ("embeddings", "api", "triton", '"triton" is no choice'),
        ("embeddings", "breaker_failures", 0, "0 is out of range"),
        ("embeddings", "breaker_probe_s", 0.0, "0 is out of range"),
        ("embeddings", "dimensions", 0, "0 is out of range"),
        ("upload", "url", "ftp://target/", "does not begin with http:// or https://"),
        ("upload", "url", "http://", "names no host and port"),
        ("upload", "url", "http://target:0/", "names no host and port"),
        ("upload", "url", "http://a..b/", "names a host that can never be looked up"),
        ("upload", "url", "http://target:99999/", "is no URL"),
        ("upload", "url", "http://tar get/", "holds characters that a URL cannot have"),
        ("upload", "url", "http://target/#part", "has a fragment"),
        ("upload", "accepted", 409, "409 is a whole number"),
    ],
)
def test_a_value_of_the_wrong_sort_or_out_of_range_is_one_fault(
    file: Path, table: str, key: str, value: object, wrong: str
) -> None:
    (fault,) = faults_in(file, **{table: {key: value}})

    assert fault.startswith(f"{table}.{key}: {wrong}; expected ")


def test_each_wrong_entry_of_a_list_is_a_fault_of_its_own(file: Path) -> None:
    faults = faults_in(
        file,
        kafka={"topics": ["good", "not good", 7, "good"]},
        embeddings={"urls": ["http://host/v1?key=1"]},
        upload={"accepted": [409, 200, 409, "x"]},
    )

    name = "expected a topic's name (letters, digits, '.', '_', '-'; at most 249)"
    assert faults == [
        f'kafka.topics[1]: "not good" is not of this form; {name}',
        f"kafka.topics[2]: 7 is a whole number; {name}",
        "embeddings.urls[0]: has a query; expected an http or https URL without credentials and query",
        "upload.accepted[1]: 200 is out of range; expected an HTTP status code >= 400 and <= 599",
        'upload.accepted[3]: "x" is a string; expected an HTTP status code >= 400 and <= 599',
    ]


def test_an_entry_that_stands_in_a_list_twice_is_a_fault(file: Path) -> None:
    (fault,) = faults_in(file, kafka={"topics": ["a", "b", "a"]})

    assert fault == (
        "kafka.topics[2]: stands in the list twice; expected a list of different topics, at least one"
    )


def test_librdkafkas_keys_are_single_values_and_never_commit_by_themselves(file: Path) -> None:
    faults = faults_in(
        file,
        kafka={
            "options": {
                "client.id": "x",
                "linger.ms": [1],
                "enable.auto.commit": True,
                "queued.max.messages.kbytes": 2**64,
                "enable.auto.offset.store": False,
            }
        },
    )

    left_out = "that it is left out: offsets are committed only after their batch is accounted for"
    assert faults == [
        'kafka.options."linger.ms": is a list; expected a string, number or boolean',
        f'kafka.options."enable.auto.commit": cannot be set; expected {left_out}',
        (
            'kafka.options."queued.max.messages.kbytes": an integer beyond 64 bits is a whole number;'
            " expected a string, number or boolean"
        ),
        f'kafka.options."enable.auto.offset.store": cannot be set; expected {left_out}',
    ]


@pytest.mark.parametrize(
    ("tables", "fault"),
    [
        (
            {"stations": {"queue_capacity": 63}},
            (
                "stations.queue_capacity: 63 is less than batch.max_in_flight (64);"
                " expected at least 64: each open batch may queue one job"
            ),
        ),
        (
            {"batch": {"max_in_flight_bytes": 1000}},
            (
                "batch.max_in_flight_bytes: 1000 is less than limits.message_bytes (1048576);"
                " expected at least 1048576: the largest message must fit"
            ),
        ),
        (
            {"limits": {"report_bytes": 1000}},
            (
                "limits.report_bytes: 1000 is less than limits.result_bytes (1048576);"
                " expected at least 1048576: the largest result must fit"
            ),
        ),
        (
            {"batcher": {"min_batch_rows": 33}},
            (
                "batcher.max_batch_rows: 32 is less than batcher.min_batch_rows (33);"
                " expected at least 33: a call has both bounds"
            ),
        ),
        (
            {"batcher": {"max_wait_s": 0.1}},
            (
                "batcher.hard_timeout_s: 0.05 is less than batcher.max_wait_s (0.1);"
                " expected at least 0.1: both count from a row's arrival"
            ),
        ),
        (
            {"batcher": {"max_queue_rows": 31}},
            (
                "batcher.max_queue_rows: 31 is less than batcher.max_batch_rows (32);"
                " expected at least 32: a full call must fit"
            ),
        ),
        (
            {"batcher": {"max_queue_bytes": 1}},
            (
                "batcher.max_queue_bytes: 1 is less than batcher.max_batch_bytes (1048576);"
                " expected at least 1048576: a full call must fit"
            ),
        ),
        (
            {"upload": {"timeout_s": 9}},
            (
                "upload.timeout_s: 9 is less than upload.attempt_timeout_s (10);"
                " expected at least 10: one attempt must fit"
            ),
        ),
        (
            {"stations": {"idle_s": 30, "breaker_probe_s": 31}},
            (
                "stations.idle_s: 30 is less than stations.breaker_probe_s (31);"
                " expected at least 31: else it is forgotten before it is tried"
            ),
        ),
        (
            {"stations": {"idle_s": 20}},
            (
                "stations.idle_s: 20 is too short; expected more than 20, batch.deadline_s +"
                " shutdown.grace_s: a station with work must not count as idle"
            ),
        ),
        (
            {"kafka": {"group_protocol": "consumer", "session_timeout_s": 6}},
            (
                'kafka.session_timeout_s: cannot be set with kafka.group_protocol = "consumer";'
                " expected that it is left out: the broker decides"
            ),
        ),
        (
            {"dead_letters": {"kind": "kafka"}},
            'dead_letters.topic: is missing; expected a topic: dead_letters.kind is "kafka"',
        ),
        (
            {"dead_letters": {"kind": "kafka", "topic": "stations"}},
            (
                "dead_letters.topic: is one of kafka.topics;"
                " expected another: dead letters would be read again"
            ),
        ),
        (
            {
                "source": {"kind": "file"},
                "file": {"path": "x"},
                "dead_letters": {"kind": "kafka", "topic": "dead"},
            },
            'dead_letters.kind: is "kafka"; expected "sqlite" with a file source',
        ),
    ],
)
def test_values_that_contradict_each_other_are_one_fault(
    file: Path, tables: dict[str, object], fault: str
) -> None:
    assert faults_in(file, **tables) == [fault]


def test_what_holds_for_stations_reaches_the_pipeline(file: Path) -> None:
    settings = pipeline_settings(load(file))
    assert (settings.job_timeout_s, settings.breaker_failures, settings.breaker_probe_s) == (
        None,
        3,
        10.0,
    )
    told = ("job_timeout_s=2", "breaker_failures=0", "breaker_probe_s=0.5")
    settings = pipeline_settings(load(file, *(f"stations.{one}" for one in told)))
    assert (settings.job_timeout_s, settings.breaker_failures, settings.breaker_probe_s) == (
        2.0,
        0,
        0.5,
    )


def test_the_bounds_between_keys_are_inclusive(file: Path) -> None:
    config = load(
        file,
        "stations.queue_capacity=1",
        "batch.max_in_flight=1",
        "batcher.min_batch_rows=32",
        "batcher.max_queue_rows=32",
        "batcher.max_wait_s=0.05",
        "upload.timeout_s=10",
        "stations.idle_s=20.1",
        "kafka.group_protocol=consumer",
    )

    assert config.batcher.hard_timeout_s == config.batcher.max_wait_s


def test_faults_of_keys_and_faults_between_keys_come_together_but_no_key_is_blamed_twice(
    file: Path,
) -> None:
    faults = faults_in(
        file, batcher={"max_wait_s": -1, "hard_timeout_s": 1, "min_batch_rows": 40}, batch={"by": 1}
    )

    assert [fault.split(":")[0] for fault in faults] == [
        "batch.by",
        "batcher.max_wait_s",
        "batcher.max_batch_rows",
    ]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (
            'source.kind = "kafka"',
            [
                "kafka.bootstrap_servers",
                "kafka.group_id",
                "kafka.topics",
                "embeddings.urls",
                "embeddings.model",
                "upload.url",
            ],
        ),
        (
            'source.kind = "file"\nstations.handler = "a:b"\nupload.url = "http://h"',
            ["file.path"],
        ),
        ("", ["source.kind", "embeddings.urls", "embeddings.model", "upload.url"]),
    ],
)
def test_tables_that_are_needed_but_absent_are_told_by_their_keys(
    file: Path, text: str, missing: list[str]
) -> None:
    file.write_text(text)

    faults = faults_of(file)

    assert [fault.split(":")[0] for fault in faults] == missing
    assert all(": is missing; expected " in fault for fault in faults)


def test_unknown_tables_and_tables_that_are_none_are_faults(file: Path) -> None:
    faults = faults_in(
        file, batch=3, stations=[1], uploads={"url": "x"}, **{"a\nb": 1, "log": {"x y": 1}}
    )

    names = ", ".join(TABLES)
    assert faults == [
        f"uploads: is unknown (did you mean upload?); expected one of {names}",
        f'"a\\u000ab": is unknown; expected one of {names}',
        "batch: 3 is a whole number; expected a table [batch]",
        "stations: is a list; expected a table [stations]",
        'log."x y": is unknown; expected one of level, format',
    ]


def test_options_may_nest_but_not_without_end(file: Path) -> None:
    deep: object = 1
    for _ in range(31):
        deep = [deep]
    config = load_tree(file, {**REQUIRED, "stations": {"options": {"deep": deep}}})
    assert config.stations.options == {"deep": deep}

    (fault,) = faults_in(file, stations={"options": {"deep": [deep]}})

    assert fault == (
        "stations.options: is nested deeper than 32; expected a table, nested at most 32 deep"
    )


# -------------------------------------------------------------------------------------------------- unreadable files


def test_a_missing_file_is_one_fault_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"

    assert faults_of(path) == [
        f"{path}: cannot be read (No such file or directory); expected a TOML file"
    ]


def test_a_folder_or_an_impossible_name_is_one_fault(tmp_path: Path) -> None:
    assert faults_of(tmp_path) == [
        f"{tmp_path}: cannot be read (Is a directory); expected a TOML file"
    ]
    assert faults_of(Path("a\0\nb")) == [
        "a\\u0000\\u000ab: is not the name of a file; expected a TOML file"
    ]


@pytest.mark.parametrize(
    ("raw", "wrong"),
    [
        (b"[source]\nkind 3\n", "line 2, column 6: Expected '=' after a key in a key/value pair"),
        (b"[source]\nkind = '''\n\n", "line 2 (the end): Expected \"'''\""),
        (b"[source]\n# \xff\n", "line 2 is not UTF-8"),
        (b"\xef\xbb\xbf[source]\n", "line 1, column 1: Invalid statement"),
        (b"#" * 1_048_577, "has more than 1048576 bytes"),
        (
            b"x = " + b"[" * 100_000,
            "holds a number too long, or a value nested too deeply, to be read",
        ),
        (
            b"x = " + b"1" * 5_000,
            "holds a number too long, or a value nested too deeply, to be read",
        ),
    ],
)
def test_a_broken_file_is_one_fault_with_its_line(file: Path, raw: bytes, wrong: str) -> None:
    file.write_bytes(raw)

    assert faults_of(file) == [f"{file}: {wrong}; expected a TOML file"]


def test_one_line_of_dotted_keys_that_nests_thousands_of_tables_is_a_fault_not_a_crash(
    file: Path,
) -> None:
    file.write_text(f"{MINIMAL}\n[stations.options]\n{'.'.join(['a'] * 5_000)} = 1\n")

    (fault,) = faults_of(file)

    assert fault.startswith("stations.options: is nested deeper than 32")


# --------------------------------------------------------------------------------------- environment and command line


def test_the_environment_overrides_the_file_and_set_overrides_both(file: Path) -> None:
    environ = {
        "STATIONMASTER_UPLOAD__TIMEOUT_S": "30",
        "STATIONMASTER_BATCH__DEADLINE_S": "2.5",
        "STATIONMASTER_KAFKA__TOPICS": '["a", "b"]',
        "STATIONMASTER_LOG__LEVEL": "debug",
        "STATIONMASTER_UPLOAD__EMPTY": "true",
        "PATH": "/bin",
    }

    config = load(file, "batch.deadline_s=1", 'upload.url="http://other/x"', **environ)

    assert config.upload.timeout_s == 30.0
    assert config.batch.deadline_s == 1.0
    assert config.kafka is not None
    assert config.kafka.topics == ("a", "b")
    assert config.log.level == "debug"
    assert config.upload.empty is True
    assert config.upload.url == "http://other/x"


@pytest.mark.parametrize("text", ["7", "true", "1.5", "2026-01-02", "[x]", "a=b", "a # b"])
def test_a_key_that_is_a_text_takes_what_stands_there(file: Path, text: str) -> None:
    kafka = load(file, f"kafka.group_id={text}").kafka

    assert kafka is not None
    assert kafka.group_id == text


def test_the_last_set_of_a_key_counts(file: Path) -> None:
    assert load(file, "batch.quorum=0.5", " batch.quorum = 0.7 ").batch.quorum == 0.7


def test_a_table_adds_to_the_files_table_and_needs_none(file: Path) -> None:
    file.write_text(f'{MINIMAL}\n[kafka.options]\n"client.id" = "x"\n"linger.ms" = 1\n')

    config = load(
        file, 'kafka.options={ "linger.ms" = 2, debug = "cgrp" }', "stations.options={ n = 1 }"
    )

    assert config.kafka is not None
    assert config.kafka.options == {"client.id": "x", "linger.ms": 2, "debug": "cgrp"}
    assert config.stations.options == {"n": 1}


def test_faults_name_an_origin_that_is_not_the_file(file: Path) -> None:
    seconds = "expected a number of seconds > 0 and <= 86400"

    assert faults_of(
        file,
        "batch.deadline_s=soon",
        "upload.timeout_s=1",
        STATIONMASTER_UPLOAD__ATTEMPT_TIMEOUT_S="20",
        STATIONMASTER_EMBEDDINGS__TIMEOUT_S="1\n[x]\ny = 1",
    ) == [
        f'batch.deadline_s: "soon" is a string; {seconds} (from --set batch.deadline_s)',
        (
            f'embeddings.timeout_s: "1\\u000a[x]\\u000ay = 1" is a string; {seconds}'
            " (from environment STATIONMASTER_EMBEDDINGS__TIMEOUT_S)"
        ),
        (
            "upload.timeout_s: 1 is less than upload.attempt_timeout_s (20);"
            " expected at least 20: one attempt must fit"
            " (from --set upload.timeout_s, environment STATIONMASTER_UPLOAD__ATTEMPT_TIMEOUT_S)"
        ),
    ]


def test_overrides_of_nothing_that_exists_are_faults(file: Path) -> None:
    keys = (
        "by, deadline_s, high_priority_deadline_s, quorum, max_in_flight, max_in_flight_bytes, "
        "max_parked_bytes"
    )
    tables = ", ".join(TABLES)

    assert faults_of(
        file,
        "batch.deadline_s",
        "batch=1",
        "btach.quorum=1",
        "=1",
        "a\n.b=1",
        STATIONMASTER_BATCH__DEADLINE="1",
    ) == [
        (
            f"batch.deadline: is unknown (did you mean deadline_s?); expected one of {keys}"
            " (from environment STATIONMASTER_BATCH__DEADLINE)"
        ),
        "--set batch.deadline_s: has no value; expected table.key=value",
        f"batch: is unknown; expected one of {keys} (from --set batch)",
        (
            f"btach.quorum: is unknown (did you mean batch?); expected one of {tables}"
            " (from --set btach.quorum)"
        ),
        f": is unknown; expected one of {tables} (from --set )",
        f"a\\u000a.b: is unknown; expected one of {tables} (from --set a\\u000a.b)",
    ]


def test_names_of_the_environment_without_a_double_underscore_are_not_ours(file: Path) -> None:
    config = load(file, STATIONMASTER_PORT="tcp://10.0.0.1:80", STATIONMASTER_SERVICE_HOST="x")

    assert render(config) == render(load(file))


def test_an_override_that_is_not_utf8_is_a_fault(file: Path) -> None:
    (fault,) = faults_of(file, STATIONMASTER_STATIONS__OPTIONS='{ a = "\udcff" }')

    assert fault.startswith("stations.options: is not UTF-8; expected a table")


def test_an_override_into_a_table_that_is_none_leaves_the_files_fault(file: Path) -> None:
    file.write_text(f"log = 1\n{MINIMAL}")

    assert faults_of(file, "log.level=debug") == [
        "log: 1 is a whole number; expected a table [log]"
    ]


# ----------------------------------------------------------------------------------------------------------- secrets


def test_a_secret_comes_from_its_file_stripped(file: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("  k-123\n")

    config = load(file, f"embeddings.key_file={key}")

    assert secrets_of(config) == ("k-123", None)


def test_the_password_of_kafka_comes_from_its_file_and_reaches_the_client(
    file: Path, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.write_text("hush-789\n")

    config = load(
        file,
        "kafka.security_protocol=sasl_plaintext",
        "kafka.sasl_mechanism=SCRAM-SHA-512",
        "kafka.username=me",
        f"kafka.password_file={password}",
    )

    assert "hush" not in repr(config) + render(config)
    assert config.kafka is not None
    assert kafka_settings(config.kafka).password == "hush-789"


def test_what_only_the_kafka_client_knows_of_its_settings_is_checked_with_the_others(
    file: Path,
) -> None:
    config = load(file, "kafka.security_protocol=sasl_ssl")

    with pytest.raises(ConfigError) as caught:
        check_settings(config)

    assert all(fault.startswith("kafka.") for fault in caught.value.faults)


def test_a_secret_of_the_environment_is_stronger_than_its_file(file: Path, tmp_path: Path) -> None:
    config = load(
        file, f"upload.token_file={tmp_path / 'absent'}", STATIONMASTER_UPLOAD__TOKEN="t-456"
    )

    assert secrets_of(config) == (None, "t-456")


def test_a_secret_alone_makes_no_table(file: Path) -> None:
    file.write_text(
        'source.kind = "file"\nfile.path = "x"\nstations.handler = "a:b"\nupload.url = "http://h"'
    )

    assert load(file, STATIONMASTER_EMBEDDINGS__KEY="left over").embeddings is None


def test_secrets_are_never_shown(file: Path) -> None:
    config = load(
        file,
        STATIONMASTER_UPLOAD__TOKEN="t-456",
        STATIONMASTER_EMBEDDINGS__KEY="k-123",
        STATIONMASTER_KAFKA__OPTIONS='{ "sasl.password" = "p-789", "client.id" = "x" }',
        STATIONMASTER_STATIONS__OPTIONS='{ api_key = "a-000" }',
    )

    for text in (
        repr(config),
        str(config.upload.token),
        f"{config.upload.token}",
        render(config),
        str(attrs.asdict(config.upload)),
    ):
        assert not re.search("t-456|k-123|p-789|a-000", text)
    assert config.kafka is not None
    assert config.kafka.options["sasl.password"] == "p-789"
    assert "# token is set, and hidden" in render(config)
    assert '# options."sasl.password" is set, and hidden' in render(config)
    assert "# options.api_key is set, and hidden" in render(config)


def test_a_secret_in_the_file_or_on_the_command_line_is_refused_with_a_hint_and_not_repeated(
    file: Path,
) -> None:
    file.write_text(
        f'{MINIMAL}token = "hush-1"\n[kafka.options]\n"sasl.password" = "hush-2"\n"client.id" = "x"\n'
    )

    faults = faults_of(
        file,
        "embeddings.key=hush-3",
        'kafka.options={ "ssl.key.password" = "hush-4" }',
        STATIONMASTER_UPLOAD__TOKEN="hush-5",
    )

    wrong = "is a secret, which must stand neither in the configuration file nor on a command line"
    options = "it in the environment variable STATIONMASTER_KAFKA__OPTIONS, whose table adds to the file's"
    assert faults == [
        f'kafka.options."sasl.password": {wrong}; expected {options}',
        (
            f"embeddings.key: {wrong}; expected embeddings.key_file, the path of a file that holds it,"
            " or the environment variable STATIONMASTER_EMBEDDINGS__KEY (from --set embeddings.key)"
        ),
        f'kafka.options."ssl.key.password": {wrong}; expected {options} (from --set kafka.options)',
        (
            f"upload.token: {wrong}; expected upload.token_file, the path of a file that holds it,"
            " or the environment variable STATIONMASTER_UPLOAD__TOKEN"
        ),
    ]


@pytest.mark.parametrize("content", [b"", b" \n", b"a b", b"a\nb", b"\xff\xfe", b"x" * 20_000])
def test_a_secret_that_cannot_be_sent_is_a_fault_and_not_repeated(
    file: Path, tmp_path: Path, content: bytes
) -> None:
    token = tmp_path / "token"
    token.write_bytes(content)

    assert faults_of(file, f"upload.token_file={token}") == [
        (
            "upload.token_file: holds no secret that could be sent; expected up to 16384 printable ASCII"
            " characters without spaces (from --set upload.token_file)"
        )
    ]


def test_a_secret_file_that_is_absent_is_a_fault_without_its_name(file: Path) -> None:
    (fault,) = faults_of(file, "upload.token_file=somebody-put-the-token-here")

    assert fault == (
        "upload.token_file: cannot be read (No such file or directory);"
        " expected a file that holds the secret (from --set upload.token_file)"
    )


def test_an_empty_secret_of_the_environment_is_a_fault(file: Path) -> None:
    (fault,) = faults_of(file, STATIONMASTER_UPLOAD__TOKEN="")

    assert fault.startswith("upload.token: holds no secret that could be sent; ")
    assert fault.endswith("(from environment STATIONMASTER_UPLOAD__TOKEN)")


@pytest.mark.parametrize(
    "url", ["http://user:hush@target/", "https://hush@target/", "http:hush@target", "http://[hush"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(file: Path, url: str) -> None:
    (fault,) = faults_in(file, upload={"url": url})

    assert fault.startswith("upload.url: ")
    assert "hush" not in fault


# ---------------------------------------------------------------------------------------------------------------- web


def test_without_a_web_table_there_is_none_and_with_one_it_has_defaults(file: Path) -> None:
    assert load(file).web is None
    web = load(file, "web.port=8081").web
    assert web is not None
    assert (web.host, web.port, web.token) == ("127.0.0.1", 8081, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "::1", "127.9.9.9"])
def test_loopback_needs_no_token(file: Path, host: str) -> None:
    web = load(file, f"web.host={host}").web
    assert web is not None
    assert web.host == host


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"]
)
def test_any_other_address_needs_one(file: Path, tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, f"web.host={host}")
    [fault] = caught.value.faults
    assert fault.startswith("web.token_file: is missing, and web.host (")
    assert "(from --set web.host)" in fault

    token = tmp_path / "token"
    token.write_text("hush-hush\n")
    web = load(file, f"web.host={host}", f"web.token_file={token}").web
    assert web is not None
    assert web.token is not None
    assert web.token.reveal() == "hush-hush"


@pytest.mark.parametrize("host", ["", "a b", "http://x", "[::1]", "a/b", "x" * 300])
def test_a_host_that_is_none_is_a_fault(file: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"web\.host"):
        load(file, f"web.host={host!r}")


@pytest.mark.parametrize("port", ["-1", "65536", "'80'", "true"])
def test_a_port_that_is_none_is_a_fault(file: Path, port: str) -> None:
    with pytest.raises(ConfigError, match=r"web\.port: .*a TCP port"):
        load(file, f"web.port={port}")


# ---------------------------------------------------------------------------------------------------------- rendering


def test_what_is_rendered_loads_again_to_the_same_configuration(file: Path, tmp_path: Path) -> None:
    file.write_text((CONFIG / "stationmaster.toml").read_text())
    original = load(
        file,
        'kafka.options={ "client.id" = "q\\"\\\\\\u0000\\U0001F600 ü", "linger.ms" = 5, on = true, r = 0.5 }',
        "stations.options={ a = [1, { b = [] }], t = 07:32:00, d = 1979-05-27T07:32:00Z, e = {} }",
        "batch.quorum=0.1",
        "upload.accepted=[409, 410]",
        "kafka.instance_id=7",
    )
    again = tmp_path / "again.toml"
    again.write_text(render(original))

    assert load(again) == original
    assert original.stations.options["t"] == time(7, 32)
    assert original.stations.options["d"] == datetime(1979, 5, 27, 7, 32, tzinfo=UTC)


def test_only_tables_that_are_there_are_rendered(file: Path) -> None:
    text = render(load(file))

    assert set(tomllib.loads(text)) == set(TABLES) - {"file", "topic", "tracing", "web"}


# ------------------------------------------------------------------------------------------------------ config/*.toml


def sample_keys() -> dict[str, dict[str, tuple[str, bool]]]:
    """The keys of stationmaster.toml: table -> key -> (value as written, whether it is commented out)."""
    keys: dict[str, dict[str, tuple[str, bool]]] = {}
    before = ""
    for line in (CONFIG / "stationmaster.toml").read_text().splitlines():
        if table := re.fullmatch(r"#?\[(\w+)\]|#\[\[(\w+)\]\]", line):
            keys[table[1] or table[2]] = {}
        elif key := re.fullmatch(r"(#?)(\w+) = (.+)", line):
            assert before.startswith("# "), f"{key[2]} has no line that says what it is for"
            keys[list(keys)[-1]][key[2]] = (key[3], key[1] == "#")
        before = line
    return keys


def test_the_sample_has_every_key_of_the_classes_and_no_other() -> None:
    assert {table: set(keys) for table, keys in sample_keys().items()} == {
        name: {key for key, described in table.keys.items() if not described.is_secret}
        for name, table in TABLES.items()
    }


def test_the_sample_has_the_defaults_of_the_classes() -> None:
    for name, table in TABLES.items():
        for key_name, (text, is_commented) in sample_keys()[name].items():
            default = table.keys[key_name].default
            if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
                default = default.factory()
            assert is_commented == (default is None or table.is_repeated or name == "tracing"), (
                f"{name}.{key_name}"
            )
            if key_name == "roster":
                continue  # an example: an empty one says nothing
            if default is not None and default is not attrs.NOTHING:
                value = tomllib.loads(f"value = {text}")["value"]
                assert value == (list(default) if isinstance(default, tuple) else default), key_name
                assert type(value) is not int or type(default) is int, f"{name}.{key_name}"


def test_the_sample_loads_and_so_it_does_with_every_key_uncommented(tmp_path: Path) -> None:
    text = (CONFIG / "stationmaster.toml").read_text()
    assert load(CONFIG / "stationmaster.toml").batch == BatchConfig()

    secret = tmp_path / "secret"
    secret.write_text("hush")
    every = tmp_path / "every.toml"
    uncommented = re.sub(r"(?m)^#(\w+ = |\[)", r"\1", text)
    every.write_text(re.sub(r'(_file = )".*"', rf'\1"{secret}"', uncommented))

    config = load(every)

    assert secrets_of(config) == ("hush", "hush")
    assert config.kafka is not None
    assert config.kafka.instance_id == "stationmaster-1"


def test_the_presets_of_the_sample_load(file: Path) -> None:
    text = (CONFIG / "stationmaster.toml").read_text()
    presets = re.split(r"(?m)^# +\d+ s  ", text[text.index("# Presets") :])[1:]

    deadlines = [
        load(file, *re.findall(r"\w+\.\w+ = [\d.]+", preset)).batch.deadline_s for preset in presets
    ]

    assert deadlines == [2.0, 5.0, 10.0]


def test_the_classic_dual_time_outs_load() -> None:
    config = load(CONFIG / "seed-compat.toml")

    assert config.batch.by == "poll"
    batcher = config.batcher
    assert (batcher.min_batch_rows, batcher.max_batch_rows) == (4, 16)
    assert (batcher.max_wait_s, batcher.hard_timeout_s) == (0.05, 0.25)
    assert batcher.send_when_idle is False
    assert batcher.max_queue_rows == 10 * batcher.max_batch_rows


# --------------------------------------------------------------------------------------------------------- properties

plain_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
table_names = st.sampled_from(list(TABLES)) | plain_texts
key_names = st.sampled_from([key for table in TABLES.values() for key in table.keys]) | plain_texts
scalars = (
    st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.integers(min_value=0, max_value=70)
    | st.floats()
    | plain_texts
    | st.sampled_from(["kafka", "file", "embed", "a:1", "http://h/v1", "json"])
    | st.datetimes(min_value=datetime(1900, 1, 1))  # noqa: DTZ001 - TOML has local times too
    | st.dates()
    | st.times()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_texts, inner, max_size=4),
    max_leaves=8,
)
trees = st.dictionaries(
    table_names, st.dictionaries(key_names, values, max_size=6) | values, max_size=6
)
any_texts = st.text(max_size=40)
a_few_files = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def outcome(path: Path, *overrides: str, **environ: str) -> Config | list[str]:
    try:
        return load(path, *overrides, **environ)
    except ConfigError as error:
        faults = list(error.faults)
    assert faults
    for fault in faults:
        assert fault.isprintable(), fault
        assert "; expected " in fault
    return faults


@given(tree=trees)
@a_few_files
def test_no_tree_raises_anything_but_faults_of_one_line(file: Path, tree: dict[str, Any]) -> None:
    text = "\n".join(f"{toml_text(key)} = {toml_text(value)}" for key, value in tree.items())
    file.write_text(text)

    outcome(file)


@given(
    tree=st.fixed_dictionaries(
        {}, optional={n: st.dictionaries(key_names, values, max_size=3) for n in TABLES}
    )
)
@a_few_files
def test_no_tree_over_a_good_one_raises_anything_but_faults_of_one_line(
    file: Path, tree: dict[str, Any]
) -> None:
    merged = {name: {**REQUIRED.get(name, {}), **tree.get(name, {})} for name in TABLES}
    file.write_text("\n".join(f"{name} = {toml_text(table)}" for name, table in merged.items()))

    result = outcome(file)

    if isinstance(result, Config):
        file.write_text(render(result))
        assert render(load(file)) == render(result)


@given(raw=st.binary(max_size=60) | any_texts.map(lambda text: text.encode(errors="replace")))
@a_few_files
def test_no_file_raises_anything_but_faults_of_one_line(file: Path, raw: bytes) -> None:
    file.write_bytes(raw)

    outcome(file)


@given(
    table=table_names,
    key=key_names,
    text=any_texts | scalars.map(toml_text),
    environ=st.dictionaries(st.tuples(table_names, key_names), any_texts, max_size=3),
)
@a_few_files
def test_no_override_raises_anything_but_faults_of_one_line(
    file: Path, table: str, key: str, text: str, environ: dict[tuple[str, str], str]
) -> None:
    file.write_text(MINIMAL)
    variables = {
        f"STATIONMASTER_{table.upper()}__{key.upper()}": value
        for (table, key), value in environ.items()
    }

    outcome(file, f"{table}.{key}={text}", text, **variables)


@given(value=values)
@a_few_files
def test_toml_is_written_as_it_is_read(value: object) -> None:
    text = toml_text(value)

    assert text.isprintable()
    assert toml_text(tomllib.loads(f"value = {text}")["value"]) == text


def test_long_texts_are_cut_in_messages() -> None:
    assert shown("x" * 61) == f'"{"x" * 60}"...'
    assert shown("x" * 60) == f'"{"x" * 60}"'


def test_a_secret_gives_its_text_only_when_asked() -> None:
    assert Secret("hush").reveal() == "hush"


def test_the_query_of_every_url_is_hidden(file: Path) -> None:
    config = load(
        file,
        STATIONMASTER_UPLOAD__URL="http://target/batches?sig=hush-1",
        STATIONMASTER_TRACING__ENDPOINT="http://collector:4318/v1/traces?key=hush-2",
    )
    text = render(config)

    assert "hush" not in text
    assert 'url = "http://target/batches"\n# the query of url is set, and hidden\n' in text
    assert (
        'endpoint = "http://collector:4318/v1/traces"\n# the query of endpoint is set, and hidden\n'
        in text
    )
