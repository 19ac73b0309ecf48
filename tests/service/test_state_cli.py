"""The operator's commands for outbox and dead letters, as an operator meets them."""

from __future__ import annotations

import base64
import fcntl
import json
import signal
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.kafka.deliveries import ACKNOWLEDGED, Delivery, Fate, Outgoing
from stationmaster.kafka.producing import KafkaProducer, open_producer
from stationmaster.service import requeue as requeue_module
from stationmaster.service.cli import run_command_line
from stationmaster.service.shutdown import EXIT_CONFIG, EXIT_CUT_SHORT, EXIT_OK, EXIT_USAGE
from stationmaster.state.inspection import StateFile, one_at_a_time
from tests.kafka.clients import free_port
from tests.kafka.topics import read_topic
from tests.state.files import add_batch, add_letter, connect, make_state_file, open_writer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.kafka_broker import KafkaBroker


@attrs.define(eq=False)
class Operator:
    """Somebody at a terminal beside a state file."""

    folder: Path
    _patch: pytest.MonkeyPatch
    _capture: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    @property
    def state(self) -> Path:
        return self.folder / "state.db"

    @property
    def config(self) -> Path:
        return self.folder / "stationmaster.toml"

    def configure(self, *, servers: str | None = None, more: str = "") -> None:
        """Write a configuration: with a Kafka source, or with a file as source."""
        source = f'kind = "file"\n[file]\npath = "{self.folder}/in.jsonl"'
        if servers is not None:
            source = (
                f'kind = "kafka"\n[kafka]\nbootstrap_servers = "{servers}"\ngroup_id = "g"\n'
                'topics = ["telemetry"]'
            )
        self.config.write_text(
            f'[source]\n{source}\n[stations]\nhandler = "m:h"\n'
            f'[upload]\nurl = "http://127.0.0.1:9/"\n[outbox]\npath = "{self.state}"\n{more}\n'
        )

    def runs(self, *words: str) -> int:
        """Run a command with this configuration; what it says is in `out` and `err`."""
        arguments = ["stationmaster", *words, "--config", str(self.config)]
        self._patch.setattr(sys, "argv", arguments)
        code = run_command_line()
        self.out, self.err = self._capture.readouterr()
        return code

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    def batches(self) -> list[tuple[Any, ...]]:
        with connect(self.state) as db:
            return db.execute("SELECT batch_id, next_try FROM outbox ORDER BY seq").fetchall()

    def offsets(self) -> list[int]:
        with connect(self.state) as db:
            return [row[0] for row in db.execute('SELECT "offset" FROM dead_letters ORDER BY seq')]


@pytest.fixture
def operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Operator:
    operator = Operator(tmp_path, monkeypatch, capsys)
    make_state_file(operator.state)
    operator.configure()
    return operator


# ------------------------------------------------------------------------------------------------------------- outbox


BEYOND_64_BITS = '[{"partition": 0, "first": 7, "last": 18446744073709551616}]'


@pytest.mark.parametrize("ranges", ["", "{", "7", "[[0, 1]]", '[{"partition": 0}]', BEYOND_64_BITS])
@pytest.mark.parametrize("time", [-1e300, 1e300, float("inf")])
def test_a_row_that_nobody_understands_is_shown_as_far_as_it_can_be(
    operator: Operator, ranges: str, time: float
) -> None:
    with connect(operator.state) as db:
        add_batch(db, "b-1", ranges=ranges, kept_at=time, next_try=time)
        add_batch(db, "b-2")

    assert operator.runs("outbox", "list") == EXIT_OK
    assert "b-1" in operator.out
    assert "0:1-2" in operator.out
    assert operator.runs("outbox", "list", "--json") == EXIT_OK
    assert [line["batchId"] for line in operator.lines] == ["b-1", "b-2"]
    assert operator.runs("outbox", "export") == EXIT_OK
    assert [line["batchId"] for line in operator.lines] == ["b-1", "b-2"]


@pytest.mark.parametrize("command", ["outbox list", "outbox retry", "dead-letters list"])
def test_who_may_not_read_the_services_secrets_can_look_at_its_state(
    operator: Operator, command: str
) -> None:
    operator.config.write_text(
        operator.config.read_text().replace(
            "[upload]\n", '[upload]\ntoken_file = "/nobody/may/read/this"\n'
        )
    )
    assert operator.runs(*command.split()) == EXIT_OK


