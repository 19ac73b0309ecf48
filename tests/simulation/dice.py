"""Faults, and the dice that decide when they strike. Each fault has dice of its own: without it the others stay."""

from __future__ import annotations

import enum
from collections import Counter
from random import Random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

T = TypeVar("T")


class Fault(enum.Enum):
    """What can go wrong. The value is its name on the command line."""

    # handlers
    HANDLER_HANGS = "handler-hangs"
    HANDLER_SLOW = "handler-slow"
    HANDLER_RAISES = "handler-raises"
    HANDLER_ANSWERS_NONSENSE = "handler-answers-nonsense"
    CLEAN_UP_RAISES = "clean-up-raises"
    CLEAN_UP_SHIELDED = "clean-up-shielded"
    ANSWER_AT_DEADLINE = "answer-at-deadline"
    HELPER_FALLS = "helper-falls"
    STATION_DEAD = "station-dead"
    # broker
    BROKER_SLOW = "broker-slow"
    BROKER_BREAKS = "broker-breaks"
    PARTITION_LOST = "partition-lost"
    PARTITION_REVOKED = "partition-revoked"
    COMMITS_FORGOTTEN = "commits-forgotten"
    POISON = "poison"
    BURST = "burst"
    STRANGERS = "strangers"
    # model server
    MODEL_BUSY = "model-busy"
    MODEL_FAILS = "model-fails"
    MODEL_HANGS = "model-hangs"
    MODEL_SLOW = "model-slow"
    MODEL_MISCOUNTS = "model-miscounts"
    MODEL_REFUSES_ROW = "model-refuses-row"
    # target
    TARGET_DOWN = "target-down"
    TARGET_FAILS = "target-fails"
    TARGET_REFUSES_US = "target-refuses-us"
    TARGET_HANGS = "target-hangs"
    TARGET_SLOW = "target-slow"
    TARGET_REJECTS = "target-rejects"
    TARGET_ANSWER_LOST = "target-answer-lost"
    # disk and clock
    DISK_FULL = "disk-full"
    DISK_FAILS = "disk-fails"
    DISK_SLOW = "disk-slow"
    CLOCK_JUMPS = "clock-jumps"
    # ends
    SIGTERM = "sigterm"
    SIGTERM_TWICE = "sigterm-twice"
    CANCELLED = "cancelled"
    CRASH = "crash"


ALL = frozenset(Fault)


class Dice:
    """Decides by its seed alone, whatever the hash seed of the process is."""

    def __init__(self, seed: int, faults: Collection[Fault] = ALL) -> None:
        self.faults = frozenset(faults)
        self.plain = Random(f"{seed}")
        """For what is no fault."""
        self.struck: Counter[Fault] = Counter()
        self._of = {fault: Random(f"{seed} {fault.value}") for fault in Fault}

    def strikes(self, fault: Fault, probability: float) -> bool:
        """Tell whether a fault strikes now."""
        strikes = self._of[fault].random() < probability and fault in self.faults
        self.struck[fault] += strikes
        return strikes

    def of(self, fault: Fault) -> Random:
        """Return a fault's own dice: for how hard it strikes."""
        return self._of[fault]

    def choose(self, options: Sequence[T]) -> T:
        """Return one of these."""
        return self.plain.choice(options)
