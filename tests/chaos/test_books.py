"""The books see what they are there to see."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stationmaster.batch import DeadLetter
from stationmaster.service.receiver import open_store
from stationmaster.service.upload_form import Upload
from stationmaster.state import open_state
from tests.chaos.books import Books, Held, Letter, read_books, unsound
from tests.ledger import Content, Kind

if TYPE_CHECKING:
    from pathlib import Path

GOOD = Content(kind=Kind.GOOD, value=b"good", stations=frozenset({"S1", "S2"}))
POISON = Content(kind=Kind.POISON, value=b"poison")
EMPTY = Content(kind=Kind.EMPTY, value=b"empty")
PRODUCED = {(0, 0): GOOD, (0, 1): POISON, (0, 2): EMPTY, (1, 0): GOOD, (1, 1): GOOD}


def held(
    partition: int, offset: int, *, where: str = "target", name: str = "", **more: Any
) -> Held:
    batch = Held(
        where=where,
        batch_id=name or f"air_{partition}_{offset}_1700",
        topic="air",
        places=((partition, offset),),
        stations=("S1", "S2"),
    )
    return attrs.evolve(batch, **more)


def letter(
    partition: int, offset: int, value: bytes | None = b"poison", where: str = "a"
) -> Letter:
    return Letter(where=where, topic="air", place=(partition, offset), value=value)


BALANCED = Books(
    topic="air",
    produced=PRODUCED,
    uploaded=(held(0, 0), held(1, 0)),
    deliveries=2,
    kept=(held(1, 1, where="a"),),
    letters=(letter(0, 1),),
)


def faults(**changes: Any) -> list[str]:
    return list(attrs.evolve(BALANCED, **changes).faults())


def test_balanced_books_have_no_fault_and_add_up() -> None:
    assert faults() == []
    figures = BALANCED.balance()
    assert figures == {
        "produced": 5,
        "= uploaded": 2,
        "+ in an outbox": 1,
        "+ in the dead letters": 1,
        "+ without a station": 1,
        "+ lost": 0,
        "delivered again": 0,
        "put aside again": 0,
    }


@pytest.mark.parametrize(
    "changes",
    [{"uploaded": (held(0, 0),)}, {"kept": ()}, {"letters": ()}],
    ids=["at the target", "in the outbox", "in the dead letters"],
)
def test_a_lost_message_is_seen(changes: dict[str, Any]) -> None:
    (fault,) = faults(**changes)
    assert fault.startswith("lost: (")
    assert attrs.evolve(BALANCED, **changes).balance()["+ lost"] == 1


def test_a_message_in_two_batches_is_seen() -> None:
    twice = (*BALANCED.uploaded, held(0, 0, name="air_0_0_1701"))
    (fault,) = faults(uploaded=twice)
    assert fault == "doubled: (0, 0) stands in ['air_0_0_1700', 'air_0_0_1701']"


def test_an_id_that_changed_between_an_outbox_and_the_target_is_seen() -> None:
    (fault,) = faults(kept=(*BALANCED.kept, held(0, 0, where="a", name="air_0_0_9")))
    assert fault.startswith("doubled: (0, 0)")


def test_an_id_that_stands_twice_in_one_place_is_seen() -> None:
    (fault,) = faults(uploaded=(*BALANCED.uploaded, held(0, 0)))
    assert fault == "doubled: air_0_0_1700 stands twice at target"


def test_the_same_batch_at_the_target_and_in_an_outbox_is_at_least_once_and_counted_once() -> None:
    both = (*BALANCED.kept, held(0, 0, where="b"))
    assert faults(kept=both) == []
    assert attrs.evolve(BALANCED, kept=both).balance()["+ in an outbox"] == 1


def test_a_letter_that_two_services_hold_is_no_fault_but_told() -> None:
    both = (letter(0, 1), letter(0, 1, where="b"))
    assert faults(letters=both) == []
    assert attrs.evolve(BALANCED, letters=both).balance()["put aside again"] == 1


@pytest.mark.parametrize("place", [(0, 1), (0, 2), (3, 7)], ids=["poison", "empty", "nobody's"])
def test_a_batch_of_a_message_that_makes_none_is_seen(place: tuple[int, int]) -> None:
    found = faults(uploaded=(*BALANCED.uploaded, held(*place)))
    assert any(fault.startswith("invented: ") and str(place) in fault for fault in found)


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (3, 7)], ids=["good", "empty", "nobody's"])
def test_a_letter_of_a_message_that_is_no_poison_is_seen(place: tuple[int, int]) -> None:
    (fault,) = faults(letters=(*BALANCED.letters, letter(*place)))
    assert fault.startswith("invented: a dead letter")


def test_a_letter_with_another_value_is_seen() -> None:
    (fault,) = faults(letters=(letter(0, 1, b"poisoN"),))
    assert fault.endswith("has another value")


@pytest.mark.parametrize(
    "stranger",
    [
        held(0, 0, name="air_0_1_1700"),
        held(0, 0, name="water_0_0_1700"),
        held(0, 0, topic="water"),
        held(0, 0, places=()),
    ],
    ids=["another record's", "another topic's", "of another topic", "of nothing"],
)
def test_a_foreign_id_is_seen(stranger: Held) -> None:
    found = faults(uploaded=(stranger, held(1, 0)))
    assert any(fault.startswith("foreign: ") for fault in found)


@pytest.mark.parametrize("stations", [("S1",), ("S1", "S2", "S3"), ("S1", "S2", "S2")])
def test_a_batch_with_other_stations_than_its_record_is_seen(stations: tuple[str, ...]) -> None:
    (fault,) = faults(uploaded=(held(0, 0, stations=stations), held(1, 0)))
    assert fault.startswith("incomplete: ")


def body(name: str, offset: int) -> bytes:
    form = {
        "batchId": name,
        "topic": "air",
        "ranges": [{"partition": 0, "first": offset, "last": offset}],
        "results": [{"stationId": "S1"}],
        "unsuccessful": [{"stationId": "S2"}],
    }
    return json.dumps(form).encode()


async def make_files(folder: Path) -> tuple[Path, Path]:
    target, state = folder / "target.sqlite", folder / "state.db"
    upload = Upload(
        batch_id="air_0_0_1",
        topic="air",
        ranges=((0, 0, 0),),
        station_ids=("S1",),
        body=body("air_0_0_1", 0),
    )
    with open_store(target) as store:
        store.put(upload)
        store.put(upload)
    async with open_state(state) as opened:
        await opened.outbox.put(
            "air_0_1_1", topic="air", ranges=[], body=body("air_0_1_1", 1), kept_at=1.0, reason=""
        )
        await opened.dead_letters.keep(
            [DeadLetter(reason="r", detail="", topic="air", partition=0, offset=2, value=None)]
        )
    return target, state


async def test_books_are_read_from_the_files_of_a_target_and_a_service(tmp_path: Path) -> None:
    target, state = await make_files(tmp_path)
    produced = {
        (0, 0): GOOD,
        (0, 1): GOOD,
        (0, 2): Content(kind=Kind.POISON, value=None),
    }
    books = await trio.to_thread.run_sync(
        lambda: read_books("air", produced, target=target, states={"a": state})
    )
    assert list(books.faults()) == []
    figures = books.balance()
    assert [figures[name] for name in ("= uploaded", "+ in an outbox", "delivered again")] == [
        1
    ] * 3
    assert list(unsound([target, state])) == []


def test_a_body_with_another_id_than_its_row_is_foreign() -> None:
    batch = Held.read("target", "air_0_0_1", body("water_0_0_1", 0))
    (fault,) = Books(topic="air", produced={(0, 0): GOOD}, uploaded=(batch,)).faults()
    assert fault == "foreign: air_0_0_1 at target calls itself water_0_0_1"


def test_a_file_that_is_no_database_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "damaged.sqlite"
    file.write_bytes(b"damaged" * 1000)
    assert [fault.partition(":")[0] for fault in unsound([file])] == ["damaged"]


def test_a_damaged_index_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "damaged.sqlite"
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE t (x UNIQUE)")
        db.executemany("INSERT INTO t VALUES (?)", [(f"{n:0900}",) for n in range(50)])
        db.commit()
    content = bytearray(file.read_bytes())
    content[-4096:] = bytes(4096)
    file.write_bytes(content)
    assert [fault.partition(":")[0] for fault in unsound([file])] == ["damaged"]
