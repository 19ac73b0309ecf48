"""What the demo shows, and when it calls itself good."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stationmaster.service.demo_report import Books, Progress, open_screen

if TYPE_CHECKING:
    from pathlib import Path

GOOD = Books(
    produced=2,
    uploaded=2,
    results=23,
    lost=0,
    doubled=0,
    deliveries=2,
    by_deadline=1,
    latest_s=2.001,
    outcomes={("S004", "timedOut"): 1, ("S009", "failed"): 1},
)


def good(books: Books) -> bool:
    return books.good(2, slow="S004", failing="S009", deadline_s=2.0)


def test_books_that_balance_are_good() -> None:
    assert good(GOOD)
    assert "lost 0, duplicated 0" in GOOD.summary(slow="S004", failing="S009", deadline_s=2.0)


@pytest.mark.parametrize(
    "fault",
    [
        {"uploaded": 1},
        {"lost": 1},
        {"doubled": 1},
        {"latest_s": 2.26},
        {"outcomes": {("S004", "timedOut"): 1}},
        {"outcomes": {("S009", "failed"): 1}},
    ],
)
def test_one_fault_spoils_the_books(fault: dict[str, Any]) -> None:
    assert not good(attrs.evolve(GOOD, **fault))


async def test_progress_reads_what_the_parts_say(tmp_path: Path) -> None:
    progress = Progress(messages=2, deadline_s=2.0, state=tmp_path)
    for said in (
        {"event": "batch created"},
        {
            "event": "batch deadline",
            "batch_id": "b",
            "done": "11/12",
            "late": ["S004"],
            "seconds": 2.0,
        },
        {"event": "upload done"},
        {"level": "warning", "event": "source trouble", "detail": "no broker"},
    ):
        progress.take_log_line(json.dumps(said))
    progress.take_log_line("no JSON")
    progress.take_log_line("[]")
    progress.take_producer_line('{"produced": 2, "partitions": {"0": 1, "1": 1}}')

    assert (progress.opened, progress.uploaded, progress.produced) == (1, 1, 2)
    assert progress.closed_by == {"deadline": 1}
    assert progress.produced_by_partition == {0: 1, 1: 1}
    assert [note.strip().partition("  ")[2] for note in progress.notes] == [
        "service: source trouble no broker"
    ]


async def test_the_end_is_when_the_receiver_holds_all_that_was_produced(tmp_path: Path) -> None:
    progress = Progress(messages=2, deadline_s=2.0, state=tmp_path)
    progress.hold(2)
    assert not progress.all_held.is_set()
    progress.take_producer_line('{"produced": 2, "partitions": {"0": 2}}')
    progress.hold(1)
    assert not progress.all_held.is_set()
    progress.hold(2)
    with trio.fail_after(1):
        await progress.all_held.wait()


@pytest.mark.parametrize("live", [False, True])
async def test_the_screen_shows_batches_and_notes(
    live: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(messages=2, deadline_s=2.0, state=tmp_path, started=-10.0)
    with open_screen(progress, live=live) as refresh:
        progress.take_log_line(
            '{"event": "batch complete", "batch_id": "b1", "done": "12/12", "seconds": 0.4}'
        )
        progress.note("model-server ended with code -9")
        refresh()
        refresh()
    shown = capsys.readouterr().out

    assert str(tmp_path) in shown.replace("\n", "")
    assert shown.count("model-server ended") == 1 or live
    assert "model-server ended with code -9" in shown
    assert "uploaded 0" in shown
    assert ("12/12" in shown) is live