def test_an_empty_outbox_is_a_heading_and_a_total(operator: Operator) -> None:
    assert operator.runs("outbox", "list") == EXIT_OK
    heading, total = operator.out.splitlines()
    assert heading.startswith("batch ")
    assert total == "0 batches, 0 bytes"


def test_the_outbox_is_listed_with_a_total(operator: Operator) -> None:
    ranges = json.dumps([{"partition": p, "first": p, "last": p + 1} for p in range(5)])
    with connect(operator.state) as db:
        add_batch(db, "t_0_1_5", body=b"x" * 1500, attempts=2, next_try=4e9, last_error="50\x1b3")
        add_batch(db, "t_0_2_5", ranges=ranges, kept_at=1_600_000_000.0)

    assert operator.runs("outbox", "list") == EXIT_OK
    _, first, second, total = operator.out.splitlines()
    assert first.split() == [
        *("t_0_1_5", "telemetry", "0:1-2", "1,500", "2023-11-14T22:13:20Z", "2"),
        *("2096-10-02T07:06:40Z", "50\\u001b3"),
    ]
    assert " 0:0-1,1:1-2,2:2-3,+2 " in second
    assert " now" in second
    assert total == "2 batches, 1,502 bytes, the oldest since 2020-09-13T12:26:40Z"


