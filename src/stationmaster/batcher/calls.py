"""Rows that travel together.

Identical rows of a call are sent once if they are shared: `texts` is then shorter than `rows`, and `places` says where
in the answer each row finds its vector.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from trio.lowlevel import reschedule

from stationmaster.batcher.bulks import Segment
from stationmaster.batcher.callers import Single

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import trio

    from stationmaster.abc import Vector
    from stationmaster.batcher.callers import Entry, Home


class Call:
    """Rows that travel together. The last caller that leaves one in flight cancels it."""

    __slots__ = (
        "answered",
        "home",
        "live",
        "oldest",
        "parts",
        "places",
        "rows",
        "scope",
        "shared",
        "started",
        "texts",
    )

    def __init__(
        self, parts: list[Entry], texts: list[str], *, home: Home, oldest: float, share: bool
    ) -> None:
        self.parts: list[Entry] = parts
        self.texts: list[str] = texts
        """What is sent."""
        self.rows: int = len(texts)
        """What is waited for: as many, unless identical rows are shared."""
        self.live: int = len(parts)
        """Parts whose callers wait."""
        self.home: Home = home
        self.oldest: float = oldest
        """Arrival of its oldest row."""
        self.answered: bool = False
        self.scope: trio.CancelScope | None = None
        """While it is in flight."""
        self.started: float = oldest
        """When it was sent, last."""
        self.shared: dict[str, int] | None = None
        """Where in `texts` each text stands, if identical rows are shared."""
        self.places: list[int] = []
        """Where in `texts` each row stands, if so."""
        for part in parts:
            part.place = self
        if share:
            self._share(texts)

    def leave(self) -> None:
        """One part fewer is wanted."""
        self.live -= 1
        if not self.live and self.scope is not None:
            self.scope.cancel()

    def admit(self, single: Single, *, at_most: int) -> bool:
        """Let a caller share a row that is in flight, if there is one with its text; return whether it does."""
        if self.scope is None or not self.live or self.shared is None or self.rows >= at_most:
            return False
        place = self.shared.get(single.text)
        if place is None:
            return False
        self.parts.append(single)
        self.places.append(place)
        self.rows += 1
        self.live += 1
        single.place = self
        return True

    def expand(self, vectors: Sequence[Vector]) -> Sequence[Vector]:
        """Return a vector for each row from those for each text sent."""
        if self.rows == len(self.texts):
            return vectors
        return [vectors[place] for place in self.places]

    def prune(self) -> None:
        """Drop what nobody waits for any more."""
        self._load([part for part in self.parts if part.task is not None])

    def fail_late(self, instant: float, make_error: Callable[[], Exception]) -> int:
        """Fail the parts that are due before this instant, and drop what nobody waits for.

        Returns:
            How many rows failed.
        """
        failed = sum(part.fail(make_error) for part in self.parts if part.due < instant)
        self._load([part for part in self.parts if part.due >= instant and part.task is not None])
        return failed

    def split(self) -> Call:
        """Split off the first half of the rows; at least two different texts are needed."""
        room = len(self.texts) // 2
        first = set(self.texts[:room]) if self.shared is not None else None
        half: list[Entry] = []
        rest: list[Entry] = []
        if first is not None:
            self._deal(first, half, rest)
        else:
            queue = deque(self.parts)
            while room:
                part = queue.popleft()
                if isinstance(part, Segment) and part.rows > room:
                    queue.appendleft(part)
                    part = part.cut(room)
                half.append(part)
                room -= part.rows
            rest = list(queue)
        self._load(rest)
        return Call(
            half,
            [text for part in half for text in part.texts()],
            home=self.home,
            oldest=self.oldest,
            share=self.shared is not None,
        )

    def _deal(self, first: set[str], half: list[Entry], rest: list[Entry]) -> None:
        """Deal the parts by their texts: identical rows stay together, so segments are cut where they change sides."""
        for part in self.parts:
            while isinstance(part, Segment):
                sides = [text in first for text in part.texts()]
                if (not sides[0]) not in sides:
                    break
                head = part.cut(sides.index(not sides[0]))
                (half if sides[0] else rest).append(head)
            (half if part.texts()[0] in first else rest).append(part)

    def _load(self, parts: list[Entry]) -> None:
        self.parts = parts
        self.texts = [text for part in parts for text in part.texts()]
        self.rows = len(self.texts)
        self.live = len(parts)
        if self.shared is not None:
            self._share(self.texts)

    def _share(self, texts: list[str]) -> None:
        shared: dict[str, int] = {}
        self.places = [shared.setdefault(text, len(shared)) for text in texts]
        self.shared = shared
        self.texts = list(shared)


def hand_out(parts: Sequence[Entry], vectors: Sequence[Vector], at: int) -> tuple[int, int]:
    """Give the parts of a call their vectors, from `vectors[at]` on.

    Returns:
        How many rows were still wanted, and where the next part's vectors begin.
    """
    answered = 0
    for part in parts:
        if isinstance(part, Single):
            if (task := part.task) is not None:
                part.task = None
                part.result = vectors[at]
                reschedule(task, part)  # type: ignore[arg-type]  # see `callers`
                answered += 1
            at += 1
        else:
            answered += part.answer(vectors[at : at + part.rows])
            at += part.rows
    return answered, at
