"""The short form of the simulation; the long one is a command, see the package."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from stationmaster.batch import Outcome
from tests.simulation import scheduling
from tests.simulation.dice import ALL, Dice, Fault
from tests.simulation.mutants import MUTANTS, hunt
from tests.simulation.scheduling import Threads, seeded_scheduler, sleep_in_thread
from tests.simulation.shrinking import breaks, shrink
from tests.simulation.watch import BrokenError
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from stationmaster.batch import StationInput


@pytest.mark.parametrize("seed", range(24), ids=lambda seed: f"seed-{seed}")
def test_every_invariant_holds_whatever_the_dice_say(seed: int) -> None:
    World(seed).run()


@pytest.mark.parametrize("kind", ["station", "blocking", "batch"])
def test_without_faults_one_life_reads_everything_and_nobody_fails(kind: str) -> None:
    # With room: where bounds are tight somebody is rejected, or finds the batcher's queue full.
    worlds = (World(seed, faults=()) for seed in range(200))
    world = next(
        each
        for each in worlds
        if (each.kind, each.settings.max_live, each.policy.max_queue_rows) == (kind, 1_000, 1_024)
    )
    history = world.run()
    assert history.lives == 1
    assert not history.faults.total()
    assert history.uploads == history.batches > 0
    assert history.jobs > 100
    well = {Outcome.SUCCEEDED, Outcome.NO_OUTPUT, Outcome.MISSING}
    assert {outcome for outcome, count in history.outcomes.items() if count} <= well


def test_one_seed_makes_one_history_in_every_process() -> None:
    here = [World(seed).run().digest for seed in (1, 2)]
    assert here[0] != here[1]
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "tests.simulation", "--from", "1", "--seeds", "2"]
        told = subprocess.run(
            [*command, "--digests"],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        assert told.stdout.split() == ["1", here[0], "2", here[1]]


def test_a_trio_without_the_hook_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["trio._core._run"], "_ALLOW_DETERMINISTIC_SCHEDULING")
    with pytest.raises(RuntimeError, match="has moved its hook"), seeded_scheduler(1):
        pass


def test_the_hook_decides_the_order_of_tasks() -> None:
    async def order() -> list[int]:
        told: list[int] = []

        async def tell(number: int) -> None:
            await trio.lowlevel.checkpoint()
            told.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(tell, number)
        return told

    def run(seed: int) -> list[int]:
        with seeded_scheduler(seed):
            return trio.run(order)

    assert run(1) == run(1) != run(2)


def test_a_broken_invariant_cannot_be_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.simulation.handlers import Staff

    async def behave(self: Staff, station: StationInput, opened: object) -> Mapping[str, Any]:
        self.watch.check(self.jobs < 10, "on purpose")
        await trio.sleep(0.1)
        return {}

    monkeypatch.setattr(Staff, "_behave", behave)
    monkeypatch.setattr("tests.simulation.watch.Watch._truthful", lambda *_: None)
    seed = next(seed for seed in range(20) if World(seed).kind == "station")
    with pytest.raises(BrokenError, match="on purpose"):
        World(seed).run()


def test_threads_take_turns_with_the_loop_on_its_clock() -> None:
    told: list[tuple[str, float]] = []

    async def main() -> None:
        def work() -> str:
            told.append(("begin", clock.current_time()))
            sleep_in_thread(5)
            told.append(("end", clock.current_time()))
            return "done"

        limiter = trio.CapacityLimiter(1)
        async with trio.open_nursery() as process:
            threads = Threads(process)
            with threads.installed():
                assert await trio.to_thread.run_sync(work, limiter=limiter) == "done"
                with trio.move_on_after(2):
                    await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)
                told.append(("left", clock.current_time()))
                assert limiter.borrowed_tokens == 1  # the thread goes on, and keeps its place
                process.cancel_scope.cancel()
        told.append(("gone", clock.current_time()))

    clock = MockClock(autojump_threshold=0)
    trio.run(main, clock=clock)
    assert told == [("begin", 0), ("end", 5), ("begin", 5), ("left", 7), ("gone", 7)]
    assert not hasattr(scheduling._current, "thread")


def test_without_one_fault_the_others_strike_as_before() -> None:
    def strikes(faults: Collection[Fault]) -> list[bool]:
        dice = Dice(7, faults)
        return [
            dice.strikes(fault, 0.5) and fault is Fault.POISON
            for _ in range(50)
            for fault in (Fault.BURST, Fault.POISON)
        ]

    assert strikes(ALL) == strikes({Fault.POISON})
    assert any(strikes(ALL))


def test_a_history_shrinks_to_the_faults_that_it_needs() -> None:
    needed = {Fault.CRASH, Fault.DISK_FULL, Fault.POISON}
    assert shrink(0, still=lambda _, faults: needed <= set(faults)) == needed
    assert shrink(0, still=lambda _, faults: True) == set()


def test_a_bug_is_found_and_its_history_shrinks() -> None:
    mutant = next(each for each in MUTANTS if each.name == "no look for a slot")
    verdict = hunt(mutant)
    assert verdict.symptom == "BrokenError: more batches than slots"
    seed = verdict.seeds - 1
    with mutant.at_large():
        needed = shrink(seed)
        assert len(needed) < 4
        assert breaks(seed, needed)
        assert not any(breaks(seed, needed - {fault}) for fault in needed)
    assert not breaks(seed, needed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_changes_a_line_that_is_there(mutant: Any) -> None:
    with mutant.at_large():
        pass


def test_the_command_says_what_it_saw_and_how_to_see_a_failure_again() -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.simulation", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    fine = command("--seeds", "2", "--from", "3", "--jobs", "1")
    assert fine.returncode == 0
    assert "2 seeds" in fine.stdout
    assert "no invariant was broken" in fine.stdout
    wrong = command("--faults", "earthquake")
    assert wrong.returncode == 2
    assert "no such fault: earthquake" in wrong.stderr
