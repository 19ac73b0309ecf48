"""What a run of many seeds saw, so that a green one shows what it proves."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from stationmaster.batch import Outcome
    from tests.simulation.dice import Fault
    from tests.simulation.world import History


@attrs.define(eq=False)
class Figures:
    """Sums over histories."""

    seeds: int = 0
    simulated_s: float = 0.0
    lives: int = 0
    crashes: int = 0
    batches: int = 0
    uploads: int = 0
    jobs: int = 0
    rows: int = 0
    events: int = 0
    outcomes: Counter[Outcome] = attrs.field(factory=Counter)
    faults: Counter[Fault] = attrs.field(factory=Counter)

    def add(self, history: History) -> None:
        """Take note of one."""
        self.seeds += 1
        self.simulated_s += history.simulated_s
        self.lives += history.lives
        self.crashes += history.crashes
        self.batches += history.batches
        self.uploads += history.uploads
        self.jobs += history.jobs
        self.rows += history.rows
        self.events += history.events
        self.outcomes.update(history.outcomes)
        self.faults.update(history.faults)

    def lines(self) -> list[str]:
        """Return them for people."""
        told = [
            f"{self.seeds:,} seeds, {self.simulated_s / 3600:,.1f} simulated hours, {self.events:,} events",
            f"{self.lives:,} lives of the process, {self.crashes:,} of them ended by a crash and survived",
            f"{self.batches:,} batches decided, {self.uploads:,} bodies taken by the target",
            f"{self.jobs:,} jobs of stations, {self.rows:,} rows asked of the model server",
            "their outcomes: "
            + ", ".join(
                f"{outcome.value} {count:,}" for outcome, count in self.outcomes.most_common()
            ),
            "faults that struck:",
        ]
        told += [f"  {count:>9,}  {fault.value}" for fault, count in self.faults.most_common()]
        return told
