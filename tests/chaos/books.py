"""The books: every record that a broker acknowledged, and where it stands in the end.

    produced = uploaded + in an outbox + in the dead letters + without a station, each record once, by the batch's id

A target keeps the first delivery of an id and counts further ones, an outbox may hold what its target took without
being able to say so, and two services may both have put a poisoned record aside: that is "at least once" and is
counted, not complained about.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from contextlib import closing
from typing import TYPE_CHECKING, Any

import attrs

from stationmaster.service.demo_report import read_only
from tests.ledger import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from tests.ledger import Content, Place


@attrs.frozen(kw_only=True)
class Held:
    """A batch that stands somewhere."""

    where: str
    batch_id: str
    topic: str
    places: tuple[Place, ...]
    stations: tuple[str, ...]
    """In the order of the body: one that stands there twice is seen."""
    own_id: str = attrs.Factory(lambda self: self.batch_id, takes_self=True)
    """The id in its body."""

    @classmethod
    def read(cls, where: str, batch_id: str, body: bytes) -> Held:
        """Take it from the row that holds it."""
        form: Mapping[str, Any] = json.loads(body)
        return cls(
            where=where,
            batch_id=batch_id,
            own_id=form["batchId"],
            topic=form["topic"],
            places=tuple(
                (span["partition"], offset)
                for span in form["ranges"]
                for offset in range(span["first"], span["last"] + 1)
            ),
            stations=tuple(e["stationId"] for e in (*form["results"], *form["unsuccessful"])),
        )


@attrs.frozen(kw_only=True)
class Letter:
    """A record in the dead letters."""

    where: str
    topic: str
    place: Place
    value: bytes | None


@attrs.frozen(kw_only=True)
class Books:
    """Where everything stands."""

    topic: str
    produced: Mapping[Place, Content]
    uploaded: tuple[Held, ...] = ()
    deliveries: int = 0
    kept: tuple[Held, ...] = ()
    """In outboxes."""
    rejected: tuple[Held, ...] = ()
    """Batches in the dead letters."""
    letters: tuple[Letter, ...] = ()

    def faults(self) -> Iterator[str]:
        """Say everything that is wrong."""
        batches = (*self.uploaded, *self.kept, *self.rejected)
        ids: defaultdict[Place, set[str]] = defaultdict(set)
        for batch in batches:
            yield from self._faults_of(batch)
            for place in batch.places:
                ids[place].add(batch.batch_id)
        for place, names in sorted(ids.items()):
            if len(names) > 1:
                yield f"doubled: {place} stands in {sorted(names)}"
        for where, batch_id in _repeated((each.where, each.batch_id) for each in batches):
            yield f"doubled: {batch_id} stands twice at {where}"
        put_aside = {letter.place for letter in self.letters}
        for letter in self.letters:
            yield from self._faults_of_letter(letter)
        for place, content in sorted(self.produced.items(), key=lambda item: item[0]):
            home = ids if content.kind is Kind.GOOD else put_aside
            if content.kind is not Kind.EMPTY and place not in home:
                yield f"lost: {place}, which belongs {content.kind.value}"

    def _faults_of(self, batch: Held) -> Iterator[str]:
        name = f"{batch.batch_id} at {batch.where}"
        if batch.topic != self.topic or not batch.places:
            yield f"foreign: {name} is of the topic {batch.topic}, places {batch.places}"
            return
        if batch.own_id != batch.batch_id:
            yield f"foreign: {name} calls itself {batch.own_id}"
        partition, first = batch.places[0]
        if not batch.batch_id.startswith(f"{self.topic}_{partition}_{first}_"):
            yield f"foreign: {name} holds the record {batch.places[0]}"
        for place in batch.places:
            content = self.produced.get(place)
            if content is None or content.kind is not Kind.GOOD:
                kind = "nobody produced it" if content is None else content.kind.name
                yield f"invented: {name} holds {place}: {kind}"
        known = [self.produced[place] for place in batch.places if place in self.produced]
        wanted = sorted(station for content in known for station in content.stations)
        if sorted(batch.stations) != wanted:
            yield f"incomplete: {name} has {sorted(batch.stations)}, its records {wanted}"

    def _faults_of_letter(self, letter: Letter) -> Iterator[str]:
        content = self.produced.get(letter.place)
        if letter.topic != self.topic or content is None:
            yield f"invented: a dead letter {letter.place} of {letter.topic} at {letter.where}"
        elif content.kind is not Kind.POISON:
            yield f"invented: a dead letter {letter.place} at {letter.where}: {content.kind.name}"
        elif letter.value != content.value:
            yield f"invented: the dead letter {letter.place} at {letter.where} has another value"

    def balance(self) -> dict[str, int]:
        """Return the figures. The first is the sum of those up to "lost", if all is well."""
        uploaded = _places(self.uploaded)
        kept = _places(self.kept) - uploaded
        rejected = _places(self.rejected) - uploaded - kept
        letters = {letter.place for letter in self.letters} - uploaded - kept - rejected
        empty = {place for place, content in self.produced.items() if content.kind is Kind.EMPTY}
        return {
            "produced": len(self.produced),
            "= uploaded": len(uploaded),
            "+ in an outbox": len(kept),
            "+ in the dead letters": len(rejected | letters),
            "+ without a station": len(empty - uploaded - kept - rejected - letters),
            "+ lost": len(self.produced.keys() - uploaded - kept - rejected - letters - empty),
            "delivered again": self.deliveries - len(self.uploaded),
            "put aside again": len(self.letters) - len({letter.place for letter in self.letters}),
        }


def _places(batches: Iterable[Held]) -> set[Place]:
    return {place for batch in batches for place in batch.places}


def _repeated(names: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    seen: set[tuple[str, str]] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def read_books(
    topic: str, produced: Mapping[Place, Content], *, target: Path, states: Mapping[str, Path]
) -> Books:
    """Read the target's database and the state files of these services, whose owners have ended."""
    kept: list[Held] = []
    rejected: list[Held] = []
    letters: list[Letter] = []
    for where, state in states.items():
        with closing(sqlite3.connect(read_only(state), uri=True)) as db:
            for batch_id, body in db.execute("SELECT batch_id, body FROM outbox"):
                kept.append(Held.read(where, batch_id, body))
            rows = db.execute(
                'SELECT topic, partition, "offset", batch_id, value FROM dead_letters'
            )
            for its_topic, partition, offset, batch_id, value in rows:
                if batch_id:
                    rejected.append(Held.read(where, batch_id, value))
                else:
                    place = (partition, offset)
                    letters.append(Letter(where=where, topic=its_topic, place=place, value=value))
    with closing(sqlite3.connect(read_only(target), uri=True)) as db:
        bodies = db.execute("SELECT batch_id, body FROM batches")
        uploaded = tuple(Held.read("target", batch_id, body) for batch_id, body in bodies)
        (deliveries,) = db.execute("SELECT coalesce(sum(deliveries), 0) FROM batches").fetchone()
    return Books(
        topic=topic,
        produced=produced,
        uploaded=uploaded,
        deliveries=deliveries,
        kept=tuple(kept),
        rejected=tuple(rejected),
        letters=tuple(letters),
    )


def unsound(files: Iterable[Path]) -> Iterator[str]:
    """Say which of these SQLite files are damaged."""
    for file in files:
        try:
            with closing(sqlite3.connect(read_only(file), uri=True)) as db:
                found = db.execute("PRAGMA integrity_check").fetchall()
        except sqlite3.DatabaseError as error:
            found = [(str(error),)]
        if found != [("ok",)]:
            yield f"damaged: {file}: {found[:3]}"