def test_the_outbox_is_listed_as_json_lines(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_batch(db, "b-1", attempts=2, next_try=4e9, last_error="503")

    assert operator.runs("outbox", "list", "--json") == EXIT_OK
    assert operator.lines == [
        {
            "batchId": "b-1",
            "topic": "telemetry",
            "ranges": [{"partition": 0, "first": 1, "last": 2}],
            "attempts": 2,
            "nextTry": "2096-10-02T07:06:40Z",
            "lastError": "503",
            "bytes": 2,
            "keptAt": "2023-11-14T22:13:20Z",
        }
    ]


def test_exported_batches_carry_their_body_as_json(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_batch(db, "b-1", body=b'{"results":[{"stationId":"S1"}]}')
        add_batch(db, "b-2")

    assert operator.runs("outbox", "export") == EXIT_OK
    first, second = operator.lines
    assert list(first) == ["batchId", "topic", "ranges", "attempts", "nextTry", "lastError", "body"]
    assert (first["nextTry"], first["body"]) == (None, {"results": [{"stationId": "S1"}]})
    assert second["batchId"] == "b-2"


@pytest.mark.parametrize(
    ("command", "reads", "table"),
    [("outbox", "body", "outbox"), ("dead-letters", "value", "dead_letters")],
)
def test_what_left_during_an_export_is_passed_over(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, command: str, reads: str, table: str
) -> None:
    with connect(operator.state) as db:
        for number in (1, 2):
            add_batch(db, f"b-{number}")
            add_letter(db, offset=number)
    read = getattr(StateFile, reads)

    def read_too_late(state: StateFile, seq: int) -> Any:
        if seq == 1:
            with connect(operator.state) as db:
                db.execute(f"DELETE FROM {table} WHERE seq = 1")
        return read(state, seq)

    monkeypatch.setattr(StateFile, reads, read_too_late)

    assert operator.runs(command, "export") == EXIT_OK
    assert len(operator.lines) == 1


def test_retry_makes_all_due_and_says_that_no_service_runs(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_batch(db, "b-1", next_try=4e9)
        add_batch(db, "b-2", next_try=4e9)

    assert operator.runs("outbox", "retry") == EXIT_OK
    assert operator.out == "2 batches are due now\n"
    assert "no service uses" in operator.err
    assert operator.batches() == [("b-1", 0.0), ("b-2", 0.0)]


def test_retry_of_one_batch_leaves_the_others_and_names_what_is_not_there(
    operator: Operator,
) -> None:
    with connect(operator.state) as db:
        add_batch(db, "b-1", next_try=4e9)
        add_batch(db, "b-2", next_try=4e9)

    with (operator.folder / "state.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a service runs
        assert operator.runs("outbox", "retry", "b-2", "b-9") == EXIT_CUT_SHORT

    assert operator.out == "1 batch is due now\n"
    assert operator.err == "stationmaster: b-9 is not in the outbox\n"
    assert operator.batches() == [("b-1", 4e9), ("b-2", 0.0)]


# -------------------------------------------------------------------------------------------------------- state files


@pytest.mark.parametrize(
    "words", [("outbox", "list"), ("dead-letters", "export"), ("dead-letters", "requeue", "--all")]
)
def test_a_missing_state_file_is_a_fault_of_configuration(
    operator: Operator, words: tuple[str, ...]
) -> None:
    operator.state.unlink()

    assert operator.runs(*words) == EXIT_CONFIG
    assert operator.err.startswith(f"outbox.path: {operator.state} cannot be opened")
    assert not operator.state.exists()


def test_a_state_file_that_stays_busy_is_a_trouble_that_passes(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stationmaster.state.inspection.BUSY_S", 0.01)
    with connect(operator.state) as db:
        add_batch(db, "b-1", next_try=4e9)
        db.execute("BEGIN IMMEDIATE")
        code = operator.runs("outbox", "retry")
        db.execute("ROLLBACK")

    assert code == EXIT_CUT_SHORT
    assert "was busy" in operator.err


def test_a_reader_that_leaves_early_ends_an_export_quietly(operator: Operator) -> None:
    with connect(operator.state) as db:
        for number in range(2000):
            add_letter(db, offset=number, value=b"x" * 500)
    words = ("dead-letters", "export", "--config", str(operator.config))

    with subprocess.Popen(
        [sys.executable, "-m", "stationmaster", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["offset"] == 0
        process.stdout.close()
        said = process.stderr.read()

    assert (process.returncode, said) == (EXIT_OK, b"")


@pytest.mark.parametrize("command", ["export", "list"])
def test_output_that_finds_no_room_is_said_and_no_export_passes_for_whole(
    operator: Operator, command: str
) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=1)
    words = ("dead-letters", command, "--config", str(operator.config))

    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stationmaster", *words],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert done.returncode == EXIT_CUT_SHORT
    assert done.stderr == (
        "stationmaster: the output cannot be written (No space left on device)\n"
    )


# ------------------------------------------------------------------------------------------------------- dead letters


def test_dead_letters_are_listed_with_a_total(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=7, detail="line 1\nline 2")
        add_letter(
            db, offset=8, reason="rejected-upload", batch_id="b-1", value=b"{}", detail="422"
        )
        add_letter(db, offset=9, topic="other")

    assert operator.runs("dead-letters", "list", "--topic", "telemetry") == EXIT_OK
    heading, first, second, total = operator.out.splitlines()
    assert heading.split()[0] == "reason"
    assert "line 1\\u000aline 2" in first
    assert second.endswith("b-1: 422")
    assert total == "2 dead letters, 3 bytes, the oldest since 2023-11-14T22:13:21Z"


def test_no_dead_letters_are_a_heading_and_a_total(operator: Operator) -> None:
    assert operator.runs("dead-letters", "list") == EXIT_OK
    assert operator.out.splitlines()[1:] == ["0 dead letters, 0 bytes"]


def test_exported_dead_letters_are_whole(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=7, value=b"\xff\x00", headers=(("a", "Zm9v"), ("b", None)))
        add_letter(db, offset=8, reason="empty-value", value=None)
        add_letter(db, offset=9, reason="rejected-upload", batch_id="b-1", value=b"{}")

    assert operator.runs("dead-letters", "export") == EXIT_OK
    record, tombstone, upload = operator.lines
    assert record == {
        "topic": "telemetry",
        "partition": 0,
        "offset": 7,
        "timestamp": 1_700_000_000_123,
        "reason": "invalid-json",
        "detail": "not JSON",
        "headers": [["a", "Zm9v"], ["b", None]],
        "valueBase64": base64.b64encode(b"\xff\x00").decode(),
    }
    assert tombstone["valueBase64"] is None
    assert upload["batchId"] == "b-1"

    assert operator.runs("dead-letters", "export", "--reason", "empty-value") == EXIT_OK
    assert [line["offset"] for line in operator.lines] == [8]


@pytest.mark.parametrize("command", [("list",), ("export",), ("requeue", "--all")])
def test_dead_letters_on_a_topic_are_left_to_the_tools_of_kafka(
    operator: Operator, command: tuple[str, ...]
) -> None:
    more = '[dead_letters]\nkind = "kafka"\ntopic = "the-dead"'
    operator.configure(servers="127.0.0.1:9", more=more)

    assert operator.runs("dead-letters", *command) == EXIT_USAGE
    assert "the Kafka topic the-dead" in operator.err
    assert "kafka-console-consumer" in operator.err


# ------------------------------------------------------------------------------------------------------------ requeue


def test_requeue_wants_to_know_which(operator: Operator) -> None:
    assert operator.runs("dead-letters", "requeue") == EXIT_USAGE
    assert "--all" in operator.err


def test_requeued_records_are_in_their_topic_and_no_dead_letters_any_more(
    operator: Operator, kafka_broker: KafkaBroker
) -> None:
    topic = kafka_broker.create_topic()
    operator.configure(servers=kafka_broker.bootstrap_servers)
    headers = (("trace", "Zm9v"), ("stationmaster-requeued-from", "b2xk"))
    with connect(operator.state) as db:
        add_letter(db, offset=7, topic=topic, partition=2, value=b"one", headers=headers)
        add_letter(db, offset=8, topic=topic, partition=9, value=None)  # that partition is gone
        add_letter(db, offset=9, topic="gone-topic")
        add_letter(db, offset=10, reason="rejected-upload", batch_id="b-1", value=b"{}")

    assert operator.runs("dead-letters", "requeue", "--all") == EXIT_CUT_SHORT
    assert operator.out == "2 records produced to their topics, 1 upload in the outbox\n"
    assert "1 stay: the topic gone-topic does not exist" in operator.err
    assert "no service uses" in operator.err
    assert operator.offsets() == [9]
    assert operator.batches() == [("b-1", 0.0)]
    records = {record.value(): record for record in read_topic(kafka_broker, topic)}
    one = records[b"one"]
    assert (one.partition(), one.key()) == (2, None)
    assert one.headers() == [
        ("trace", b"foo"),
        ("stationmaster-requeued-from", f"{topic}/2/7".encode()),
    ]
    assert records[None].headers() == [("stationmaster-requeued-from", f"{topic}/9/8".encode())]


def test_rejected_uploads_can_be_moved_into_a_file_of_their_own(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=1)
        add_letter(db, offset=2, reason="rejected-upload", batch_id="b-1", value=b'{"a":1}')
    file = operator.folder / "bodies.jsonl"

    assert operator.runs("dead-letters", "requeue", "--all", "--to", str(file)) == EXIT_USAGE
    assert "move the bodies first, with --reason rejected-upload" in operator.err
    words = ("--reason", "rejected-upload", "--to", str(file))
    assert operator.runs("dead-letters", "requeue", *words) == EXIT_OK

    assert file.read_bytes() == b'{"a":1}\n'
    assert (operator.offsets(), operator.batches()) == ([1], [])


def test_a_letter_whose_batch_the_outbox_still_holds_stays_and_is_counted(
    operator: Operator,
) -> None:
    with connect(operator.state) as db:
        add_batch(db, "b-1")
        add_letter(db, offset=2, reason="rejected-upload", batch_id="b-1", value=b"{}")

    assert operator.runs("dead-letters", "requeue", "--all") == EXIT_CUT_SHORT
    assert "1 stay: the outbox still holds this batch" in operator.err
    assert operator.offsets() == [2]


def test_a_limit_takes_the_oldest(operator: Operator, kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    operator.configure(servers=kafka_broker.bootstrap_servers)
    with connect(operator.state) as db:
        for number in range(5):
            add_letter(db, offset=number, topic=topic)

    assert operator.runs("dead-letters", "requeue", "--limit", "3") == EXIT_OK
    assert operator.out.startswith("3 records produced")
    assert operator.offsets() == [3, 4]


def test_a_dry_run_only_says_what_would_be_done(operator: Operator) -> None:
    operator.configure(servers=f"127.0.0.1:{free_port()}")
    with connect(operator.state) as db:
        add_letter(db, offset=1)
        add_letter(db, offset=2)
        add_letter(db, offset=3, reason="rejected-upload", batch_id="b-1", value=b"{}")

    assert operator.runs("dead-letters", "requeue", "--limit", "2", "--dry-run") == EXIT_OK
    assert operator.out.splitlines() == [
        "invalid-json, telemetry: 2 dead letters, 2 bytes, to be produced to its topic",
        "rejected-upload, telemetry: 1 dead letter, 2 bytes, to be put into the outbox",
        "3 dead letters fit, the oldest 2 of them",
    ]
    words = ("--dry-run", "--reason", "invalid-json", "--to", "x.jsonl")
    assert operator.runs("dead-letters", "requeue", *words) == EXIT_OK
    assert operator.out.splitlines() == [
        "invalid-json, telemetry: 2 dead letters, 2 bytes, to be appended to x.jsonl",
        "2 dead letters fit",
    ]
    assert operator.offsets() == [1, 2, 3]


def test_brokers_that_are_away_leave_every_letter_where_it_is(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.configure(servers=f"127.0.0.1:{free_port()}")
    monkeypatch.setattr(requeue_module, "open_producer", partial(open_producer, delivery_s=0.3))
    with connect(operator.state) as db:
        add_letter(db, offset=1)

    assert operator.runs("dead-letters", "requeue", "--all") == EXIT_CUT_SHORT
    assert "Kafka does not tell its topics" in operator.err
    assert operator.offsets() == [1]


def test_what_was_acknowledged_is_gone_when_the_broker_fails_in_the_middle(
    operator: Operator, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    operator.configure(servers=kafka_broker.bootstrap_servers)
    with connect(operator.state) as db:
        for number in range(4):
            add_letter(db, offset=number, topic=topic)
    late = Delivery(fate=Fate.LATE, detail="Local: Message timed out")

    async def produce_half(_: KafkaProducer, records: Sequence[Outgoing]) -> tuple[Delivery, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(late if index % 2 else ACKNOWLEDGED for index in range(len(records)))

    monkeypatch.setattr(KafkaProducer, "produce", produce_half)

    assert operator.runs("dead-letters", "requeue", "--all") == EXIT_CUT_SHORT
    assert operator.out.startswith("2 records produced")
    assert "2 stay: Local: Message timed out" in operator.err
    assert operator.offsets() == [1, 3]


def test_an_interruption_ends_with_whole_pages_and_says_so(
    operator: Operator, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    operator.configure(servers=kafka_broker.bootstrap_servers)
    monkeypatch.setattr(requeue_module, "_PAGE_ROWS", 2)
    monkeypatch.setattr(requeue_module, "_TOLD_EVERY_S", 0.0)
    with connect(operator.state) as db:
        for number in range(6):
            add_letter(db, offset=number, topic=topic)
    produce = KafkaProducer.produce

    async def interrupted(self: KafkaProducer, records: Sequence[Outgoing]) -> tuple[Delivery, ...]:
        deliveries = await produce(self, records)
        signal.raise_signal(signal.SIGINT)
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()  # it was heard
        return deliveries

    monkeypatch.setattr(KafkaProducer, "produce", interrupted)

    assert operator.runs("dead-letters", "requeue", "--all") == EXIT_CUT_SHORT
    assert operator.out.startswith("2 records produced")
    assert operator.err == ("stationmaster: 2 of 6\nstationmaster: interrupted; the rest stays\n")
    assert operator.offsets() == [2, 3, 4, 5]


def test_letters_that_another_requeue_took_meanwhile_are_passed_over(
    operator: Operator, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    operator.configure(servers=kafka_broker.bootstrap_servers)
    with connect(operator.state) as db:
        add_letter(db, offset=1, topic=topic)
    take = requeue_module.Requeue._take

    async def too_late(self: Any, row: Any) -> None:
        with connect(operator.state) as db:
            db.execute("DELETE FROM dead_letters")
        await take(self, row)

    monkeypatch.setattr(requeue_module.Requeue, "_take", too_late)

    assert operator.runs("dead-letters", "requeue", "--all") == EXIT_OK
    assert operator.out.startswith("0 records produced")


def test_a_second_requeue_is_sent_away_while_one_is_at_it(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=1)
    words = ("dead-letters", "requeue", "--all", "--to", f"{operator.folder}/back.jsonl")

    with one_at_a_time(operator.state):
        assert operator.runs(*words) == EXIT_CUT_SHORT
        assert "is being requeued from by another process; try again" in operator.err
        assert operator.runs(*words, "--dry-run") == EXIT_OK
        assert operator.offsets() == [1]
    assert operator.runs(*words) == EXIT_OK
    assert operator.offsets() == []


def test_nothing_is_produced_from_a_file_that_may_only_be_read(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=1)
    with operator.state.open("r+b") as file:
        # The version that writers must know: SQLite then only reads, as if by permission.
        file.seek(18)
        file.write(b"\x03")
    back = operator.folder / "back.jsonl"

    assert operator.runs("dead-letters", "requeue", "--all", "--to", str(back)) == EXIT_CONFIG
    assert operator.err.startswith(f"outbox.path: {operator.state} needs write permission")
    assert not back.exists()
    assert operator.runs("outbox", "retry") == EXIT_CONFIG
    assert operator.runs("dead-letters", "list") == EXIT_OK


def test_records_of_a_file_source_are_appended_for_a_replay(operator: Operator) -> None:
    lines = operator.folder / "again.jsonl"
    lines.write_bytes(b"torn")
    with connect(operator.state) as db:
        add_letter(db, offset=1, value=b'{\n"a": 1}')
        add_letter(db, offset=2, value=None)

    assert operator.runs("dead-letters", "requeue", "--all") == EXIT_USAGE
    assert "--to FILE.jsonl" in operator.err

    code = operator.runs("dead-letters", "requeue", "--all", "--to", str(lines))
    assert code == EXIT_OK
    assert operator.out == f"2 records in {lines}, 0 uploads in the outbox\n"
    assert lines.read_bytes() == b'torn\n{ "a": 1}\n\n'
    assert operator.offsets() == []


def test_a_new_file_for_a_replay_is_made(operator: Operator) -> None:
    lines = operator.folder / "again.jsonl"
    with connect(operator.state) as db:
        for number in range(3):
            add_letter(db, offset=number, value=b"[%d]" % number)

    words = ("--limit", "2", "--to", str(lines))
    assert operator.runs("dead-letters", "requeue", *words) == EXIT_OK
    assert operator.runs("dead-letters", "requeue", *words) == EXIT_OK
    assert lines.read_bytes() == b"[0]\n[1]\n[2]\n"


def test_nothing_is_lost_or_doubled_while_a_service_writes(
    operator: Operator, kafka_broker: KafkaBroker
) -> None:
    topic = kafka_broker.create_topic()
    operator.configure(servers=kafka_broker.bootstrap_servers)
    with connect(operator.state) as db:
        for number in range(600):
            add_letter(db, offset=number, topic=topic, value=b"%d" % number)
            if not number % 100:
                add_letter(db, offset=number, topic=topic, batch_id=f"b-{number}", value=b"{}")

    with open_writer(operator.state):
        assert operator.runs("dead-letters", "requeue", "--topic", topic) == EXIT_OK
        assert operator.out == "600 records produced to their topics, 6 uploads in the outbox\n"
        assert operator.runs("dead-letters", "export", "--topic", topic) == EXIT_OK
        assert operator.out == ""
        assert operator.runs("outbox", "retry") == EXIT_OK

    values = [record.value() for record in read_topic(kafka_broker, topic)]
    assert sorted(values, key=lambda value: int(value or b"-1")) == [b"%d" % n for n in range(600)]
    assert sum(batch_id.startswith("b-") for batch_id, _ in operator.batches()) == 6


def test_uploads_of_a_file_source_need_no_file(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=1, reason="rejected-upload", batch_id="b-1", value=b"{}")

    assert operator.runs("dead-letters", "requeue", "--all") == EXIT_OK
    assert operator.batches() == [("b-1", 0.0)]


def test_a_file_that_cannot_be_written_leaves_every_letter(operator: Operator) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=1)
    missing = operator.folder / "missing" / "again.jsonl"

    code = operator.runs("dead-letters", "requeue", "--all", "--to", str(missing))
    assert code == EXIT_CUT_SHORT
    assert f"{missing} cannot be written (No such file" in operator.err
    assert operator.offsets() == [1]


@pytest.mark.parametrize(
    ("name", "words"),
    [("again.jsonl", "choose with --topic"), ("again.jsonl.gz", "plain file only")],
)
def test_a_file_has_one_topic_and_is_plain(operator: Operator, name: str, words: str) -> None:
    with connect(operator.state) as db:
        add_letter(db, offset=1)
        if not name.endswith(".gz"):
            add_letter(db, offset=2, topic="other")

    code = operator.runs("dead-letters", "requeue", "--all", "--to", str(operator.folder / name))
    assert code == EXIT_USAGE
    assert words in operator.err
    assert len(operator.offsets()) >= 1


@pytest.mark.parametrize(
    ("words", "promise"),
    [
        (("outbox", "list"), "--json"),
        (("outbox", "retry"), "within about a second"),
        (("outbox", "export"), "nextTry (null: now)"),
        (("dead-letters", "list"), "--reason"),
        (("dead-letters", "export"), "[name, base64 or null]"),
        (("dead-letters", "requeue"), "stationmaster-requeued-from"),
    ],
)
def test_every_command_explains_itself(
    operator: Operator, words: tuple[str, ...], promise: str
) -> None:
    assert operator.runs(*words, "--help") == EXIT_OK
    assert promise in " ".join(operator.out.split()).replace("- ", "-")
