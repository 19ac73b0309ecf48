"""What goes wrong, when and to whom: drawn by dice before anything begins, so that a seed stands for the whole plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    import random
    from collections.abc import Collection, Iterator

SERVICES: Final = ("service-0", "service-1")
MODEL: Final = "model-server"
TARGET: Final = "target"
BROKER: Final = "broker"

KINDS: Final = {"kill": 4, "stop": 3, "slow": 4, "disk": 1, "clock": 2, "answers": 2, "handles": 1}
"""Kind -> how many of each round. A round is shuffled, so that also a short run sees every kind."""

_MEAN_PAUSE_S: Final = 2.5
_LONGEST_JUMP_S: Final = 400 * 86_400.0


@attrs.frozen(kw_only=True)
class Fault:
    """One thing that goes wrong."""

    at_s: float
    """Since the beginning."""
    kind: str
    whom: str
    """A process, or a link as "service-0 > target"."""
    what: str
    lasts_s: float = 0.0
    amount: float = 0.0
    """Of a second kill: seconds after the next start. Of a slow link: seconds a chunk. Of a clock: seconds it jumps."""

    def told(self) -> str:
        """Say it in a line."""
        amount = f" {self.amount:+.3g} s" if self.kind == "clock" else ""
        lasts = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.kind:<7} {self.whom:<24} {self.what}{amount}{lasts}"


def draw_plan(dice: random.Random, *, kinds: Collection[str], seconds: float) -> list[Fault]:
    """Draw what goes wrong within so many seconds; everything has ended then."""
    plan: list[Fault] = []
    if not kinds:
        return plan
    rounds = _draw_kinds(dice, kinds)
    at_s = dice.uniform(0, _MEAN_PAUSE_S)
    while at_s < seconds:
        fault = _draw(dice, next(rounds), at_s)
        longest = max(1.0, min(seconds - at_s, seconds / 4))
        plan.append(attrs.evolve(fault, lasts_s=min(fault.lasts_s, longest)))
        at_s += dice.expovariate(1 / _MEAN_PAUSE_S)
    return plan


def _draw_kinds(dice: random.Random, kinds: Collection[str]) -> Iterator[str]:
    round_ = [kind for kind, times in KINDS.items() if kind in kinds for _ in range(times)]
    while True:
        dice.shuffle(round_)
        yield from round_


def _draw(dice: random.Random, kind: str, at_s: float) -> Fault:
    whom, what, lasts_s, amount = dice.choice(SERVICES), "", 0.0, 0.0
    match kind:
        case "kill":
            whom = dice.choice([*SERVICES, *SERVICES, *SERVICES, MODEL, TARGET])
            what = dice.choice(["SIGKILL", "SIGKILL", "SIGTERM"])
            if whom in SERVICES and dice.random() < 0.3:
                what, amount = f"{what}, and SIGKILL again after its start", dice.uniform(0, 3)
        case "stop":
            whom = dice.choice([*SERVICES, *SERVICES, MODEL, TARGET, BROKER])
            what = "SIGSTOP"
            lasts_s = dice.uniform(1, 20) if dice.random() < 0.4 else dice.uniform(1, 5)
        case "slow":
            whom = f"{whom} > {dice.choice([BROKER, MODEL, TARGET])}"
            what = dice.choice(["slow", "stall", "drop"])
            lasts_s = dice.uniform(1, 15)
            amount = dice.uniform(0.02, 0.5)
        case "disk":
            what = "full"
            lasts_s = dice.uniform(3, 15)
        case "clock":
            what = "jumps"
            amount = math.exp(dice.uniform(0, math.log(_LONGEST_JUMP_S))) * dice.choice([-1, 1])
        case "answers":
            whom = dice.choice([TARGET, TARGET, MODEL])
            what = dice.choice(
                ["500", "503", "429", "nothing for 30 s", "flaky"]
                if whom == TARGET
                else ["503", "429", "nonsense"]
            )
            lasts_s = dice.uniform(2, 15)
        case "handles":
            what = "no more"
            lasts_s = dice.uniform(1, 6)
        case _:
            raise ValueError(kind)
    return Fault(at_s=at_s, kind=kind, whom=whom, what=what, lasts_s=lasts_s, amount=amount)
