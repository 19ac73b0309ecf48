"""One history: what outlives processes, and one life of the process after another until the log is read."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from trio.testing import MockClock

from stationmaster.batch import BatchReport
from stationmaster.batcher import BatchPolicy
from stationmaster.parked import record_bytes
from stationmaster.reports import encode_report
from stationmaster.settings import Boundary, PipelineSettings, TopicSettings
from stationmaster.testing import MemoryDeadLetters, MemoryOutboxRows
from tests.simulation.counterparts import Broker, DiceDisk, Target, Weather
from tests.simulation.dice import ALL, Dice, Fault
from tests.simulation.life import Life
from tests.simulation.scheduling import seeded_scheduler
from tests.simulation.telemetry import STATIONS, records_in, write_log
from tests.simulation.watch import GRACE_S, BrokenError

if TYPE_CHECKING:
    from collections.abc import Collection

    from stationmaster.batch import Batch, Outcome, Record
    from tests.simulation.telemetry import Name

_BOUNDARIES: Final[tuple[Boundary, ...]] = ("message", "message", "poll", "timestamp")
LIVES: Final = 80
WILD_LIVES: Final = 12
"""From then on a life ends by itself."""


@attrs.frozen(kw_only=True)
class History:
    """What came of one seed."""

    seed: int
    digest: str
    simulated_s: float
    lives: int
    crashes: int
    batches: int
    uploads: int
    jobs: int
    rows: int
    events: int
    outcomes: Counter[Outcome]
    faults: Counter[Fault]


class World:
    """What a seed makes."""

    def __init__(self, seed: int, *, faults: Collection[Fault] = ALL, messages: int = 40) -> None:
        """Args: `faults`: the only ones that may strike."""
        self.seed = seed
        self.dice = dice = Dice(seed, faults)
        self.clock = MockClock(autojump_threshold=0)
        self.broken: BrokenError | None = None
        self.has_stores = dice.plain.random() < 0.8
        self.has_hook = dice.plain.random() < 0.2
        self.kind = dice.choose(("station", "station", "station", "blocking", "batch"))
        trouble_s = (
            (2 * 3600.0 if dice.plain.random() < 0.03 else 300.0) if self.has_stores else 200.0
        )
        self.weather = Weather(dice, trouble_s)
        disks = [DiceDisk(), DiceDisk()]
        for disk in disks:
            disk.weather = self.weather
        self.rows = MemoryOutboxRows(max_bytes=dice.choose((3_000, 20_000, 10**6)), disk=disks[0])
        self.letters = MemoryDeadLetters(max_bytes=dice.choose((2_000, 10**6)), disk=disks[1])
        self.letters_gone: set[Name] = set()
        """Records that an operator took out of the dead letters."""
        self.told: set[Name] = set()
        """Records that nothing keeps, because there is no store: the observer was told of them."""
        self.log = Broker(max_poll_messages=dice.choose((1, 4, 20)), drain_timeout_s=3.0)
        self.log.surround(dice, self.homes)
        self.empty = write_log(self.log, dice, messages=messages)
        self.target = Target(seed, self.weather, self._check_living)
        self.settings = self._settings()
        self.policy = self._policy()
        self.lives = self.crashes = self.batches = self.jobs = self.asked = self.events = 0
        self.outcomes: Counter[Outcome] = Counter()
        self._digest = hashlib.blake2b(digest_size=8)
        self._ids: dict[object, str] = {}
        self._saved: dict[str, Any] = {}

    def _settings(self) -> PipelineSettings:
        choose = self.dice.choose
        by: Boundary = choose(_BOUNDARIES)
        return PipelineSettings(
            by=by,
            roster=STATIONS[:3] if by == "timestamp" else (),
            topics={"water": TopicSettings(priority="high")},
            high_priority_deadline_s=choose((3.0, 5.0)),
            quorum=choose((1.0, 1.0, 0.8)),
            max_in_flight=choose((1, 2, 8, 64)),
            max_in_flight_bytes=choose((4_000, 10**7)),
            max_parked_bytes=choose((2_000, 10**6)),
            max_live=choose((8, 20, 1_000)),
            threads=choose((2, 8)),
            ordered=choose((True, True, False)),
            idle_s=choose((5.5, 600.0)),
            job_timeout_s=choose((None, None, 2.0)),
            breaker_failures=choose((0, 1, 3)),
            breaker_probe_s=choose((1.0, 5.0)),
            result_bytes=1_000,
            upload_timeout_s=choose((2.0, 8.0, 60.0)),
            grace_s=GRACE_S,
            group_id="simulated",
        )

    def _policy(self) -> BatchPolicy:
        choose = self.dice.choose
        rows = choose((1, 4, 32))
        return BatchPolicy(
            max_batch_rows=rows,
            min_batch_rows=choose((1, rows)),
            max_queue_rows=choose((rows, 64, 1024)),
            max_batch_bytes=choose((120, 1 << 20)),
            max_in_flight=choose((1, 2, 4)),
            hard_timeout_s=choose((0.05, 0.3)),
            send_when_idle=choose((True, True, False)),
            grace_s=1.0,
        )

    @property
    def most_tasks(self) -> int:
        """How many tasks a process may have besides its jobs."""
        settings = self.settings
        return settings.max_live + 2 * settings.max_in_flight + self.policy.max_in_flight + 40

    @property
    def most_parked_bytes(self) -> int:
        """How many bytes of messages may wait for room: the bound, and one poll."""
        largest = max(record_bytes(record) for log in self.log._logs.values() for record in log)
        return self.settings.max_parked_bytes + self.log.max_poll_messages * largest

    # ------------------------------------------------------------------------------------------------- what is watched

    def check(self, condition: object, *facts: object) -> None:
        """Raise if an invariant does not hold. The first one tells; what it breaks besides is noise."""
        if not condition and self.broken is None:
            now = self.clock.current_time()
            self.broken = BrokenError(f"seed {self.seed}, life {self.lives}, t = {now:.6f}", *facts)
            raise self.broken

    def _check_living(self, condition: object, *facts: object) -> None:
        """Check what the process does that runs now; what a dead one does will never have been."""
        self.log.watch.check(condition, *facts)

    def note(self, *facts: object) -> None:
        """Write something into the history."""
        self.events += 1
        self._digest.update(repr((round(self.clock.current_time(), 9), facts)).encode())

    def same_id(self, batch: Batch) -> None:
        """Check that the same records have the same id, whenever they come."""
        ranges = tuple((r.topic, r.partition, r.first, r.last) for r in batch.ranges)
        known = self._ids.setdefault(ranges, batch.batch_id)
        self.check(
            known == batch.batch_id, "another id for the same records", known, batch.batch_id
        )

    def note_refused(self, what: Record | BatchReport) -> None:
        """Take note of what the observer was told; without a store that is all that becomes of it."""
        if self.has_stores:
            return
        if isinstance(what, BatchReport):
            self.told |= records_in(encode_report(what))
        else:
            self.told.add((what.topic, what.partition, what.offset))

    def homes(self) -> set[Name]:
        """Return the records that are safe."""
        homes = self.empty | self.target.homes | self.letters_gone | self.in_letters() | self.told
        for row in self.rows._rows.values():
            homes |= records_in(row.body)
        return homes

    def in_letters(self) -> set[Name]:
        """Return the records in dead letters."""
        found: set[Name] = set()
        for letter in self.letters.letters:
            if letter.batch_id:
                assert letter.value is not None
                found |= records_in(letter.value)
            else:
                found.add((letter.topic, letter.partition, letter.offset))
        return found

    # ------------------------------------------------------------------------------------------------------- durability

    def save(self) -> None:
        """Remember what is durable at this moment."""
        self._saved = {
            "committed": dict(self.log.committed),
            "commits": {key: [*commits] for key, commits in self.log.commits.items()},
            "rows": {name: copy.copy(row) for name, row in self.rows._rows.items()},
            "letters": dict(self.letters._letters),
            "bodies": dict(self.target.bodies),
            "homes": set(self.target.homes),
            "deliveries": Counter(self.target.deliveries),
            "told": set(self.told),
            "letters_gone": set(self.letters_gone),
        }

    def restore(self) -> None:
        """Be as remembered: what a dead process did after its death was never done."""
        saved = self._saved
        self.crashes += 1
        self.log.committed = saved["committed"]
        self.log.commits.clear()
        self.log.commits.update(saved["commits"])
        self.log.forget_commits()
        self.rows._rows = saved["rows"]
        self.letters._letters = saved["letters"]
        self.target.bodies = saved["bodies"]
        self.target.homes = saved["homes"]
        self.target.deliveries = saved["deliveries"]
        self.told = saved["told"]
        self.letters_gone = saved["letters_gone"]

    # ----------------------------------------------------------------------------------------------------------- lives

    async def _look_after_letters(self) -> None:
        """Be the operator."""
        while True:
            await trio.sleep(self.dice.plain.uniform(1, 100))
            if self.weather.is_fair or self.dice.plain.random() < 0.1:
                self.letters_gone |= self.in_letters()
                self.letters.clear()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.weather.change)
            nursery.start_soon(self._look_after_letters)
            while not (self.log.is_read and not len(self.rows)):
                self.lives += 1
                self.check(self.lives < LIVES, "does not come to an end")
                quietly = self.weather.is_fair or self.lives > WILD_LIVES
                life = Life(self, self.lives)
                await life.run(quietly=quietly)
                self._count(life)
                await trio.sleep(self.dice.plain.uniform(0, 10))  # to be started again
            nursery.cancel_scope.cancel()
        self.check(self.homes() >= self.log.everything, "lost", self.log.everything - self.homes())

    def _count(self, life: Life) -> None:
        self.batches += life.watch.closed
        self.jobs += life.staff.jobs
        self.asked += life.staff.asked
        self.outcomes += life.watch.outcomes

    def run(self) -> History:
        """Let it happen.

        Raises:
            BrokenError: an invariant does not hold, wherever that was seen.
        """
        try:
            with seeded_scheduler(self.seed):
                trio.run(self._run, clock=self.clock)
        except BaseException:
            if self.broken is not None:
                raise self.broken from None
            raise
        if self.broken is not None:
            raise self.broken
        return History(
            seed=self.seed,
            digest=self._digest.hexdigest(),
            simulated_s=self.clock.current_time(),
            lives=self.lives,
            crashes=self.crashes,
            batches=self.batches,
            uploads=self.target.deliveries.total(),
            jobs=self.jobs,
            rows=self.asked,
            events=self.events,
            outcomes=self.outcomes,
            faults=self.dice.struck,
        )
