"""Every target, shortly: thousands of seeded inputs, and structured ones that hypothesis makes and shrinks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stationmaster.batch import Message, OffsetRange, Record
from stationmaster.messages import Limits, parse_message
from stationmaster.state.outbox import _beginning
from tests.fuzzing import pipeline, running, targets
from tests.fuzzing.__main__ import main
from tests.fuzzing.making import json_spans, line_spans, word_spans
from tests.fuzzing.outbox import run_outbox
from tests.fuzzing.running import RUNNERS, make_inputs, replay, run_target
from tests.hostile.corpus import CORPUS, TRACE
from tests.test_messages_judged import TREES, documents

SEED = 20_240_101
SHORT = {
    "messages": 4_000,
    "library": 3_000,
    "timestamps": 4_000,
    "traceparent": 2_000,
    "config": 800,
    "answers": 4_000,
    "sinks": 4_000,
    "retry-after": 4_000,
    "uploads": 4_000,
    "outbox": 100,
    "pipeline": 2_000,
}
"""How many inputs take about a second."""
INTERESTING = {
    "messages": {"accepted", "not-utf8", "json-too-deep", "lone-surrogate", "number-out-of-range"},
    "library": {"accepted", "not-json", "number-out-of-range", "lone-surrogate"},
    "timestamps": {"a time", "none"},
    "traceparent": {"a trace", "no trace", "refused"},
    "config": {"a configuration", "refused"},
    "answers": {"vectors", "limits", "refused", "EmbedderBusyError", "RowRejectedError"},
    "sinks": {"Accepted", "Rejected", "TryAgain", "Unavailable"},
    "retry-after": {"seconds", "none"},
    "uploads": {"an upload", "400", "415"},
    "outbox": {"accepted", "rejected"},
    "pipeline": {"uploaded", "rejected-upload", "not-json", "not-utf8", "no-valid-entry"},
}
a_few = settings(max_examples=100, deadline=None)


# ------------------------------------------------------------------------------------------------------- seeded inputs


def test_every_target_has_a_short_form() -> None:
    assert SHORT.keys() == INTERESTING.keys() == RUNNERS.keys()


@pytest.mark.parametrize("target", RUNNERS)
def test_seeded_inputs_show_no_bug_and_reach_every_verdict(target: str, tmp_path: Path) -> None:
    said: list[str] = []
    tally = run_target(target, inputs=SHORT[target], seed=SEED, folder=tmp_path, tell=said.append)
    assert not tally.bugs, "\n".join(said)
    assert tally.inputs == SHORT[target]
    assert tally.verdicts.keys() >= INTERESTING[target], (
        "an input that reaches nothing finds nothing"
    )


def test_the_same_seed_makes_the_same_inputs_and_another_makes_others() -> None:
    assert make_inputs("messages", 1, 50, 100) == make_inputs("messages", 1, 0, 150)[50:]
    assert make_inputs("messages", 1, 0, 50) != make_inputs("messages", 2, 0, 50)


def test_the_parts_of_a_text_are_its_values_lines_and_words() -> None:
    text = b'{"a":[1,"x"],"b":{}}'
    assert {text[first:last] for first, last in json_spans(text)} == {
        b"1",
        b'"x"',
        b'[1,"x"]',
        b"{}",
        text,
    }
    assert [b"k = 1\n"[first:last] for first, last in line_spans(b"k = 1\n")] == [
        b"k = 1",
        b"1",
        b"",
    ]
    assert [b"1, Nov"[first:last] for first, last in word_spans(b"1, Nov")] == [
        b"1",
        b",",
        b" ",
        b"Nov",
    ]


# -------------------------------------------------------------------------------------------------- a bug that is found


def _broken(inputs: list[bytes]) -> Any:
    """Fail like a reader with a bug that takes two inputs to show."""
    if {b"7", b"12"} <= set(inputs):
        raise IndexError("a bug")
    return Counter(fine=len(inputs))


def test_a_bug_is_written_down_with_the_fewest_inputs_and_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNNERS, "broken", (_broken, 20))
    monkeypatch.setattr(
        running,
        "make_inputs",
        lambda target, seed, first, count: [b"%d" % n for n in range(first, first + count)],
    )
    said: list[str] = []
    tally = run_target("broken", inputs=100, seed=1, folder=tmp_path, tell=said.append)

    (path,) = tally.bugs
    assert (tally.inputs, tally.verdicts) == (100, {"fine": 80, "BUG": 1})
    assert any(f"--target broken --file {path}" in line for line in said)
    assert len(path.read_bytes().splitlines()) == 2
    with pytest.raises(IndexError, match="a bug"):
        replay("broken", path)


def test_what_hangs_is_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(inputs: list[bytes]) -> Any:
        while True:
            pass

    monkeypatch.setattr(running, "LIMIT_S", 0.05)
    monkeypatch.setitem(RUNNERS, "messages", (hang, 1))
    said: list[str] = []
    tally = run_target("messages", inputs=1, seed=1, folder=tmp_path, tell=said.append)
    assert len(tally.bugs) == 1
    assert "TimeoutError: took longer" in said[1]


def test_the_pipelines_books_do_not_balance_when_a_message_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stationmaster import letters

    async def lose(self: Any, record: Record, refusal: Any) -> None:
        if record.offset == 3:
            self._account(
                OffsetRange(
                    topic=record.topic,
                    partition=record.partition,
                    first=3,
                    last=3,
                    generation=record.generation,
                )
            )
            return
        await refuse(self, record, refusal)

    refuse = letters.Letters.refuse
    monkeypatch.setattr(letters.Letters, "refuse", lose)
    with pytest.raises(AssertionError, match="is lost: not-json"):
        pipeline.run_pipeline([b"{"] * 10)


def test_the_whole_corpus_passes_the_pipeline_and_its_books_balance() -> None:
    values = [hostile.value for hostile in CORPUS]
    ends = pipeline.run_pipeline(values)
    assert ends.total() == len(values)
    assert ends["uploaded"] > 50


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fuzzing", *map(str, words)])
    return main()


def test_the_command_fails_for_a_bug_and_for_memory_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--inputs", 20, "--target", "retry-after", "--folder", tmp_path]
    assert command(monkeypatch, *words) == 0
    with monkeypatch.context() as changed:
        changed.setattr(running, "GROWTH_BYTES", -1)
        assert command(monkeypatch, *words) == 1
    monkeypatch.setitem(RUNNERS, "retry-after", (_always_broken, 20))
    assert command(monkeypatch, *words) == 1
    assert len(list(tmp_path.iterdir())) == 1


def _always_broken(inputs: list[bytes]) -> Any:
    raise IndexError("a bug")


def test_the_command_shows_again_what_a_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.b64").write_bytes(b"MTIw\n")
    words = ["--target", "retry-after", "--file", tmp_path / "no.b64"]
    assert command(monkeypatch, *words) == 0
    assert "no bug: {'seconds': 1}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(monkeypatch, "--file", tmp_path / "no.b64")
    with pytest.raises(SystemExit):
        command(monkeypatch, "--help")
    assert "--engine" in capsys.readouterr().out


@pytest.mark.once
def test_the_command_runs_by_itself_and_tells_its_memory(tmp_path: Path) -> None:
    words = ["--inputs", "1000", "--target", "retry-after", "--target", "sinks"]
    fine = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", "--folder", str(tmp_path), *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert fine.stdout.count(" 50 %, ") == 2
    assert "2000 inputs, 0 bugs, memory flat" in fine.stdout


# ---------------------------------------------------------------------------------------------------------- hypothesis


@a_few
@given(documents())
def test_any_document_keeps_the_parsers_promises(value: bytes) -> None:
    targets.messages(value)


@a_few
@given(TREES)
def test_whatever_orjson_writes_is_read_as_it_was_written(tree: Any) -> None:
    try:
        value = orjson.dumps({"stationData": [], "tree": tree})
    except TypeError:  # beyond 64 bits, or half a character
        return
    parsed = parse_message(
        Record(topic="air", partition=0, offset=0, timestamp_ms=0, value=value), Limits()
    )
    assert isinstance(parsed, Message)
    assert orjson.dumps(parsed._fields) == orjson.dumps({"tree": orjson.loads(orjson.dumps(tree))})


numbers = st.floats() | st.integers(-(2**70), 2**70) | st.none() | st.text(max_size=4)
vectors = st.lists(numbers, max_size=4) | st.text("fA/w=", max_size=12)
rows = st.fixed_dictionaries(
    {"embedding": vectors | TREES}, optional={"index": st.integers(-1, 3) | st.none() | numbers}
)
bodies = st.one_of(
    st.fixed_dictionaries({"data": st.lists(rows, max_size=3)}, optional={"model": TREES}),
    st.lists(vectors, max_size=3),
    st.dictionaries(
        st.sampled_from(
            ["max_client_batch_size", "max_batch_tokens", "error", "detail", "message"]
        ),
        TREES | st.just(targets.SECRET),
        max_size=3,
    ),
    TREES,
)
statuses = st.sampled_from([200, 201, 204, 301, 400, 401, 408, 409, 413, 422, 429, 500, 503, 599])
waits = st.one_of(
    st.integers(-10, 10**12).map(str),
    st.floats().map(str),
    st.from_regex(
        r"\A[A-Z][a-z]{2}, [0-9]{1,3} [A-Z][a-z]{2} [0-9]{1,6} [0-9:]{1,9} [-+A-Z0-9]{1,6}\Z"
    ),
    st.text(st.characters(max_codepoint=255), max_size=20),
)


def _answer(status: int, wait: str, body: Any) -> bytes:
    line = wait.replace("\n", " ").encode("latin-1", "replace")
    return b"%d\n%b\n%b" % (status, line, json.dumps(body).encode())


answers = st.builds(_answer, statuses, waits, bodies)


@a_few
@given(answers)
def test_any_answer_of_a_model_server_is_vectors_or_an_error_of_ours(data: bytes) -> None:
    targets.answers(data)


@a_few
@given(answers)
def test_any_answer_of_a_target_means_something_and_shows_no_secret(data: bytes) -> None:
    targets.sinks(data)


@a_few
@given(st.datetimes().map(str) | numbers.map(str) | st.times().map(str))
def test_any_time_of_a_message_is_a_time_with_a_zone_or_none(text: str) -> None:
    targets.timestamps(text.encode("utf-8", "surrogatepass"))


@a_few
@given(
    st.binary(max_size=300)
    | st.builds(
        "{}-{:032x}-{:016x}-{}".format,
        st.sampled_from(["00", "01", "ff", "0", "zz"]),
        st.integers(0, 2**129),
        st.integers(0, 2**65),
        st.sampled_from(["00", "01", "ff", "", "01-x"]),
    ).map(str.encode)
    | st.just(TRACE.encode())
)
def test_any_traceparent_is_one_context_or_none(data: bytes) -> None:
    targets.traceparent(data)


@a_few
@given(
    TREES | st.lists(st.dictionaries(st.sampled_from(["partition", "first"]), numbers), max_size=2)
)
def test_whatever_a_row_says_of_its_ranges_it_begins_somewhere_that_sqlite_can_hold(
    tree: Any,
) -> None:
    partition, offset = _beginning(json.dumps(tree))
    assert min(partition, offset) >= -(2**63)
    assert max(partition, offset) < 2**63


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.binary(max_size=60) | TREES.map(json.dumps).map(str.encode), min_size=20, max_size=20
    )
)
def test_any_rows_of_the_outbox_are_delivered_or_rejected(inputs: list[bytes]) -> None:
    run_outbox(inputs)
